"""Prefect tries a stage again when its failure can pass, and only then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prefect import flow
from prefect.testing.utilities import prefect_test_harness

from flows import graph
from flows.graph import Step, Summary, run_steps, stage
from flows.stages import Outcome, StageError, TransientError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=120):
        yield


def run(monkeypatch: pytest.MonkeyPatch, reproduce: Callable[..., Any]) -> Summary:
    """A flow of one stage, which this function stands for."""
    monkeypatch.setattr(graph, "reproduce", reproduce)
    eager = stage.with_options(retry_delay_seconds=0)

    @flow
    def one() -> Any:
        step = Step(frozenset(), lambda needed: eager.submit("train@0.5", False))
        return run_steps({"train@0.5": step}, parallel=1)

    return one()


def test_a_busy_lock_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def reproduce(name: str, **_: Any) -> Outcome:
        tried.append(name)
        if len(tried) < 3:
            raise TransientError("Unable to acquire lock.")
        return Outcome(name, "ran", 0.1)

    summary = run(monkeypatch, reproduce)
    assert tried == ["train@0.5"] * 3
    assert summary.outcomes["train@0.5"] == Outcome("train@0.5", "ran", 0.1)
    assert not summary.failed


def test_what_does_not_pass_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def reproduce(name: str, **_: Any) -> Outcome:
        tried.append(name)
        raise TransientError("Connect timeout.")

    assert run(monkeypatch, reproduce).failed == {"train@0.5": "Connect timeout."}
    assert len(tried) == 1 + graph.RETRIES


def test_bad_input_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def reproduce(name: str, **_: Any) -> Outcome:
        tried.append(name)
        raise StageError("train.steps is -1.")

    assert run(monkeypatch, reproduce).failed == {"train@0.5": "train.steps is -1."}
    assert len(tried) == 1

"""The order, the limit and the failures of a flow's steps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from prefect.states import Completed, Failed

from flows.graph import Step, Summary, run_steps
from flows.stages import Outcome


class Submitted:
    """Stands for a Prefect future: a state when its work is done."""

    def __init__(self, future: Future[Any]) -> None:
        self.future = future

    def wait(self) -> None:
        self.future.result()

    @property
    def state(self) -> Any:
        return self.future.result()

    def add_done_callback(self, call: Callable[[Any], None]) -> None:
        self.future.add_done_callback(lambda _: call(self))


class Recorder:
    """Steps that note when they began, and how many ran at once."""

    def __init__(self, failing: set[str] | None = None) -> None:
        self.failing = failing or set()
        self.begun: list[str] = []
        self.running = self.most = 0
        self.lock = threading.Lock()
        self.pool = ThreadPoolExecutor(8)

    def step(self, name: str, needs: set[str]) -> Step:
        def submit(needed: list[Any]) -> Any:
            assert all(future.future.done() for future in needed)
            assert len(needed) == len(needs)
            return Submitted(self.pool.submit(self.work, name))

        return Step(frozenset(needs), submit)

    def work(self, name: str) -> Any:
        with self.lock:
            self.begun.append(name)
            self.running += 1
            self.most = max(self.most, self.running)
        threading.Event().wait(0.02)
        with self.lock:
            self.running -= 1
        if name in self.failing:
            return Failed(message=f"{name} is broken.")
        return Completed(data=Outcome(name, "ran", 0.0))


NEEDS: dict[str, set[str]] = {
    "prepare": set(),
    "direct": {"prepare"},
    "calibrate": {"prepare"},
    **{f"compress@{r}": {"calibrate"} for r in "abc"},
    **{f"train@{r}": {f"compress@{r}"} for r in "abc"},
    **{f"evaluate@{r}": {f"train@{r}"} for r in "abc"},
    "report": {"direct", *(f"evaluate@{r}" for r in "abc")},
}


def run(parallel: int, failing: set[str] | None = None) -> tuple[Recorder, Summary]:
    recorder = Recorder(failing)
    steps = {name: recorder.step(name, needs) for name, needs in NEEDS.items()}
    return recorder, run_steps(steps, parallel=parallel)


@pytest.mark.parametrize("parallel", [1, 2, 3])
def test_all_run_in_order_and_no_more_at_once_than_allowed(parallel: int) -> None:
    recorder, summary = run(parallel)
    assert set(summary.outcomes) == set(NEEDS)
    assert recorder.most == parallel
    for name, needs in NEEDS.items():
        assert all(recorder.begun.index(n) < recorder.begun.index(name) for n in needs)
    assert "13 stages: 13 ran" in summary.sentence()


def test_one_at_a_time_a_branch_ends_before_the_next_begins() -> None:
    begun = run(1)[0].begun
    assert begun[:2] == ["prepare", "calibrate"] and begun[-2:] == ["direct", "report"]
    branches = [name[-1] for name in begun if "@" in name]
    assert branches in (
        list(3 * first + 3 * second + 3 * third)
        for first, second, third in ("abc", "acb", "bac", "bca", "cab", "cba")
    )


def test_a_failed_branch_stops_only_what_needs_it() -> None:
    recorder, summary = run(2, {"train@b"})
    assert summary.failed == {"train@b": "train@b is broken."}
    assert summary.skipped == ["evaluate@b", "report"]
    assert {"evaluate@a", "evaluate@c", "direct"} <= set(summary.outcomes)
    assert not {"evaluate@b", "report"} & set(recorder.begun)
    sentence = summary.sentence()
    assert "train@b failed: train@b is broken. Not begun: evaluate@b, report." in sentence

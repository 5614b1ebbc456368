"""Factors are the same wherever they are computed, and what has no room waits for nobody."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import emloc.factor_work as factor_work
from emloc.calibrate import _has_room
from emloc.devices import free_bytes
from emloc.factor_work import workspace_bytes
from emloc.factors import factorize_from_inputs, factorize_from_outputs, plain_factors, root_of
from emloc.files import sha256
from emloc.moments import Moment
from emloc.plan.tracking import AllocationTracker
from tests.opened import open_tiny, unequal_batches
from tests.test_calibrate import run

SECONDS = 30  # only a failure waits for it


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.iterdir()}


def watch_saving(monkeypatch: pytest.MonkeyPatch, before: Callable[[str], None]) -> None:
    """Call a function with the name of each unit's file before it is written."""
    save = factor_work.save_file

    def watched(tensors: Any, path: Path) -> None:
        before(path.name)
        save(tensors, path)

    monkeypatch.setattr(factor_work, "save_file", watched)


@pytest.mark.parametrize("samples", [True, False], ids=["samples", "plain"])
def test_bytes_do_not_depend_on_where_factors_are_computed(
    samples: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: dict[str, str] = {}
    watch_saving(monkeypatch, lambda name: threads.update({name: threading.current_thread().name}))
    found = {}
    answers = {"device": [True] * 3, "beside": [False] * 3, "mixed": [False, True, False]}
    for name, fits in answers.items():
        told = iter(fits)
        opened = open_tiny("qwen2", tmp_path / f"model-{name}", num_hidden_layers=3)
        batches = unequal_batches() if samples else []
        run(opened, tmp_path / name, batches, fits=lambda _, told=told: next(told))
        found[name] = hashes(tmp_path / name)
        where = [threads[f"0000{unit}.safetensors"].startswith("work-behind") for unit in range(3)]
        assert where == [not fit for fit in fits]
    assert found["beside"] == found["device"] == found["mixed"]
    assert len(found["device"]) == 4


def test_the_next_unit_runs_while_the_last_one_s_factors_are_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = threading.Event()
    opened = open_tiny("llama", tmp_path / "model")
    opened.model.get_submodule("model.layers.1").register_forward_hook(lambda *_: running.set())
    met: list[bool] = []

    def wait(name: str) -> None:
        if name == "00000.safetensors":
            met.append(running.wait(SECONDS))

    watch_saving(monkeypatch, wait)
    run(opened, tmp_path / "out", fits=lambda _: False)
    assert met == [True]


def test_an_error_beside_reaches_the_caller_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        raise OSError("no space left")

    watch_saving(monkeypatch, fail)
    opened = open_tiny("llama", tmp_path / "model", num_hidden_layers=1)
    with pytest.raises(OSError, match="no space left"):  # of the last unit, too
        run(opened, tmp_path / "out", fits=lambda _: False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not [t for t in threading.enumerate() if t.name.startswith(("work-", "batch-"))]


@pytest.mark.parametrize("shape", [(512, 512), (1024, 512), (384, 1024)])
@pytest.mark.parametrize("kind", ["inputs", "outputs", "plain"])
def test_the_workspace_is_enough(kind: str, shape: tuple[int, int]) -> None:
    """Room for twice what the tensors take at least: LAPACK's own workspace is not counted."""
    weight = torch.randn(shape).bfloat16()
    side = {"inputs": shape[1], "outputs": shape[0], "plain": 1}[kind]
    moment = None if kind == "plain" else Moment(torch.eye(side), kind == "inputs")
    with AllocationTracker() as tracker:
        if moment is None:
            plain_factors(weight, 100)
        elif moment.of_inputs:
            factorize_from_inputs(weight, root_of(moment.total), 100)
        else:
            factorize_from_outputs(weight, moment.total, 100)
    room = workspace_bytes(weight, moment)
    assert room / 6 < tracker.peak_bytes < room / 1.5, room / tracker.peak_bytes


def test_an_accelerator_has_room_for_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Free is what the driver has, and what torch has and does not use."""
    told = SimpleNamespace(mem_get_info=lambda _: (700, 1000))
    monkeypatch.setattr(torch, "get_device_module", lambda _: told)
    monkeypatch.setattr(torch.accelerator, "memory_reserved", lambda _: 300)
    monkeypatch.setattr(torch.accelerator, "memory_allocated", lambda _: 100)
    device = torch.device("cuda")
    assert free_bytes(device) == 900
    assert _has_room(device, 900) and not _has_room(device, 901)
    assert not _has_room(torch.device("mps"), 1)  # has no float64
    assert _has_room(torch.device("cpu"), 2**60)  # there is nowhere else to go

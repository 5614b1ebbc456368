"""The next unit is read in the background: while this one runs, once, and never more than one."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from emloc.background import ReadAhead, WorkBehind
from emloc.streaming import Stream, _in_memory
from emloc.weights import Location, OpenedModel, WeightStore
from tests.opened import open_tiny, unequal_batches

SECONDS = 30  # only a failure waits for it
FIRST, SECOND = "model.layers.0", "model.layers.1"


class Watched(WeightStore):
    """A store that calls a function before it reads."""

    def __init__(self, store: WeightStore, before: Callable[[str], None]) -> None:
        super().__init__(store.locations)
        self.before = before

    def read(self, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        names = list(names)
        self.before(names[0])
        return super().read(names, device)


def watched(folder: Path, before: Callable[[str], None], **overrides: Any) -> OpenedModel:
    opened = open_tiny("llama", folder, **overrides)
    return OpenedModel(opened.model, Watched(opened.store, before))


def batches(count: int) -> list[dict[str, Any]]:
    return [{**unequal_batches()[0], "use_cache": False} for _ in range(count)]


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("batch-", "read-ahead"))]


class Meeting:
    """The reader, at one unit, and the computing thread wait for each other: neither gets past its
    `meet` without the other, so that what passes does overlap."""

    def __init__(self, unit: str) -> None:
        self.unit, self.barrier, self.reader = unit, threading.Barrier(2), ""

    def before_read(self, name: str) -> None:
        if name.startswith(f"{self.unit}."):
            self.reader = threading.current_thread().name
            self.meet()

    def meet(self) -> None:
        self.barrier.wait(SECONDS)


def test_the_next_unit_is_read_while_the_caller_works_on_this_one(tmp_path: Path) -> None:
    meeting = Meeting(SECOND)
    opened = watched(tmp_path, meeting.before_read)
    Stream(opened, "cpu").run(batches(1), on_unit=lambda u, _: u == FIRST and meeting.meet())
    assert meeting.reader.startswith("read-ahead")
    assert set(opened.store.reads.values()) == {1}


def test_the_next_unit_is_read_while_other_batches_run_through_this_one(tmp_path: Path) -> None:
    meeting = Meeting(SECOND)
    stream = Stream(watched(tmp_path, meeting.before_read), "cpu")

    def second_batch(*_: Any) -> None:
        if stream.current == 1:
            meeting.meet()

    stream.units[FIRST].register_forward_hook(second_batch)
    stream.run(batches(3))
    assert meeting.reader.startswith("read-ahead")


def test_visiting_reads_the_next_unit_meanwhile(tmp_path: Path) -> None:
    meeting = Meeting("lm_head")
    stream = Stream(watched(tmp_path, meeting.before_read), "cpu")
    stream.visit([FIRST, "lm_head"], lambda u, _: u == FIRST and meeting.meet())
    assert meeting.reader.startswith("read-ahead")


def test_no_more_than_one_unit_is_loaded_while_the_next_is_read(tmp_path: Path) -> None:
    loaded: list[list[str]] = []

    def look(name: str) -> None:
        if name:
            here = [n for n, u in stream.units.items() if not next(u.parameters()).is_meta]
            loaded.append(here)

    stream = Stream(watched(tmp_path, look, num_hidden_layers=4), "cpu")
    stream.run(batches(2))
    assert len(loaded) == len(stream.units)
    assert max(len(here) for here in loaded) <= 1  # none, if the reader was slow to start


def test_an_error_in_the_reader_reaches_the_caller(tmp_path: Path) -> None:
    def fail(name: str) -> None:
        if name.startswith(SECOND) and threading.current_thread().name.startswith("read-ahead"):
            raise OSError("the disk is gone")

    opened = watched(tmp_path, fail)
    done: list[str] = []
    with pytest.raises(OSError, match="the disk is gone"):
        Stream(opened, "cpu").run(batches(2), on_unit=lambda name, _: done.append(name))
    assert done == ["model.embed_tokens", FIRST]
    assert not threads()
    assert {p.device.type for p in opened.model.parameters()} == {"meta"}


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_the_reader_ends_with_an_error_of_the_caller(
    error: type[BaseException], tmp_path: Path
) -> None:
    meeting = Meeting(SECOND)

    def fail(name: str, _: nn.Module) -> None:
        if name == FIRST:
            meeting.meet()  # so that the reader is at work
            raise error

    with pytest.raises(error):
        Stream(watched(tmp_path, meeting.before_read), "cpu").run(batches(1), on_unit=fail)
    assert not threads()


def test_no_more_than_one_thing_is_held() -> None:
    read: list[str] = []
    with ReadAhead(lambda name: read.append(name) or name) as ahead:
        ahead.begin("a")
        ahead.begin("b")  # a is held
        assert ahead.take("c") == "c"  # was not begun: read here
        assert ahead.take("a") == "a"
        assert sorted(read) == ["a", "c"]
        ahead.begin("b")
        assert ahead.take("b") == "b"
    assert sorted(read) == ["a", "b", "c"]


def test_a_job_waits_for_the_one_before_and_hands_over_its_error() -> None:
    order: list[str] = []
    free = threading.Event()

    def first() -> None:
        free.wait(SECONDS)
        order.append("first")
        raise ArithmeticError("of the first")

    with WorkBehind() as work:
        work.submit(first)
        order.append("caller")  # goes on while the job runs
        free.set()
        with pytest.raises(ArithmeticError, match="of the first"):
            work.submit(lambda: order.append("second"))
        work.submit(lambda: order.append("third"))
        work.wait()
    assert order == ["caller", "first", "third"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into Linux's memory maps")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_reading_really_reads(dtype: torch.dtype, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    value = torch.randn(2048, 2048).bfloat16()
    save_file({"w": value}, file)

    def mapped() -> int:
        maps = psutil.Process().memory_maps()
        return sum(entry.rss for entry in maps if entry.path == str(file))

    store = WeightStore({"w": Location(file, "w")})
    lazy = store.read(["w"])["w"]
    assert mapped() < value.nbytes / 2  # only the header was looked at
    ready = _in_memory(lazy, dtype)
    assert mapped() >= value.nbytes
    torch.testing.assert_close(ready, value.to(dtype), rtol=0, atol=0)

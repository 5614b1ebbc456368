"""What all stages share: the command line, one-sentence errors, and the measured cost."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from emloc.devices import describe_machine, free_bytes, pick_device
from emloc.files import write_json
from emloc.memory import Cost, measure
from emloc.sizes import show_gib
from tasks.params import Params, load_params


def main(run: Callable[[Params], None]) -> None:
    """Run a stage that no ratio changes: `python -m tasks.NAME`."""
    _parser(run).parse_args()
    with one_sentence():
        run(load_params())


def main_with_ratio(run: Callable[[Params, float], None]) -> None:
    """Run a stage of one ratio: `python -m tasks.NAME RATIO`."""
    parser = _parser(run)
    parser.add_argument("ratio", type=float, help="one of params.yaml's ratios")
    arguments = parser.parse_args()
    with one_sentence():
        params = load_params()
        if arguments.ratio not in params.ratios:
            raise ValueError(
                f"{arguments.ratio} is none of the ratios in params.yaml ({params.ratios}): add it "
                "there, or name one of them."
            )
        run(params, arguments.ratio)


def _parser(run: Callable[..., None]) -> argparse.ArgumentParser:
    module = sys.modules[run.__module__]
    name = Path(str(module.__file__)).stem
    return argparse.ArgumentParser(prog=f"python -m tasks.{name}", description=module.__doc__)


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Print bad input as one sentence and exit with 1; everything else is a bug and keeps its
    traceback."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


@contextlib.contextmanager
def costing(
    file: Path,
    params: Params,
    stage: str | None = None,
    ratio: float | None = None,
    **notes: Any,
) -> Iterator[torch.device]:
    """Hand out the device to work on; write its cost, the notes and the machine to `file`.

    With `memory.budget` set, a stage that is named is planned first, and its planned peak written
    beside the measured one.

    Raises:
        ValueError: the stage does not fit the budget, or ran out of memory all the same.
    """
    device = pick_device(params.device)
    planned = None if stage is None else plan(params, stage, ratio)
    with memory_explained(stage or file.name.partition(".")[0], device), measure(device) as cost:
        yield device
    write_cost(file, cost, planned, notes=notes)


def write_cost(
    file: Path,
    cost: Cost,
    planned: int | None,
    *,
    notes: Mapping[str, Any] | None = None,
    **machine: Any,
) -> None:
    """Write what some work took and was planned to take; `machine` adds to what is told of that."""
    content = {**asdict(cost), "planned_bytes": planned, **(notes or {})}
    write_json(file, {**content, "machine": {**describe_machine(), **machine}})


def plan(params: Params, stage: str, ratio: float | None) -> int | None:
    """With `memory.budget` set, the planned peak of a stage in bytes, if it has one.

    Raises:
        ValueError: the stage does not fit the budget.
    """
    if params.memory.budget is None:
        return None
    from tasks.budget import check  # not above: no artifact depends on a plan

    return check(params, stage, ratio)


@contextlib.contextmanager
def memory_explained(stage: str, device: torch.device) -> Iterator[None]:
    """Turn "out of memory" into a sentence; others may have filled the device meanwhile."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and "DefaultCPUAllocator" not in str(error):
            raise
        raise ValueError(
            f"{stage} ran out of memory on {device}, where {show_gib(free_bytes(device))} is free "
            "now: see python -m tasks.plan for what it takes and what fits, then lower a batch "
            "size or the ratio, set train.gradient_checkpointing, or free the device."
        ) from error

"""What the benchmarks share: the machine in words, timing, a Markdown table, a results file."""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tabulate import tabulate

from emloc.devices import describe_machine
from emloc.files import write_json

RESULTS = Path(__file__).parent / "results"


def seconds(works: Mapping[str, Callable[[], Any]], *, repeats: int) -> dict[str, float]:
    """Median wall-clock seconds of several pieces of work, in turns, so that noise hits them alike.

    Call it on something small first to warm up.
    """

    def timed(work: Callable[[], Any]) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return in_turns({name: partial(timed, work) for name, work in works.items()}, repeats=repeats)


def in_turns(works: Mapping[str, Callable[[], float]], *, repeats: int) -> dict[str, float]:
    """Median of what several pieces of work measure, in turns, so that noise hits them alike."""
    measured: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            measured[name].append(work())
    return {name: statistics.median(values) for name, values in measured.items()}


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; columns after the first are aligned to the right."""
    sides = ["left", *["right"] * (len(header) - 1)]
    return tabulate(rows, header, tablefmt="pipe", colalign=sides, disable_numparse=True)


def save_results(name: str, results: Any, *, folder: Path = RESULTS) -> Path:
    """Write results with the date and the machine to a JSON file of the given name."""
    path = folder / f"{name}.json"
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    write_json(path, {"date": today, "machine": describe_machine(), "results": results})
    return path

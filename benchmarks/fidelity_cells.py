"""The cells of the fidelity benchmark: one task, method, ratio, seed and split, in a file each.

A cell's file holds what every row gave, so that two methods can be compared row by row, and the
digest of the settings; with other settings it counts as not done.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import save_results
from benchmarks.construction import MODEL, MODEL_SHA256
from benchmarks.fidelity_methods import METHODS, REFERENCES
from benchmarks.fidelity_tasks import TASKS
from benchmarks.fidelity_work import LORA, train_settings
from emloc.files import digest, read_json


@dataclass(frozen=True)
class Cell:
    """What one file is about; `ratio` is None for the references, which have no emulator."""

    task: str
    method: str
    ratio: float | None
    seed: int
    split: str

    @property
    def name(self) -> str:
        """Of the file, without its ending."""
        ratio = "whole" if self.ratio is None else self.ratio
        return f"{self.task}-{self.method}-{ratio}-{self.seed}-{self.split}"


@dataclass(frozen=True)
class Grid:
    """What was asked for.

    Attributes:
        steps: of every training.
        rows: of the split, from its first one on.

    Raises:
        ValueError: a value is not allowed; the message names it.
    """

    tasks: Sequence[str]
    ratios: Sequence[float]
    methods: Sequence[str]
    seeds: Sequence[int]
    split: str
    steps: int
    rows: int

    def __post_init__(self) -> None:
        for title, given, known in (
            ("task", self.tasks, TASKS),
            ("method", self.methods, METHODS),
            ("split", [self.split], ("validation", "test")),
        ):
            for name in given:
                if name not in known:
                    allowed = ", ".join(known)
                    raise ValueError(f"the {title} {name!r} is unknown: take some of {allowed}.")
        for ratio in self.ratios:
            if not 0 < ratio < 1:
                raise ValueError(f"a ratio is {ratio}, but it must lie between 0 and 1.")
        for task in self.tasks:
            most = TASKS[task].sizes[self.split]
            if not 1 <= self.rows <= most:
                raise ValueError(
                    f"rows is {self.rows}, but the {self.split} split of {task} has {most}: ask "
                    f"for 1 to {most}."
                )

    def cells(self) -> list[Cell]:
        """All of them, task by task, the references first: every other cell is measured by them."""
        cells = []
        for task in self.tasks:
            cells.append(Cell(task, "zero", None, 0, self.split))
            cells += [Cell(task, "direct", None, seed, self.split) for seed in self.seeds]
            methods = [method for method in self.methods if method not in REFERENCES]
            for ratio, seed, method in itertools.product(self.ratios, self.seeds, methods):
                cells.append(Cell(task, method, ratio, seed, self.split))
        return cells

    def settings(self, cell: Cell) -> dict[str, Any]:
        """All that a cell's figures depend on, the code left out."""
        task = TASKS[cell.task]
        return {
            "model": f"{MODEL} {MODEL_SHA256}",
            "source": task.source,
            "sizes": dict(sorted(task.sizes.items())),
            "rows": self.rows,
            "train": asdict(train_settings(self.steps, cell.seed)),
            "lora": asdict(LORA),
        }


def save_cell(folder: Path, cell: Cell, settings: Mapping[str, Any], results: Any) -> Path:
    """Write a cell's file, with the date and the machine."""
    content = {**asdict(cell), "settings": settings, "digest": digest(settings, []), **results}
    return save_results(cell.name, content, folder=folder)


def find_cell(folder: Path, cell: Cell, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a cell's file holds; None if there is none, or one with other settings."""
    file = folder / f"{cell.name}.json"
    if not file.is_file():
        return None
    content: dict[str, Any] = read_json(file)["results"]
    return content if content["digest"] == digest(settings, []) else None


def found_cells(folder: Path, grid: Grid) -> dict[Cell, dict[str, Any]]:
    """The cells of a grid that are done."""
    found = {cell: find_cell(folder, cell, grid.settings(cell)) for cell in grid.cells()}
    return {cell: content for cell, content in found.items() if content is not None}


def missing(grid: Grid, done: Iterable[Cell]) -> list[Cell]:
    """The cells of a grid that are not done, in order."""
    have = set(done)
    return [cell for cell in grid.cells() if cell not in have]

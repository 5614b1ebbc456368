"""How much of direct LoRA's gain survives the way through an emulator, for several methods.

    python -m benchmarks.fidelity [--tasks codespell] [--ratios 0.8 0.6] [--methods paper ours]
    python -m benchmarks.fidelity --table

With SmolLM2-135M, the same rows, steps and settings for all methods (`benchmarks.fidelity_methods`
says what each of them is). One JSON file a cell in benchmarks/results/fidelity/; a cell that is
there with the same settings is not run again, so a run that was stopped goes on. Factors, emulators
and adapters are kept in .emloc/fidelity/, where several cells share them: remove it to begin anew.

`--table` runs nothing: it draws the table and the picture of what was asked for from the cells that
are there, and lists what is missing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from benchmarks.common import RESULTS
from benchmarks.construction import MODEL, MODEL_SHA256
from benchmarks.fidelity_cells import Cell, Grid, find_cell, found_cells, save_cell
from benchmarks.fidelity_methods import METHODS, REFERENCES
from benchmarks.fidelity_table import picture, table
from benchmarks.fidelity_tasks import TASKS, encoded_splits
from benchmarks.fidelity_work import Work
from emloc.devices import pick_device
from emloc.families import load_codec
from emloc.source import resolve_model

CELLS = RESULTS / "fidelity"
CACHE = Path(".emloc/fidelity")


def prepared(task: str, *, steps: int, folder: Path, device: str) -> Work:
    """The original and the encoded rows of a task, with a folder to keep things in."""
    original = resolve_model(MODEL, sha256=MODEL_SHA256)
    chosen = TASKS[task]
    return Work(
        name=f"{MODEL}@{MODEL_SHA256[:12]}",
        data=f"{chosen.source} {dict(chosen.sizes)}",
        original=original,
        splits=encoded_splits(chosen, load_codec(original, chat_template=False)),
        steps=steps,
        cache=folder,
        device=pick_device(device),
    )


def run_cell(work: Work, cell: Cell, grid: Grid, folder: Path) -> None:
    """Make the adapter of a cell, let the original answer with it, and write the cell."""
    started = time.perf_counter()
    made = METHODS[cell.method](work, cell.ratio, cell.seed)
    built = time.perf_counter()
    results = work.answer(made.adapter, cell.split, grid.rows)
    seconds = {"make": built - started, "evaluate": time.perf_counter() - built}
    save_cell(folder, cell, grid.settings(cell), {**results, "kept": made.kept, "seconds": seconds})
    match = sum(results["correct"]) / grid.rows
    loss = sum(results["losses"]) / sum(results["tokens"])
    print(
        f"{cell.name}: exact match {match:.1%}, loss {loss:.3f} "
        f"({seconds['make']:.0f} s to make, {seconds['evaluate']:.0f} s to evaluate)",
        flush=True,
    )


def run(grid: Grid, prepare: Callable[[str], Work], folder: Path) -> list[Cell]:
    """Run the cells that are not done.

    Args:
        prepare: makes the work of a task; called for tasks with cells to run only.
        folder: of the cells.

    Returns:
        The cells that were run.
    """
    work_of = cache(prepare)
    todo = [c for c in grid.cells() if find_cell(folder, c, grid.settings(c)) is None]
    for cell in todo:
        run_cell(work_of(cell.task), cell, grid, folder)
    return todo


def options() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    methods = [method for method in METHODS if method not in REFERENCES]
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.8, 0.6, 0.4])
    parser.add_argument("--methods", nargs="+", default=methods)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--split", default="test", help="validation or test")
    parser.add_argument("--steps", type=int, default=100, help="of every training")
    parser.add_argument("--rows", type=int, default=300, help="to evaluate, from the first one on")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--table", action="store_true", help="run nothing")
    return parser.parse_args()


def main() -> None:
    """Run what is missing, print the table, draw the picture."""
    chosen = vars(options())
    only_table, device = chosen.pop("table"), chosen.pop("device")
    try:
        grid = Grid(**chosen)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if not only_table:
        run(grid, partial(prepared, steps=grid.steps, folder=CACHE, device=device), CELLS)
    done = found_cells(CELLS, grid)
    text = table(grid, done)
    print(text)
    CELLS.mkdir(parents=True, exist_ok=True)
    (CELLS / f"{grid.split}.md").write_text(f"{text}\n", encoding="utf-8")
    picture(grid, done, CELLS / f"{grid.split}.png")


if __name__ == "__main__":
    main()

"""The table and the picture of the fidelity benchmark, from its cells alone.

Gain recovered = (x − zero-shot) / (direct LoRA − zero-shot), by exact match and by loss. Intervals
of differences are percentiles of a paired bootstrap: rows are drawn with replacement, the same ones
for both methods. With several seeds a row counts with its mean over them, so an interval speaks of
other rows, not of other seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import TABLEAU_COLORS
from numpy.typing import NDArray

from benchmarks.common import markdown
from benchmarks.fidelity_cells import Cell, Grid, missing
from benchmarks.fidelity_methods import METHODS, PEERS, REFERENCES
from benchmarks.fidelity_tasks import NOT_RUN
from tasks.plots import STYLE, plt

DRAWS = 4000
HEADER = (
    "method",
    "ratio",
    "seeds",
    "blocks kept",
    "exact match",
    "gain recovered",
    "loss",
    "gain recovered",
    "match − paper's",
    "match − direct's",
    "loss − paper's",
    "loss − direct's",
)
MEANS = ("method", "ratio", "gain recovered by match", "gain recovered by loss")
CORRECTED, UNCORRECTED = "ours", "heal+alloc"  # the same adapters with and without correction
CORRECTIONS = ("task", "ratio", "match", "loss")
COLORS = (*TABLEAU_COLORS, "black")  # one for each method that is drawn
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """What a method gave, row by row; means over its seeds.

    Attributes:
        correct: (rows,) from 0 to 1.
        losses: (rows,) nats, summed over a row's answer.
        tokens: (rows,) of the answers.
    """

    correct: Array
    losses: Array
    tokens: Array
    kept: float = 1.0
    seeds: int = 1

    @classmethod
    def of(cls, cells: Sequence[Mapping[str, Any]]) -> Outcome:
        """Of the cells of one method, a seed each."""
        means = {
            key: np.mean([cell[key] for cell in cells], axis=0)
            for key in ("correct", "losses", "tokens")
        }
        return cls(**means, kept=cells[0]["kept"], seeds=len(cells))

    def match(self, rows: Any = ...) -> Any:
        """Exact match over rows, or over each of many draws (draws, rows)."""
        return self.correct[rows].mean(-1)

    def loss(self, rows: Any = ...) -> Any:
        """Mean loss of a token, in the same way."""
        return self.losses[rows].sum(-1) / self.tokens[rows].sum(-1)


Measure = Callable[[Outcome, Any], Any]
Found = Mapping[tuple[str, float | None], Outcome]  # (method, ratio) → what it gave


def gain_recovered(value: float, zero: float, direct: float) -> float | None:
    """(x − zero-shot) / (direct − zero-shot); None where direct LoRA gains nothing.

    Also for losses: numerator and denominator change their signs alike.
    """
    return None if direct == zero else (value - zero) / (direct - zero)


def paired_interval(
    one: Outcome, other: Outcome, measure: Measure, *, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of measure(one) − measure(other) over rows drawn with replacement.

    Raises:
        ValueError: the two have not the same number of rows.
    """
    count = len(one.correct)
    if count != len(other.correct):
        raise ValueError(
            f"one method has {count} rows and the other {len(other.correct)}, but they can be "
            "compared only on the same ones: run both with the same --rows."
        )
    rows = np.random.default_rng(seed).integers(0, count, size=(draws, count))
    low, high = np.percentile(measure(one, rows) - measure(other, rows), [2.5, 97.5])
    return float(low), float(high)


def outcomes(
    done: Mapping[Cell, Mapping[str, Any]], task: str
) -> dict[tuple[str, float | None], Outcome]:
    """(method, ratio) → what it gave on a task, in the cells' order."""
    groups: dict[tuple[str, float | None], list[Mapping[str, Any]]] = {}
    for cell, content in done.items():
        if cell.task == task:
            groups.setdefault((cell.method, cell.ratio), []).append(content)
    return {key: Outcome.of(cells) for key, cells in groups.items()}


def table(grid: Grid, done: Mapping[Cell, Mapping[str, Any]]) -> str:
    """The table of each task as Markdown, the mean over the tasks, what the chosen correction does,
    and what was not run."""
    parts = []
    all_found = {task: outcomes(done, task) for task in grid.tasks}
    for task, found in all_found.items():
        rows = [_row(method, ratio, found) for method, ratio in found]
        title = f"### {task}, {grid.split}: {grid.rows} rows, {grid.steps} steps"
        parts += [title, markdown(HEADER, rows) if rows else "Nothing was run."]
    for title, header, rows in (
        ("mean over tasks", MEANS, _means(all_found)),
        (f"{CORRECTED} − {UNCORRECTED}", CORRECTIONS, _corrections(all_found)),
    ):
        if rows:
            parts += [f"### {title}", markdown(header, rows)]
    lines = [*_missing_lines(missing(grid, done)), *(f"{k}: {why}" for k, why in NOT_RUN.items())]
    return "\n\n".join([*parts, "Not run:", "\n".join(f"- {line}" for line in lines)])


def _row(method: str, ratio: float | None, found: Found) -> list[str]:
    """One line of the table."""
    own = found[method, ratio]
    others = [found.get(("paper", ratio)), found.get(("direct", None))]
    row = [method, "–" if ratio is None else f"{ratio}", f"{own.seeds}", f"{own.kept:.1%}"]
    for measure, shown in ((Outcome.match, "{:.1%}"), (Outcome.loss, "{:.3f}")):
        row += [shown.format(measure(own)), _percent(_gain(own, found, measure))]
    for measure, scale, unit in ((Outcome.match, 100, ".1f"), (Outcome.loss, 1, ".3f")):
        row += [_difference(own, other, measure, scale, unit) for other in others]
    return row


def _means(all_found: Mapping[str, Found]) -> list[list[str]]:
    """Gain recovered of each method that ran on every one of several tasks, the tasks alike."""
    if len(all_found) < 2:
        return []
    first, *others = all_found.values()
    rows = []
    for method, ratio in first:
        if ratio is None or any((method, ratio) not in found for found in others):
            continue
        row = [method, f"{ratio}"]
        for measure in (Outcome.match, Outcome.loss):
            gains = [_gain(found[method, ratio], found, measure) for found in all_found.values()]
            row.append(_percent(None if None in gains else float(np.mean(gains))))
        rows.append(row)
    return rows


def _corrections(all_found: Mapping[str, Found]) -> list[list[str]]:
    """How the chosen correction differs from none, on the same emulator and adapter."""
    return [
        [
            task,
            f"{ratio}",
            _difference(own, found[UNCORRECTED, ratio], Outcome.match, 100, ".1f"),
            _difference(own, found[UNCORRECTED, ratio], Outcome.loss, 1, ".3f"),
        ]
        for task, found in all_found.items()
        for (method, ratio), own in found.items()
        if method == CORRECTED and (UNCORRECTED, ratio) in found
    ]


def _gain(own: Outcome, found: Found, measure: Callable[..., Any]) -> float | None:
    """Gain recovered, where both references are there."""
    zero, direct = found.get(("zero", None)), found.get(("direct", None))
    if zero is None or direct is None:
        return None
    return gain_recovered(float(measure(own)), float(measure(zero)), float(measure(direct)))


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value + 0.0:.1%}"  # no -0.0


def _difference(
    own: Outcome, other: Outcome | None, measure: Measure, scale: float, unit: str
) -> str:
    """A difference with its interval, such as +1.5 [-0.5, 3.5]."""
    if other is None or other is own:
        return "–"
    middle = scale * (measure(own, ...) - measure(other, ...))
    low, high = (scale * end for end in paired_interval(own, other, measure))
    return f"{middle:+{unit}} [{low:+{unit}}, {high:+{unit}}]"


def _missing_lines(cells: Iterable[Cell]) -> list[str]:
    """One line a task and method."""
    groups: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        ratio = "" if cell.ratio is None else f"{cell.ratio} "
        groups.setdefault((cell.task, cell.method), []).append(f"{ratio}(seed {cell.seed})")
    return [f"{task}, {method}: {', '.join(parts)}" for (task, method), parts in groups.items()]


def picture(grid: Grid, done: Mapping[Cell, Mapping[str, Any]], file: Path) -> None:
    """Gain recovered against the ratio: a row of two axes a task, a line a method."""
    titles = (("exact match", Outcome.match), ("loss", Outcome.loss))
    count = len(grid.tasks)
    with plt.rc_context(STYLE):
        figure, grid_axes = plt.subplots(count, 2, figsize=(9, 3.4 * count), squeeze=False)
        for axes, task in zip(grid_axes, grid.tasks, strict=True):
            found = outcomes(done, task)
            for axis, (title, measure) in zip(axes, titles, strict=True):
                _lines(axis, found, measure)
                axis.set(title=f"{task}: gain recovered by {title}", xlabel="ratio")
                axis.set_xticks(sorted(grid.ratios))
        shown: dict[str, Any] = {}
        for axis in grid_axes.flat:
            lines, names = axis.get_legend_handles_labels()
            shown |= dict(zip(names, lines, strict=True))
        figure.tight_layout()
        if shown:
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0)}
            figure.legend(shown.values(), shown.keys(), ncols=5, **below)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file)
        plt.close(figure)


def _lines(axis: Any, found: Found, measure: Callable[..., Any]) -> None:
    """The lines of one pair of axes, and direct LoRA at 1."""
    axis.axhline(1, color="#222222", lw=1)
    drawn = [name for name in METHODS if name not in REFERENCES]
    for method, color in zip(drawn, COLORS, strict=True):
        gains = {
            ratio: _gain(own, found, measure)
            for (name, ratio), own in found.items()
            if name == method and ratio is not None
        }
        points = sorted((ratio, gain) for ratio, gain in gains.items() if gain is not None)
        if points:
            style = "s--" if method in PEERS else "o-"
            axis.plot(*zip(*points, strict=True), style, color=color, label=method)

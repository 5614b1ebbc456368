"""The report's pictures, drawn with matplotlib so that they open anywhere."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen first)
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

STYLE = {
    "figure.dpi": 110,
    "savefig.bbox": "tight",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 10,
    "legend.frameon": False,
}
COLORS = {
    "original": "#888888",
    "direct": "#222222",
    "emulator-raw": "#4c9be8",
    "original-raw": "#e8a33d",
    "original-corrected": "#2a9d5c",
}


def quality(
    rows: Sequence[Mapping[str, Any]],
    scores: Sequence[str],
    labels: Mapping[str, str],
    loss: str,
    file: Path,
) -> None:
    """The first three scores and the loss, titled `loss`, against ratio; the original and direct
    LoRA as lines."""
    titles = {name: labels[name] for name in scores[:3]} | {"loss": loss}
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(1, len(titles), figsize=(3.7 * len(titles), 3.5), squeeze=False)
        axes = grid[0]
        for axis, (metric, title) in zip(axes, titles.items(), strict=True):
            _quality_axis(axis, rows, labels, metric)
            axis.set(title=title, xlabel="ratio")
        handles, names = axes[0].get_legend_handles_labels()
        figure.tight_layout()
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0)}
        figure.legend(handles, names, ncols=len(names), **below)
        figure.savefig(file)
        plt.close(figure)


def _quality_axis(
    axis: Axes, rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str], metric: str
) -> None:
    by_way: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if row["ratio"] is None:
            style = "--" if row["way"] == "original" else "-"
            axis.axhline(row[metric], color=COLORS[row["way"]], ls=style, label=labels[row["way"]])
        else:
            by_way[row["way"]].append((row["ratio"], row[metric]))
    for way, points in by_way.items():
        x, y = zip(*sorted(points), strict=True)
        axis.plot(x, y, "o-", color=COLORS[way], label=labels[way])
    axis.set_xticks(sorted({row["ratio"] for row in rows if row["ratio"] is not None}))
    axis.set_ylim(0, None)


def layers(by_ratio: Mapping[float, Sequence[Mapping[str, str]]], file: Path) -> None:
    """Predicted relative loss of each compressed layer, by depth, one line a kind of layer."""
    with plt.rc_context(STYLE):
        count = len(by_ratio)
        figure, axes = plt.subplots(
            1, count, figsize=(5.2 * count, 3.8), sharey=True, squeeze=False
        )
        for axis, (ratio, rows) in zip(axes[0], by_ratio.items(), strict=True):
            lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
            for place, row in enumerate(rows):
                numbers = [int(part) for part in row["name"].split(".") if part.isdigit()]
                kind = row["name"].rsplit(".", 1)[-1]
                lines[kind].append((numbers[0] if numbers else place, float(row["loss"])))
            for kind, points in lines.items():
                x, y = zip(*points, strict=True)
                axis.plot(x, [max(value, 1e-12) for value in y], "o-", ms=3, lw=1, label=kind)
            axis.set(title=f"ratio {ratio}", xlabel="block", yscale="log")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[0][0].set_ylabel("share of the output's energy lost")
        axes[0][-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
        figure.savefig(file)
        plt.close(figure)


def training(curves: Mapping[str, Sequence[Mapping[str, float]]], loss: str, file: Path) -> None:
    """Training loss (lines) and validation loss (dots), both called `loss`, against steps."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7, 3.8))
        for index, (label, rows) in enumerate(curves.items()):
            color = f"C{index}"
            fit = [(row["step"], row["loss"]) for row in rows if "loss" in row]
            held_out = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
            if fit:
                axis.plot(*zip(*fit, strict=True), color=color, label=label)
            if held_out:
                points = zip(*held_out, strict=True)
                axis.plot(*points, "o", color=color, label=f"{label}, validation")
        axis.set(xlabel="step", ylabel=loss, ylim=(0, None))
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
        figure.savefig(file)
        plt.close(figure)


def costs(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Seconds and peak memory of each stage, as bars."""
    names = [row["stage"] + (f" {row['ratio']}" if row["ratio"] else "") for row in rows]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(10, 0.32 * len(rows) + 1.2), sharey=True)
        for axis, key, title in zip(
            axes, ("seconds", "peak_gib"), ("seconds", "peak memory (GiB)"), strict=True
        ):
            bars = axis.barh(names, [row[key] for row in rows], color="#4c9be8")
            axis.bar_label(bars, fmt="%.1f" if key == "seconds" else "%.2f", padding=3)
            axis.set(title=title)
            axis.grid(axis="y", visible=False)
            axis.margins(x=0.15)
        axes[0].invert_yaxis()
        figure.tight_layout()
        figure.savefig(file)
        plt.close(figure)

"""A plan as text."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from emloc.plan.options import Option, Planner
from emloc.plan.peak import PARTS, Peak
from emloc.plan.tracking import bytes_of
from emloc.plan.work import Rows
from emloc.sizes import GIB, show_gib

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def plan_text(planner: Planner, ratios: Sequence[float], place: str) -> str:
    """All that a plan says: stages by part, ratios side by side, what fits, and the disk.

    Args:
        ratios: to look at.
        place: the kind of device that is planned for.
    """
    options = list(planner.options(ratios))
    original = bytes_of(planner.subject.build(planner.dtype))
    try:
        chosen: float | None = planner.largest_ratio()
        both = "training fits" if planner.healing is None else "healing and training fit"
        answer = f"The largest ratio whose {both} is {chosen}."
    except ValueError as error:
        chosen, answer = None, str(error)
    shown = ratios[len(ratios) // 2] if chosen is None else chosen
    parts = [
        _heading(planner, original, place),
        f"Peaks in GiB, of what depends on the ratio at {shown}:",
        _stages(planner, shown),
        _options(planner, options),
        answer,
        f"On the disk: the original {show_gib(original)}, the factors "
        f"{show_gib(planner.factors_bytes())}, an emulator what the table says.",
    ]
    return "\n\n".join(parts)


def _heading(planner: Planner, original: int, place: str) -> str:
    work = planner.work
    rows = f"{work.batch_size} rows of {work.tokens} tokens" if isinstance(work, Rows) else (
        f"{work.batch_size} pictures"
    )  # fmt: skip
    recomputed = ", activations recomputed" if planner.settings.gradient_checkpointing else ""
    return (
        f"The original takes {show_gib(original)}; there is {show_gib(planner.budget_bytes)} on "
        f"{place}, of which {show_gib(planner.runtime_bytes)} goes to the runtime. "
        f"Training: {rows} at once, {planner.settings.optimizer}, "
        f"{planner.settings.precision}{recomputed}."
    )


def _stages(planner: Planner, ratio: float) -> str:
    peaks: dict[str, Peak | None] = {
        "calibrate": planner.calibrate,
        "teach": planner.teach,
        "heal": planner.heal(ratio),
        "train": planner.option(ratio).train,
        "correct": planner.correct(ratio),
        "answer with the original": planner.generate,
        "direct LoRA on the original": planner.direct,
    }
    overhead = planner.runtime_bytes
    body = [
        [
            name,
            *(f"{getattr(peak, part) / GIB:.2f}" for part in PARTS),
            f"{overhead / GIB:.2f}",
            f"{(peak.total + overhead) / GIB:.2f}",
            "yes" if peak.total + overhead <= planner.budget_bytes else "no",
        ]
        for name, peak in peaks.items()
        if peak is not None
    ]
    header = ["stage", *PARTS, "runtime", "in all", "fits"]
    return tabulate(body, header, tablefmt="github", disable_numparse=True)


def _options(planner: Planner, options: Sequence[Option]) -> str:
    overhead = planner.runtime_bytes
    body = [
        [
            option.ratio,
            f"{option.emulator_bytes / GIB:.2f}",
            f"{(option.train.total + overhead) / GIB:.2f}",
            "yes" if option.fits else "no",
            f"{option.speed:.2f}",
            option.most_rows,
            option.longest,
        ]
        for option in options
    ]
    header = [
        "ratio",
        "emulator (GiB)",
        "training (GiB)",
        "fits",
        "speed, direct LoRA = 1",
        "most rows at once",
        "longest row (tokens)",
    ]
    return tabulate(body, header, tablefmt="github", disable_numparse=True, missingval="")

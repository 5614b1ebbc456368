"""What each stage is planned to take, and whether that fits `memory.budget`.

Stages ask when they start and load this only then: a plan changes nothing that they write.
"""

from __future__ import annotations

import torch

from emloc.devices import free_bytes, pick_device, pick_dtype
from emloc.diffusion.encoding import Encoded
from emloc.families.diffusion import load_family
from emloc.plan.jobs import Calibration, Healing, Teaching
from emloc.plan.options import Planner, runtime_bytes_on
from emloc.plan.peak import Peak
from emloc.plan.subject import Subject, load_subject
from emloc.plan.work import Noised, Rows, TaughtRows, empty_pictures, rows_of
from emloc.sizes import show_gib
from tasks import layout
from tasks.encoding import codec_of, encode
from tasks.params import Params

KNOBS = {
    "calibrate": "lower calibrate.samples or calibrate.batch_size",
    "teach": "lower teach.wave or teach.batch_size",
    "heal": "lower heal.batch_size or the ratio, or set heal.gradient_checkpointing",
    "train": "lower train.batch_size or the ratio, or set train.gradient_checkpointing or "
    "train.quantization",
    "direct": "lower train.batch_size, set train.gradient_checkpointing, or set evaluate.direct to "
    "false",
    "correct": "set device to cpu for this stage",
}
"""What to change when a stage takes too much."""
OFFLOADED = ("baseline", "evaluate")
"""Stages whose model lies partly elsewhere when it does not fit."""


def planner_of(params: Params, *, progress: bool = False) -> Planner:
    """The planner of a project. Rows are as long as they are, or before `prepare` as they may be;
    without a budget there is as much memory as is free."""
    device, model = pick_device(params.device), params.model
    subject = load_subject(
        model.source,
        calibrated=params.calibrate.targets,
        targets=params.compress.targets,
        revision=model.revision,
    )
    if params.noise is None:
        row: Rows | Noised = _row("train", subject, params)
        answered: Rows | None = _row("test", subject, params).times(params.evaluate.batch_size)
    else:
        row, answered = _picture(subject, params), None
    calibration, teach, heal = params.calibrate, params.teach, params.heal
    some, taught = row.times(teach.batch_size), row.times(heal.batch_size)
    if isinstance(taught, Rows):
        taught = TaughtRows(
            taught.batch_size, taught.tokens, None, taught.pictures, params.teach.top_k
        )
    budget = params.memory.budget_bytes
    return Planner(
        subject=subject,
        dtype=pick_dtype(model.dtype),
        work=row.times(params.train.batch_size),
        lora=params.train.lora,
        settings=params.train,
        calibration=Calibration(
            row.times(calibration.batch_size) if calibration.samples else None,
            -(-calibration.samples // calibration.batch_size),
            calibration.max_ratio,
        ),
        teaching=Teaching(some, -(-teach.wave // teach.batch_size)) if teach.rows else None,
        healing=Healing(taught, heal) if heal.steps else None,
        prompts=answered,
        new_tokens=params.evaluate.max_new_tokens,
        device=device,
        budget_bytes=free_bytes(device) if budget is None else budget,
        runtime_bytes=runtime_bytes_on(device.type),
        progress=progress,
    )


def planned(params: Params, stage: str, ratio: float | None) -> tuple[Planner, Peak] | None:
    """The peak that a stage is planned to have; None for one that has no plan."""
    planner = planner_of(params)
    peak: Peak | None = None
    if stage == "correct" and ratio is not None:
        peaks = [planner.correct(ratio)]
        if params.correct.method in ("weighted", "auto"):
            peaks.append(planner.calibrate)  # streams those rows once more, for smaller sums
        peak = max(peaks, key=lambda peak: peak.total)
    elif stage in OFFLOADED:
        peak = planner.generate
    elif stage in ("heal", "train") and ratio is not None:
        peak = getattr(planner, stage)(ratio)
    elif stage in ("calibrate", "teach", "direct"):
        peak = getattr(planner, stage)
    return None if peak is None else (planner, peak)


def check(params: Params, stage: str, ratio: float | None) -> int | None:
    """Make sure that a stage fits the budget, and what is free.

    Returns:
        Its planned peak in bytes, to compare with the measured one (on a CPU, what the process
        takes anyway included); None for a stage that has no plan, or that takes what there is.

    Raises:
        ValueError: it does not fit; one sentence with what it needs, what there is and what to
            change.
    """
    found = planned(params, stage, ratio)
    if found is None:
        return None
    planner, peak = found
    needed = planner.runtime_bytes + peak.total
    free = free_bytes(planner.device)
    if stage in OFFLOADED and needed > min(free, planner.budget_bytes):
        return None
    for allowed, whose in ((planner.budget_bytes, "memory.budget allows"), (free, "is free")):
        if needed > allowed:
            name = stage if ratio is None else f"{stage}@{ratio}"
            raise ValueError(
                f"{name} is planned to take {show_gib(needed)} on {planner.device.type}, but "
                f"{show_gib(allowed)} {whose}: {KNOBS[stage]} (python -m tasks.plan shows what "
                "fits)."
            )
    return needed if planner.device.type == "cpu" else peak.total


def _row(split: str, subject: Subject, params: Params) -> Rows:
    """One row of a split, as `rows_of` makes it."""
    if layout.rows(split).exists() and subject.folder is not None:
        codec = codec_of(subject.folder, params)
        return rows_of(codec, encode(split, codec, params))
    tiles = params.data.pictures.get("max_patches", 0)
    pictures = {}
    if isinstance(tiles, int) and tiles:
        pictures = empty_pictures(subject.build(torch.bfloat16), tiles + 1)  # and a thumbnail
    return Rows(1, params.data.max_length, pictures=pictures)


def _picture(subject: Subject, params: Params) -> Noised:
    assert subject.folder is not None and params.noise and params.data.dreambooth
    family, dtype = load_family(subject.folder), pick_dtype(params.train.precision)
    file = layout.encoded("train")
    if not file.exists():
        size = params.data.dreambooth.resolution
        return Noised.of_config(family, size, dtype, params.noise)
    return Noised(family.batch(Encoded.load(file), [0], [0], params.noise).as_type(dtype), family)

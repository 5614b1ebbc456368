"""Where each artifact and each result lies, relative to the project's root. No other place says so.

`artifacts/` holds what is big, `results/` what is read by people and by `report`.
"""

from __future__ import annotations

import os
from pathlib import Path

# For resuming; no stage declares it. Clones that come and go share one outside of them.
CHECKPOINTS = Path(os.environ.get("EMLOC_CHECKPOINTS", ".emloc/checkpoints"))
ARTIFACTS, RESULTS, REPORT = Path("artifacts"), Path("results"), Path("report")

BASE = ARTIFACTS / "base"
POINTER = ARTIFACTS / "model.json"
QUANTIZED = ARTIFACTS / "quantized.json"
DATA = ARTIFACTS / "data"
FACTORS = ARTIFACTS / "factors"
TEACHER = ARTIFACTS / "teacher"
DIRECT_ADAPTER = ARTIFACTS / "adapters" / "direct"
PRETRAINED = RESULTS / "pretrain.json"
PREPARED = RESULTS / "prepare.json"
BASELINE, DIRECT = RESULTS / "baseline", RESULTS / "direct"

# What `evaluate` compares at each ratio, as the files are named.
WAYS = ("emulator-raw", "original-raw", "original-corrected")


def rows(split: str) -> Path:
    """A split of the data: train, validation, test or calibration; its pictures lie beside it."""
    return DATA / split / "rows.jsonl"


def encoded(split: str) -> Path:
    """The pictures and captions of a split as a diffusion pipeline's denoiser takes them."""
    return DATA / split / "encoded.safetensors"


def emulator(ratio: float) -> Path:
    """The checkpoint folder of the emulator as it was cut."""
    return ARTIFACTS / "emulators" / str(ratio)


def healed(ratio: float) -> Path:
    """The checkpoint folder of the emulator that is trained on: healed, or as it was cut."""
    return ARTIFACTS / "healed" / str(ratio)


def adapter(ratio: float, kind: str) -> Path:
    """An adapter's folder; `kind` is raw or corrected."""
    return ARTIFACTS / "adapters" / str(ratio) / kind


def results(ratio: float) -> Path:
    """The folder of a ratio's metrics, curves and predictions."""
    return RESULTS / str(ratio)


def predictions(way: str, ratio: float | None) -> Path:
    """Where a way's predictions lie: a folder of pictures, or with `.jsonl` added, answers."""
    folder = BASELINE if ratio is None else results(ratio)
    return folder / "predictions" / way

"""LoRA on a model, with its curve and its metrics; `train` and `direct` both do it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from emloc.files import digest, write_json
from emloc.finetune import finetune
from emloc.nf4 import load_base
from tasks import layout
from tasks.encoding import codec_of, encode
from tasks.fit_denoiser import fit_denoiser
from tasks.params import Params
from tasks.stage import costing
from tasks.tables import write_csv

CURVE = ("step", "loss", "learning_rate", "grad_norm", "eval_loss")


def fit(
    params: Params,
    *,
    ratio: float | None,
    model: Path,
    base_name: str,
    adapter: Path,
    results: Path,
    inputs: list[Path],
) -> None:
    """Train LoRA on the checkpoint at `model` and write the adapter, train.csv and train.json.

    Args:
        ratio: of the emulator; None for the original.
        model: an emulator, or the original.
        base_name: what the adapter names as its base.
        adapter, results: where to write.
        inputs: files whose content, with the settings, makes a checkpoint of this run reusable.
    """
    splits = [layout.rows("train"), layout.rows("validation")]
    settings = {"train": asdict(params.train), "noise": params.noise and asdict(params.noise)}
    if params.noise is not None:
        splits = [layout.encoded("train"), layout.encoded("validation")]
    key = digest(settings, [*inputs, *splits])
    checkpoints = layout.CHECKPOINTS / f"{results.name}-{key}"
    checkpoints.parent.mkdir(parents=True, exist_ok=True)
    stage = "direct" if ratio is None else "train"
    # Another clone that shares the checkpoints may be training this very adapter.
    with (
        FileLock(f"{checkpoints}.lock"),
        costing(results / "train.cost.json", params, stage, ratio) as device,
    ):
        if params.noise is None:
            history = _fit_model(params, model, base_name, adapter, checkpoints, device)
        else:
            history = fit_denoiser(params, model, adapter, checkpoints, device)
    curve = history.pop("history")
    write_csv(results / "train.csv", CURVE, curve)
    last = next((row["eval_loss"] for row in reversed(curve) if "eval_loss" in row), None)
    write_json(results / "train.json", {**history, "validation_loss": last})


def _fit_model(
    params: Params,
    model: Path,
    base_name: str,
    adapter: Path,
    checkpoints: Path,
    device: torch.device,
) -> dict[str, Any]:
    """Fit a language or vision-language model."""
    settings = params.train
    codec = codec_of(model, params)
    return finetune(
        load_base(model, lora=settings.lora, settings=settings, device=device),
        encode("train", codec, params),
        encode("validation", codec, params) if params.data.validation else [],
        codec=codec,
        lora=settings.lora,
        settings=settings,
        base_name=base_name,
        out=adapter,
        checkpoints=checkpoints,
    )

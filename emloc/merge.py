"""Fold an adapter into the original: a plain checkpoint, which needs none of this package."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from emloc.checkpoint import copy_companions, deciding_files, is_pipeline
from emloc.diffusion.pipelines import DENOISERS, load_pipeline
from emloc.files import read_json, writing
from emloc.models import load_model
from emloc.quiet import quiet_diffusers


def merge_adapter(
    model: Path | str,
    adapter: Path | str,
    *,
    out: Path | str,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "5GB",
) -> None:
    """Write the original with its adapter folded in, and what it is used with.

    Of a diffusion pipeline, a whole one is written. The original is in CPU memory meanwhile.

    Args:
        model: folder of the original.
        adapter: folder of an adapter.
        out: folder to create.
        dtype: of the merged weights.
        max_shard_size: of one safetensors file.

    Raises:
        ValueError: `model` is an emulator, or the adapter does not fit it.
    """
    if is_pipeline(model):
        _merge_pipeline(Path(model), Path(adapter), Path(out), dtype, max_shard_size)
        return
    if read_json(Path(model) / "config.json").get("quantization_config") is not None:
        raise ValueError(
            f"{model} is an emulator or quantised, and an adapter merges into full weights only: "
            "name the original."
        )
    loaded = load_model(model, dtype=dtype, device="cpu")
    try:
        merged = PeftModel.from_pretrained(loaded, str(adapter)).merge_and_unload()
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"the adapter {adapter} could not be merged into {model}: {reason}"
        ) from error
    with writing(out) as folder:
        merged.save_pretrained(folder, max_shard_size=max_shard_size)
        copy_companions(Path(model), folder)


def _merge_pipeline(
    model: Path, adapter: Path, out: Path, dtype: torch.dtype, max_shard_size: str
) -> None:
    """The same for a pipeline, by diffusers' own means."""
    pipeline: Any = load_pipeline(model, dtype=dtype, device="cpu", adapter=adapter)
    pipeline.fuse_lora(components=[DENOISERS[type(pipeline).__name__]])
    pipeline.unload_lora_weights()
    with writing(out) as folder, quiet_diffusers():
        pipeline.save_pretrained(folder, max_shard_size=max_shard_size)
        for name in deciding_files(model, str(model)):  # diffusers writes its paths into configs
            if name.endswith(".json") and not name.endswith(".index.json"):
                shutil.copyfile(model / name, folder / name)

"""Fold an adapter into the original: a plain checkpoint, for which transformers is enough."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel

from emloc.checkpoint import copy_companions
from emloc.files import read_json, writing
from emloc.models import load_model


def merge_adapter(
    model: Path | str,
    adapter: Path | str,
    *,
    out: Path | str,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "5GB",
) -> None:
    """Write the original with its adapter folded in, and its tokenizer and processor.

    The whole original is in CPU memory meanwhile.

    Args:
        model: folder of the original.
        adapter: folder of an adapter.
        out: folder to create.
        dtype: of the merged weights.
        max_shard_size: of one safetensors file.

    Raises:
        ValueError: `model` is an emulator, or the adapter does not fit it.
    """
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

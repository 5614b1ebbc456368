"""Prompts as a pipeline's own text encoders see them, which are loaded and freed here.

- `encode_prompts`: embeddings by the names of the pipeline's arguments
"""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from emloc.checkpoint import MODEL_INDEX
from emloc.diffusion.pipelines import GUIDED, denoiser_folder, pipeline_class
from emloc.files import read_json
from emloc.quiet import quiet_diffusers, quiet_libraries

_LONGEST = 512  # tokens that a T5 of these pipelines was trained for
_DEFAULTS = {"FluxPipeline": 512, "FluxKontextPipeline": 512, "StableDiffusion3Pipeline": 256}
_CLIP = 77  # tokens that a CLIP takes


def encode_prompts(
    pipeline_path: str | os.PathLike[str],
    prompts: Sequence[str],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    max_sequence_length: int | None = None,
    negative: bool = False,
) -> list[dict[str, Tensor]]:
    """Encode prompts with a pipeline's own text encoders, which are loaded and freed here.

    Args:
        dtype: of the encoders, and of what they give.
        max_sequence_length: tokens of a prompt: up to 512 where a T5 reads it, up to 77 where
            CLIPs alone do; None is what the pipeline uses.
        negative: also give the encodings of an empty prompt, as `negative_prompt_embeds` and
            `negative_pooled_prompt_embeds`, where the pipeline's guidance needs them.

    Returns:
        For each prompt `prompt_embeds` (1, n, width) and `pooled_prompt_embeds` (1, width), on
        the CPU.

    Raises:
        ValueError: a prompt has more tokens than the encoders take; the message names it.
    """
    kind = pipeline_class(pipeline_path)
    options = _length(kind.__name__, max_sequence_length)
    pipeline = _with_encoders(kind, pipeline_path, dtype)
    longest = options.get("max_sequence_length", max_sequence_length)
    _check_lengths(pipeline, prompts, longest)
    pipeline.to(device)
    negated = negative and _needs_negative(pipeline_path, kind.__name__)
    with torch.no_grad():
        encoded = [_encode(pipeline, prompt, options, dtype) for prompt in prompts]
        empty = _encode(pipeline, "", options, dtype) if negated else {}
    del pipeline
    free_memory()
    return [{**one, **{f"negative_{name}": t for name, t in empty.items()}} for one in encoded]


def _encode(
    pipeline: Any, prompt: str, options: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """What the pipeline's own encoders make of one prompt."""
    name, arguments = type(pipeline).__name__, {"prompt": prompt, **options}
    if name in GUIDED:
        arguments["do_classifier_free_guidance"] = False
    if name.startswith("StableDiffusion3"):
        arguments |= {"prompt_2": None, "prompt_3": None}
    result = pipeline.encode_prompt(**arguments, device=pipeline.device)
    pooled = result[1] if name.startswith("Flux") else result[2]
    found = {"prompt_embeds": result[0], "pooled_prompt_embeds": pooled}
    return {name: tensor.to("cpu", dtype) for name, tensor in found.items()}


def _needs_negative(path: str | os.PathLike[str], name: str) -> bool:
    """Whether guidance compares with an empty prompt, and not with zeros or nothing at all."""
    zeros = read_json(Path(path) / MODEL_INDEX).get("force_zeros_for_empty_prompt", False)
    return name in GUIDED and not zeros


def _length(name: str, wanted: int | None) -> dict[str, Any]:
    """The pipeline's argument for the tokens of its T5; none where it has no T5."""
    most = _LONGEST if name in _DEFAULTS else _CLIP
    if wanted is not None and not 1 <= wanted <= most:
        raise ValueError(f"max_sequence_length is {wanted}, but must be 1 to {most}.")
    if name not in _DEFAULTS:
        return {}
    return {"max_sequence_length": wanted or _DEFAULTS[name]}


def _with_encoders(kind: Any, path: str | os.PathLike[str], dtype: torch.dtype) -> Any:
    """The pipeline without its denoiser and its VAE."""
    listed = read_json(Path(path) / MODEL_INDEX)
    absent = [name for name, entry in listed.items() if entry == [None, None]]
    parts = dict.fromkeys([denoiser_folder(path).name, "vae", *absent])
    with quiet_diffusers(), quiet_libraries():
        pipeline: Any = kind.from_pretrained(str(path), dtype=dtype, **parts)
    if hasattr(pipeline, "text_encoder_3") and pipeline.text_encoder_3 is None:
        config = read_json(denoiser_folder(path) / "config.json")  # to know how wide a T5's is
        pipeline.transformer = SimpleNamespace(config=SimpleNamespace(**config))
    return pipeline


def _check_lengths(pipeline: Any, prompts: Sequence[str], longest: int | None) -> None:
    t5 = {"Flux": "tokenizer_2", "StableDiffusion3": "tokenizer_3"}
    names = [part for start, part in t5.items() if type(pipeline).__name__.startswith(start)]
    tokenizers, limit = [getattr(pipeline, name) for name in names], _LONGEST
    if not names or tokenizers == [None]:  # then the CLIPs alone read the prompt
        tokenizers = [pipeline.tokenizer, pipeline.tokenizer_2]
        limit = min(t.model_max_length for t in tokenizers if t is not None)
        longest = min(longest or limit, limit)
    for prompt in prompts:
        counts = [len(t(prompt, verbose=False).input_ids) for t in tokenizers if t is not None]
        if max(counts) > cast(int, longest):
            shown = prompt if len(prompt) <= 80 else f"{prompt[:80]}…"
            advice = ", or raise max_sequence_length" if cast(int, longest) < limit else ""
            raise ValueError(
                f"the caption {shown!r} has {max(counts)} tokens, but the text encoders take "
                f"{longest}: shorten it{advice}."
            )


def free_memory() -> None:
    """Give back what was just deleted, on an accelerator too."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()

"""A LoRA on a denoiser, and its file as diffusers reads it.

- `add_denoiser_lora`: seeded LoRA weights, float32, by diffusers' `add_adapter`
- `save_lora`: the folder that `load_lora_weights` takes; equal adapters give equal bytes
"""

from __future__ import annotations

import os
from typing import Any, cast

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from transformers import set_seed

from emloc.adapters import PIPELINE_WEIGHTS as WEIGHTS
from emloc.adapters import save_with_header
from emloc.diffusion.pipelines import DENOISERS
from emloc.files import writing
from emloc.lora import check_lora_config
from emloc.settings import LoraSettings

__all__ = ["WEIGHTS", "add_denoiser_lora", "save_lora"]


def add_denoiser_lora(denoiser: ModelMixin, lora: LoraSettings, *, seed: int) -> list[str]:
    """Put a fresh LoRA in float32 on a denoiser, which is changed in place; only it will train.

    Args:
        denoiser: of an emulator or an original, without an adapter.
        lora: the adapter's shape.
        seed: of the LoRA's first weights.

    Returns:
        Names of the layers with a LoRA, in the denoiser's order.

    Raises:
        ValueError: see `check_lora_config`; or the settings ask for modules to save in full.
    """
    if lora.modules_to_save:
        raise ValueError(
            f"modules_to_save is {lora.modules_to_save}, but diffusers' LoRA files hold nothing "
            "but LoRA weights: leave it empty."
        )
    model: Any = denoiser
    config = lora.config(task_type=None)
    targets = check_lora_config(model, config)
    config.target_modules = targets
    model.requires_grad_(False)
    set_seed(seed)
    model.add_adapter(config)
    cast_training_params(model, dtype=torch.float32)
    return targets


def save_lora(
    denoiser: ModelMixin, pipeline: type[DiffusionPipeline], folder: str | os.PathLike[str]
) -> None:
    """Write the denoiser's LoRA by `save_lora_weights`, with its settings; the folder appears when
    done.

    Args:
        denoiser: with one LoRA.
        pipeline: class of the pipeline that it belongs to.
        folder: of the adapter; it will hold `pytorch_lora_weights.safetensors`.
    """
    part = DENOISERS[pipeline.__name__]
    layers = get_peft_model_state_dict(cast(PeftModel, denoiser), save_embedding_layers=False)
    metadata = _collate_lora_metadata({part: cast(Any, denoiser)})
    settings = next(iter(metadata.values()))
    settings |= {k: sorted(v) for k, v in settings.items() if isinstance(v, list | set)}
    with writing(folder) as partial:
        cast(Any, pipeline).save_lora_weights(
            partial, **{f"{part}_lora_layers": layers}, **metadata
        )
        with safe_open(partial / WEIGHTS, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
            header = dict(sorted(file.metadata().items()))
        save_with_header(tensors, partial / WEIGHTS, header)  # safetensors would order it randomly

"""An adapter on the original, or on a quantised copy of it, checked to fit.

A layer that the model has not, or has in another shape, is refused by name; peft alone would leave
out adapters for layers that are missing.
"""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from safetensors import safe_open
from torch import nn

from emloc.adapters import PREFIX, find_adapter
from emloc.offload import add_adapter


def plug(model: nn.Module, adapter: Path | str) -> PeftModel:
    """Put an adapter on a language or vision-language model, wherever its weights are.

    Args:
        model: the original or a quantised copy of it (GPTQ, AWQ, bitsandbytes), or an emulator.
        adapter: its folder.

    Raises:
        ValueError: there is no adapter, or it was made for another model.
    """
    _check_layers(model, adapter)
    return add_adapter(model, adapter)


def _check_layers(model: nn.Module, adapter: Path | str) -> None:
    modules = dict(model.named_modules())
    start, end_a, end_b = f"{PREFIX}.", ".lora_A.weight", ".lora_B.weight"
    with safe_open(find_adapter(adapter).file, framework="pt") as file:
        for key in file.keys():
            if not key.endswith((end_a, end_b)):
                continue
            name = key.removeprefix(start).removesuffix(end_a).removesuffix(end_b)
            if name not in modules:
                raise ValueError(
                    f"the adapter {adapter} has a LoRA for {name}, a layer that this "
                    f"{type(model).__name__} has not: name the model that it was made for, or a "
                    "quantised copy of it."
                )
            shape = file.get_slice(key).get_shape()
            side = "in_features" if key.endswith(end_a) else "out_features"
            size = shape[1] if key.endswith(end_a) else shape[0]
            mine = getattr(modules[name], side, size)
            if mine != size:
                raise ValueError(
                    f"the adapter {adapter} is for a layer {name} with {size} {side}, but this "
                    f"{type(model).__name__} has {mine}: name the model that it was made for, or "
                    "a quantised copy of it."
                )

"""Frozen weights in 4-bit NF4 under a LoRA in training (QLoRA), by bitsandbytes.

- `load_base`: the model to train a LoRA on, its weights as the training's settings want them
- `Nf4LowRankLinear`: a low-rank layer with both factors in NF4
- `bytes_spared`: what that is worth, for a plan

An emulator's config.json has one `quantization_config`, and that is ours. So bitsandbytes' own way
through transformers is closed, and the layers are replaced here while the weights are read, tensor
by tensor: what is quantised is never whole on the device. The checkpoint stays as it is.

Letters: o out features, i in features, k rank.
"""

from __future__ import annotations

import os
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from emloc.devices import pick_dtype
from emloc.lowrank import LowRankLinear
from emloc.memory import give_back_freed_memory
from emloc.models import load_model, open_model
from emloc.optimize import need_package
from emloc.settings import LoraSettings, TrainSettings
from emloc.weights import Location, OpenedModel, WeightStore

PACKAGE = "bitsandbytes"


class Nf4LowRankLinear(LowRankLinear):
    """A low-rank layer whose factors, once `weight` and `weight_in` are set, are `Params4bit`.

    To peft it is an `nn.Linear` like any other; inputs are multiplied in the dtype that the layer
    was made with.
    """

    def __init__(self, like: LowRankLinear, dtype: torch.dtype) -> None:
        super().__init__(
            like.in_features, like.out_features, like.rank, bias=False, device="meta", dtype=dtype
        )
        self.bias, self.compute_dtype = like.bias, dtype

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., i) to (..., o) in the input's dtype."""
        from bitsandbytes import matmul_4bit  # optional, and slow to import

        outer: Any = self.weight
        inner: Any = self.weight_in
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        hidden = matmul_4bit(input.to(self.compute_dtype), inner, quant_state=inner.quant_state)
        output = matmul_4bit(hidden, outer, quant_state=outer.quant_state, bias=bias)
        return output.to(input.dtype)


def load_base(
    path: os.PathLike[str] | str,
    *,
    lora: LoraSettings,
    settings: TrainSettings,
    device: torch.device | str,
    progress: bool = True,
) -> Any:
    """Load a model or a denoiser to train a LoRA on: an emulator, or an original itself.

    With `settings.quantization` "nf4" its linear layers are in NF4, blocks of 64 weights, with the
    statistics of the blocks quantised once more. The output head, embeddings, what the LoRA saves
    in full and what always stays in float32 are loaded as without it.

    Args:
        path: folder of the checkpoint.
        lora: the adapter's shape.
        settings: of the training; what is not quantised gets the dtype of its precision, in which
            is also multiplied.
        device: where to put the model.
        progress: show a bar over the layers to quantise.

    Raises:
        ValueError: the checkpoint cannot be loaded, bitsandbytes is not there, or it does not
            know the device.
    """
    path, dtype = Path(path), pick_dtype(settings.precision)
    if settings.quantization is None:
        return load_model(path, dtype=dtype, device=device)
    _check_available(settings.quantization, torch.device(device))
    give_back_freed_memory()
    opened = open_model(path, dtype=dtype)
    names = layers_to_quantize(opened.model, lora)
    for name in tqdm(names, desc=settings.quantization, unit="layer", disable=not progress):
        _quantize(opened, name, dtype, device)
    _load_rest(opened.model, opened.store, device)
    return opened.model


def _check_available(quantization: str, device: torch.device) -> None:
    need_package(PACKAGE, "quantization", quantization, otherwise="leave quantization empty")
    import bitsandbytes

    known = sorted(bitsandbytes.supported_torch_devices)
    if device.type not in known:
        raise ValueError(
            f"quantization is {quantization!r}, but {PACKAGE} does not compute on {device} (only "
            f"on {', '.join(known)}): take another device or leave quantization empty."
        )


def layers_to_quantize(model: Any, lora: LoraSettings) -> list[str]:
    """Names of the linear layers that may be quantised under a LoRA, in the model's order."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    in_float32 = set(getattr(model, "_keep_in_fp32_modules", None) or [])
    saved = tuple(lora.modules_to_save)
    names = []
    for name, module in model.named_modules():
        parts = name.split(".")
        parents = accumulate(parts, lambda above, part: f"{above}.{part}")
        whole = module is head or in_float32 & {*parts} or any(p.endswith(saved) for p in parents)
        if type(module) in (nn.Linear, LowRankLinear) and not whole:
            names.append(name)
    return names


def bytes_spared(model: Any, lora: LoraSettings) -> int:
    """Bytes that NF4 spares at the peak: 33 of 64 bytes stay of 64 weights, and to multiply, one
    layer's weight is whole.

    Args:
        model: as it would be loaded without, maybe on the meta device.
        lora: the adapter's shape.
    """
    layers = [model.get_submodule(name) for name in layers_to_quantize(model, lora)]
    weights = [layer._parameters.get(key) for layer in layers for key in ("weight", "weight_in")]
    whole = [weight for weight in weights if weight is not None]
    spared = sum(weight.nbytes - weight.numel() * 33 // 64 for weight in whole)
    return max(0, spared - max((weight.nbytes for weight in whole), default=0))


def _quantize(
    opened: OpenedModel, name: str, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Put an NF4 layer in the place of a linear layer; its bias stays on the meta device."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    old: Any = opened.model.get_submodule(name)
    new: Any
    if isinstance(old, LowRankLinear):
        new, keys = Nf4LowRankLinear(old, dtype), ["weight", "weight_in"]
    else:
        new = Linear4bit(
            old.in_features, old.out_features, bias=False, compute_dtype=dtype, device="meta"
        )
        # On a CPU it would repack its weights in evaluation, for a kernel without a gradient.
        new.support_avx512bf16_for_cpu = False
        new.bias, keys = old.bias, ["weight"]
    for key in keys:
        value = opened.store.read([f"{name}.{key}"], device)[f"{name}.{key}"]
        frozen: Any = Params4bit(value.to(dtype), quant_type="nf4")
        setattr(new, key, frozen.to(device))
    parent, _, child = name.rpartition(".")
    opened.model.get_submodule(parent).register_module(child, new)


def _load_rest(model: nn.Module, store: WeightStore, device: torch.device | str) -> None:
    """Load what is still on the meta device; weights that are tied are loaded once."""
    loaded: dict[Location, nn.Parameter] = {}
    for path, owner in model.named_modules():
        for key, parameter in owner._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            name = f"{path}.{key}" if path else key
            location = store.locations[name]
            if location not in loaded:
                value = store.read([name], device)[name]
                loaded[location] = nn.Parameter(value.to(parameter.dtype))
            owner._parameters[key] = loaded[location]
        for key, buffer in owner._buffers.items():
            owner._buffers[key] = None if buffer is None else buffer.to(device)
    vars(model).pop("hf_device_map", None)  # it still says "disk"

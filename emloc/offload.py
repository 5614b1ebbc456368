"""Models bigger than their device: what lies where, and LoRA on top of it.

accelerate computes on the device and brings weights there as a layer needs them, from the CPU's
memory or from the checkpoint's own files. For inference only.

- `spread_over`: how much of the memories a checkpoint may use, if it does not fit the device
- `device_of`: where a model computes, wherever its weights are
- `shares`: where its weights are
- `add_adapter`: LoRA on top, the weights staying where they are
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import nn

from emloc.checkpoint import weight_files
from emloc.devices import free_bytes

WEIGHTS_SHARE = 0.8  # of a memory; the rest is for what the model computes
_HOOKED = ("_hf_hook", "_old_forward", "forward")  # what accelerate sets on a module


def spread_over(
    path: Path, dtype: torch.dtype, device: torch.device, budget_bytes: int | None
) -> dict[int | str, int] | None:
    """Bytes of weights by memory, in accelerate's names, for a model that its device cannot hold.

    Args:
        path: folder of the checkpoint.
        dtype: of the model's parameters.
        device: where it computes.
        budget_bytes: what it may take there, with all that it computes; None for what is free.

    Returns:
        None if it fits. What fits neither the device nor the CPU's memory stays on the disk.

    Raises:
        ValueError: the budget is not positive.
    """
    if budget_bytes is not None and budget_bytes <= 0:
        raise ValueError(
            f"the memory budget is {budget_bytes} bytes, but must be a positive number, or null "
            "for what is free."
        )
    free = free_bytes(device)
    room = int(WEIGHTS_SHARE * (free if budget_bytes is None else min(budget_bytes, free)))
    if _weight_bytes(path, dtype) <= room:
        return None
    if device.type in ("cpu", "mps"):  # there is no other memory
        return {device.type: room}
    index = torch.accelerator.current_device_index() if device.index is None else device.index
    return {index: room, "cpu": int(WEIGHTS_SHARE * free_bytes(torch.device("cpu")))}


def _weight_bytes(path: Path, dtype: torch.dtype) -> int:
    """Size of a checkpoint's tensors in a dtype; quantised ones count as they are stored."""
    total = 0
    for file in weight_files(path, str(path)):
        with safe_open(path / file, framework="pt") as handle:
            for key in handle.keys():
                tensor = handle.get_tensor(key)
                size = dtype.itemsize if tensor.is_floating_point() else tensor.element_size()
                total += tensor.numel() * size
    return total


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its inputs; `model.device` fails to tell where weights are elsewhere."""
    device = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    known: Any = model
    return known.device if device is None else torch.device(device)


def shares(model: nn.Module) -> dict[str, float]:
    """Share of a model's weights, by bytes, in each memory: {"cuda:0": 0.6, "cpu": 0.4}."""
    places: dict[str, int | str | torch.device] = getattr(model, "hf_device_map", None) or {}
    sizes: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        paths = (".".join(parts[:end]) for end in range(len(parts), -1, -1))
        place = next((places[path] for path in paths if path in places), parameter.device)
        place = place if place == "disk" else str(torch.device(place))
        sizes[str(place)] += parameter.nbytes
    return {place: round(size / sizes.total(), 4) for place, size in sizes.items()}


def add_adapter(model: Any, adapter: Path | str) -> PeftModel:
    """Put a LoRA adapter on a loaded model, plain or spread over memories.

    peft by itself would take a spread model apart, and write the files on the disk anew.
    """
    with _as_if_whole(model):
        return PeftModel.from_pretrained(model, str(adapter))


@contextmanager
def _as_if_whole(model: nn.Module) -> Iterator[None]:
    """Hide for the length of a `with` block that weights are elsewhere.

    Stand-ins that take no memory are where peft, which puts LoRA beside a layer's weight, looks
    for that weight; copies of modules, which `modules_to_save` makes, are plain modules.
    """
    device = device_of(model)
    map_ = model.__dict__.pop("hf_device_map", None)
    modules = list(model.modules())
    hooks = [{key: m.__dict__.pop(key) for key in _HOOKED if key in m.__dict__} for m in modules]
    elsewhere = [
        {key: p for key, p in module._parameters.items() if p is not None and p.is_meta}
        for module in modules
    ]
    for module, parameters in zip(modules, elsewhere, strict=True):
        for key, parameter in parameters.items():
            stand_in = torch.empty((), dtype=parameter.dtype, device=device)
            stand_in = stand_in.expand(parameter.shape)
            module._parameters[key] = nn.Parameter(stand_in, requires_grad=False)
    try:
        yield
    finally:
        for module, parameters, hook in zip(modules, elsewhere, hooks, strict=True):
            module._parameters.update(parameters)
            module.__dict__.update(hook)
        if map_ is not None:
            model.hf_device_map = map_  # type: ignore[assignment]

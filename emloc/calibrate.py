"""Calibration: stream samples through the original, and turn what its linears see into factors.

`calibrate` is one pass over the original; it writes the ordered factors, unit by unit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from emloc.background import WorkBehind
from emloc.devices import free_bytes
from emloc.factor_work import FactorWriter
from emloc.factors import factors_bytes, full_float32
from emloc.files import write_json, writing
from emloc.moments import Moments, text_modules
from emloc.streaming import Stream
from emloc.weights import OpenedModel


def calibrate(
    opened: OpenedModel,
    batches: Sequence[Mapping[str, Any]],
    *,
    linears: Mapping[str, nn.Linear],
    max_ratio: float,
    out: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    fits: Callable[[int], bool] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Write the ordered factors of linears up to a ratio; every weight is read once.

    Peak memory: one unit and the next one being read, the moments of one, one hidden state a batch.
    Factors are computed on the device. An accelerator without room for that leaves it to the CPU,
    where the unit's weights and moments go while the next unit runs.

    Args:
        opened: the original.
        batches: keyword arguments of its forward, tensors also in mappings, with `attention_mask`
            (B, T) where rows are padded. With none the factors are those of the plain SVD.
        linears: the layers to factorize, from `targets.select`.
        max_ratio: largest ratio that an emulator can be cut at.
        out: folder to create; one safetensors file a unit, and factors.json.
        device: where to compute.
        dtype: of the factors on disk; the eigenvalues are float64.
        fits: whether the device has room for so many bytes of factor work; None to look.
        progress: show a progress bar over the units.

    Returns:
        What factors.json holds.

    Raises:
        ValueError: a layer never ran, ran twice in one forward, or saw values that are not finite;
            or the disk has no room for the factors.
    """
    stream = Stream(opened, device)
    by_unit: dict[str, list[str]] = {}
    for name in linears:
        by_unit.setdefault(stream.unit_of(name), []).append(name)
    on_device = [send_to_device(dict(batch), stream.device) for batch in batches]
    of_text = text_modules(opened.model)

    def mask(name: str) -> Tensor | None:
        seen = linears[name] in of_text
        return on_device[stream.current].get("attention_mask") if seen else None

    moments = Moments(linears, mask)
    label = "calibrate" if progress else None
    size = _factors_size(linears, max_ratio, dtype)
    with (
        writing(out, size=size) as folder,
        full_float32(),
        moments.hooked(),
        WorkBehind() as work,
    ):
        folder.mkdir()
        fits = fits or partial(_has_room, stream.device)
        writer = FactorWriter(folder, linears, by_unit, max_ratio, dtype, fits, work)
        if batches:
            on_unit = partial(writer.write, moments=moments)
            stream.run(on_device, on_unit=on_unit, until=set(by_unit), progress=label)
            moments.take(writer.missing)
        else:
            stream.visit(by_unit, writer.write, progress=label)
        index = {
            "modules": writer.finish(),
            "max_ratio": max_ratio,
            "dtype": str(dtype).removeprefix("torch."),
        }
        write_json(folder / "factors.json", index)
    return index


def _factors_size(linears: Mapping[str, nn.Linear], ratio: float, dtype: torch.dtype) -> int:
    """Bytes of all that calibrate writes."""
    return sum(
        factors_bytes(linear.out_features, linear.in_features, ratio, dtype.itemsize)
        for linear in linears.values()
    )


def _has_room(device: torch.device, needed_bytes: int) -> bool:
    """Whether factors are computed on the device itself; on a CPU they always are, and never on
    MPS, which has no float64."""
    if device.type in ("cpu", "mps"):
        return device.type == "cpu"
    return needed_bytes <= free_bytes(device)

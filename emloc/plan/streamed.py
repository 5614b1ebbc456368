"""Predicted peaks of the stages that hold a piece of a model at a time: calibrating, teaching and
correcting.

Letters: o out features, i in features, k rank, r LoRA rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from emloc.correct import correct_layer
from emloc.factors import (
    factorize_from_inputs,
    factorize_from_outputs,
    plain_factors,
    rank_for,
    root_of,
)
from emloc.plan.peak import Peak
from emloc.plan.tracking import bytes_of, tracked, without_data
from emloc.plan.work import Rows, Work
from emloc.streaming import find_units


def correct_peak(ranks: Mapping[str, int], model: nn.Module, r: int, device: torch.device) -> Peak:
    """Correcting the layer that takes most; `r` is the LoRA's rank."""
    shapes = {(*_shape(model, name), rank) for name, rank in ranks.items()}
    peaks = []
    for o, i, k in shapes:
        dtype = next(model.parameters()).dtype

        def correct(o: int = o, i: int = i, k: int = k, dtype: torch.dtype = dtype) -> None:
            make = _maker(dtype, device)
            weight, factors = make(o, i), (make(o, k), make(k, i))
            lora = _maker(torch.float32, device)
            with suppress(DataDependentOutputException):  # its last lines; all is there by then
                correct_layer(lora(r, i), lora(o, r), weight, factors, scaling=1.0, limit=3.0)

        loaded = (o * i + k * (o + i)) * dtype.itemsize
        peaks.append(Peak(loaded, activations=_run(correct, device) - loaded))
    return max(peaks, key=lambda peak: peak.total)


def calibrate_peak(
    model: Any,
    work: Work | None,
    *,
    batches: int,
    targets: Iterable[str],
    max_ratio: float,
    device: torch.device,
) -> Peak:
    """Streaming batches through a model, unit by unit, and factorizing the targets of each.

    Args:
        model: on the meta device; not to be used afterwards.
        work: the largest batch; None for the plain SVD.
        batches: how many.
        targets: names of the layers to factorize.
        max_ratio: up to which they are.
        device: where units are computed. On a CPU the next unit is read meanwhile.
    """
    units = find_units(model)
    sizes, ahead = _sizes(units, device)
    chosen = set(targets)
    inside = {
        name: [t for t in chosen if t == name or t.startswith(f"{name}.")]
        for name in units
        if _is_leaf(name, units)
    }
    sums = {n: sum(_sum_bytes(model, t) for t in _leaders(model, ts)) for n, ts in inside.items()}
    shapes = {_shape(model, name) for name in chosen}
    factorizing = {
        shape: _factorizing_bytes(*shape, max_ratio, device, moments=work is not None)
        for shape in shapes
    }
    last = max((place for place, name in enumerate(units) if inside.get(name)), default=0)
    shape_of = {name: [_shape(model, t) for t in ts] for name, ts in inside.items()}
    waiting = transient = 0
    if work is not None:
        waiting, transient = _between_units(model, work, units, device)
    peaks = []
    for place, name in enumerate(list(units)[: last + 1]):
        weights = sizes[place] + ahead[place]
        moments = sums.get(name, 0) if work is not None else 0
        solving = max((factorizing[shape] for shape in shape_of.get(name, [])), default=0)
        peaks.append(Peak(weights, 0, batches * waiting + transient, 0, moments))
        peaks.append(Peak(weights, 0, batches * waiting, 0, moments + solving))
    return max(peaks, key=lambda peak: peak.total)


def teach_peak(model: Any, work: Work, *, batches: int, device: torch.device) -> Peak:
    """Streaming a wave of batches through a whole model, and the logits of one of them.

    Args:
        model: on the meta device; not to be used afterwards.
        work: the largest batch.
        batches: of a wave.
        device: where units are computed. On a CPU the next unit is read meanwhile.
    """
    units = find_units(model)
    sizes, ahead = _sizes(units, device)
    weights = max(size + next_one for size, next_one in zip(sizes, ahead, strict=True))
    copies = 2 * model.dtype.itemsize + torch.float32.itemsize  # all, those taught, their softmax
    if model.dtype != torch.float32:
        copies += torch.float32.itemsize
    logits = 0
    if isinstance(work, Rows):
        logits = work.size * model.config.get_text_config().vocab_size * copies
    waiting, transient = _between_units(model, work, units, device)
    inside = Peak(weights, 0, batches * waiting + transient)
    at_the_end = Peak(sizes[-1], 0, batches * waiting, logits)
    return max(inside, at_the_end, key=lambda peak: peak.total)


def _sizes(units: Mapping[str, nn.Module], device: torch.device) -> tuple[list[int], list[int]]:
    """Bytes of each unit, and of what is read ahead while it is there."""
    sizes = [bytes_of(unit) if _is_leaf(name, units) else 0 for name, unit in units.items()]
    return sizes, [*sizes[1:], 0] if device.type == "cpu" else [0] * len(sizes)


def _is_leaf(name: str, units: Mapping[str, nn.Module]) -> bool:
    """Whether a unit has no others below it; one that has keeps a few parameters of its own."""
    prefix = f"{name}." if name else ""
    return not any(other != name and other.startswith(prefix) for other in units)


def _leaders(model: nn.Module, names: list[str]) -> list[str]:
    """One of those linears that sum the moments of one input: of a block's siblings of one width.

    Which linears share an input shows when they run. Siblings under one parent with one input
    width, none of which is narrower than its input, are taken for such.
    """
    kept: dict[tuple[str, int], str] = {}
    alone = []
    for name in names:
        o, i = _shape(model, name)
        if o < i:
            alone.append(name)
        else:
            kept.setdefault((name.rpartition(".")[0], i), name)
    return [*kept.values(), *alone]


def _shape(model: nn.Module, name: str) -> tuple[int, int]:
    linear = model.get_submodule(name)
    return int(linear.out_features), int(linear.in_features)  # type: ignore[arg-type]


def _sum_bytes(model: nn.Module, name: str) -> int:
    return 4 * min(_shape(model, name)) ** 2  # float32


def _factorizing_bytes(
    o: int, i: int, max_ratio: float, device: torch.device, *, moments: bool
) -> int:
    """Beyond weight and moment, of the largest layer."""
    rank = rank_for(max_ratio, o, i)

    def factorize() -> None:
        weight = _maker(torch.bfloat16, device)(o, i)
        side = min(o, i)
        moment = _maker(torch.float32, device)(side, side)
        if not moments:
            plain_factors(weight, rank)
        elif o < i:
            factorize_from_outputs(weight, moment, rank)
        else:
            factorize_from_inputs(weight, root_of(moment), rank)

    inputs = 2 * o * i + 4 * min(o, i) ** 2
    return max(0, _run(factorize, device) - inputs)


def _between_units(
    model: Any, work: Work, units: Mapping[str, nn.Module], device: torch.device
) -> tuple[int, int]:
    """Bytes that a batch keeps between two units, and bytes that it takes beyond them inside one,
    the most of each."""
    kept: list[int] = [0]
    with without_data(model, device), tracked(model, device) as tracker, torch.no_grad():
        handles = [
            unit.register_forward_pre_hook(lambda *_: kept.append(tracker.live_bytes))
            for unit in units.values()
        ]
        work.run(model)
        for handle in handles:
            handle.remove()
    return max(kept), max(0, tracker.peak_bytes - max(kept))


def _maker(dtype: torch.dtype, device: torch.device) -> Callable[[int, int], torch.Tensor]:
    return lambda rows, columns: torch.empty(rows, columns, dtype=dtype, device=device)


def _run(function: Callable[[], None], device: torch.device) -> int:
    """Peak bytes of a function that makes its own tensors, run without data."""
    with without_data(nn.Module(), device), tracked(nn.Module(), device) as tracker:
        function()
    return tracker.peak_bytes

"""Calibration: stream samples through the original, and turn what its linears see into factors.

- `Moments`: Σ x xᵀ or Σ y yᵀ of each linear, padding left out, one sum for linears with one input
- `calibrate`: one pass over the original; writes the ordered factors, unit by unit

Letters: o out features, i in features, k rank, n tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from emloc.factors import (
    Factors,
    factorize_from_inputs,
    factorize_from_outputs,
    full_float32,
    plain_factors,
    rank_for,
    root_of,
)
from emloc.files import write_json, writing
from emloc.streaming import Stream
from emloc.weights import OpenedModel


@dataclass
class _Moment:
    """A running second moment, and how many tokens are in it."""

    total: Tensor
    of_inputs: bool
    tokens: int = 0


class Moments:
    """Second moments of linears, accumulated in float32 by hooks while a model runs.

    A linear with o ≥ i sums C = Σ x xᵀ (i×i); later linears with that very input (q, k and v; gate
    and up) share the sum, whatever their shape. Another linear with o < i sums Σ y yᵀ (o×o), which
    is its own, with y = Wx computed anew in float32 without the bias, since the module's own output
    is rounded.

    Args:
        linears: name → module.
        mask: gives the running batch's attention mask (B, T) for a linear, by its name, or None
            when none of its tokens is padding.
    """

    def __init__(
        self, linears: Mapping[str, nn.Linear], mask: Callable[[str], Tensor | None]
    ) -> None:
        self._linears, self._mask = linears, mask
        self._moments: dict[str, _Moment] = {}
        self._leader: dict[str, str] = {}  # linear → the linear whose sum it shares
        self._live: dict[tuple[Any, ...], tuple[weakref.ref[Tensor], str]] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Observe the linears for the length of a `with` block."""
        handles = [
            linear.register_forward_pre_hook(self._observe(name), with_kwargs=True)
            for name, linear in self._linears.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self, names: Sequence[str]) -> dict[str, tuple[str, _Moment]]:
        """Hand over the sums of some linears as name → (name of the sum, sum), and forget them.

        Raises:
            ValueError: a linear never ran, or saw a value that is not finite.
        """
        taken = {}
        for name in names:
            if name not in self._leader:
                raise ValueError(
                    f"{name} was not used by any calibration sample, so there is nothing to "
                    "compress it by: leave it out of the targets or add samples that use it."
                )
            leader = self._leader[name]
            taken[name] = (leader, self._moments[leader])
        for leader in dict.fromkeys(leader for leader, _ in taken.values()):
            if not self._moments.pop(leader).total.isfinite().all():
                raise ValueError(
                    f"the activations into {leader} are not finite (NaN or infinite): check the "
                    "checkpoint, and use bfloat16 or float32 instead of float16."
                )
        # A later unit with the same input (a prompt that all blocks attend to) starts a new sum.
        gone = {leader for leader, _ in taken.values()}
        self._live = {key: entry for key, entry in self._live.items() if entry[1] not in gone}
        return taken

    def _observe(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = args[0] if args else kwargs["input"]
            key = (x.data_ptr(), x.shape, x.stride(), x.dtype, x._version)
            reference, leader = self._live.get(key, (None, name))
            if reference is None or reference() is None:
                leader = name
                self._live = {k: v for k, v in self._live.items() if v[0]() is not None}
                if _sums_inputs(self._linears[name]):
                    self._live[key] = (weakref.ref(x), name)
                self._add(name, x)
            if self._leader.setdefault(name, leader) != leader:
                raise ValueError(
                    f"{name} shares its input with another layer in some samples only, so its "
                    "statistics would be incomplete: leave it out of the targets."
                )

        return hook

    def _add(self, name: str, x: Tensor) -> None:
        mask = self._mask(name)
        if mask is not None and x.ndim == 3 and x.shape[:2] == mask.shape:
            x = x[mask.bool()]
        elif mask is not None and x.ndim == 2 and x.shape[0] == mask.numel():  # (B·T, i)
            x = x[mask.bool().flatten()]
        x = x.reshape(-1, x.shape[-1]).float()  # (n, i)
        weight = self._linears[name].weight
        of_inputs = _sums_inputs(self._linears[name])
        if not of_inputs:
            x = x @ weight.float().T  # (n, o)
        if name not in self._moments:
            self._moments[name] = _Moment(x.new_zeros(x.shape[1], x.shape[1]), of_inputs)
        self._moments[name].total.addmm_(x.T, x)
        self._moments[name].tokens += x.shape[0]


def _sums_inputs(linear: nn.Linear) -> bool:
    """Whether a linear sums Σ x xᵀ, because its input is not wider than its output."""
    return linear.weight.shape[0] >= linear.weight.shape[1]


def calibrate(
    opened: OpenedModel,
    batches: Sequence[Mapping[str, Any]],
    *,
    linears: Mapping[str, nn.Linear],
    max_ratio: float,
    out: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    progress: bool = False,
) -> dict[str, Any]:
    """Write the ordered factors of linears up to a ratio; every weight is read once.

    Peak memory: one unit, its moments, one hidden state a batch. The moments stay in memory.

    Args:
        opened: the original.
        batches: keyword arguments of its forward, tensors also in mappings, with `attention_mask`
            (B, T) where rows are padded. With none the factors are those of the plain SVD.
        linears: the layers to factorize, from `targets.select`.
        max_ratio: largest ratio that an emulator can be cut at.
        out: folder to create; one safetensors file a unit, and factors.json.
        device: where to compute.
        dtype: of the factors on disk; the eigenvalues are float64.
        progress: show a progress bar over the units.

    Returns:
        What factors.json holds.

    Raises:
        ValueError: a layer never ran, ran twice in one forward, or saw values that are not finite.
    """
    stream = Stream(opened, device)
    by_unit: dict[str, list[str]] = {}
    for name in linears:
        by_unit.setdefault(stream.unit_of(name), []).append(name)
    on_device = [_to(dict(batch), stream.device) for batch in batches]
    of_text = _text_modules(opened.model)

    def mask(name: str) -> Tensor | None:
        seen = linears[name] in of_text
        return on_device[stream.current].get("attention_mask") if seen else None

    moments = Moments(linears, mask)
    label = "calibrate" if progress else None
    with writing(out) as folder, full_float32(), moments.hooked():
        folder.mkdir()
        writer = _FactorWriter(folder, linears, by_unit, max_ratio, dtype)
        if batches:
            on_unit = partial(writer.write, moments=moments)
            stream.run(on_device, on_unit=on_unit, until=set(by_unit), progress=label)
            moments.take([name for name in linears if name not in writer.modules])
        else:
            stream.visit(by_unit, writer.write, progress=label)
        index = {
            "modules": [{"name": name, **entry} for name, entry in writer.modules.items()],
            "max_ratio": max_ratio,
            "dtype": str(dtype).removeprefix("torch."),
        }
        write_json(folder / "factors.json", index)
    return index


@dataclass
class _FactorWriter:
    """Factorizes the linears of one unit after the other and writes a file for each unit."""

    folder: Path
    linears: Mapping[str, nn.Linear]
    by_unit: Mapping[str, Sequence[str]]
    max_ratio: float
    dtype: torch.dtype
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)

    def write(self, unit: str, _: nn.Module, moments: Moments | None = None) -> None:
        names = self.by_unit.get(unit, [])
        if any(name in self.modules for name in names):
            raise ValueError(
                f"{unit} runs more than once in one forward pass, which streaming does not "
                "support: leave it out of the targets."
            )
        if not names:
            return
        for name in names:
            if not self.linears[name].weight.isfinite().all():
                raise ValueError(
                    f"the weights of {name} are not finite (NaN or infinite): the checkpoint is "
                    "damaged; download it again."
                )
        sums = moments.take(names) if moments else {}
        file = f"{list(self.by_unit).index(unit):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name, factors in self._factorize(names, sums):
            tensors |= {
                f"{name}.out": factors.out.to(self.dtype).cpu(),
                f"{name}.in": factors.in_.to(self.dtype).cpu(),
                f"{name}.eigenvalues": factors.eigenvalues.cpu(),
            }
            self.modules[name] = {
                "file": file,
                "out_features": self.linears[name].out_features,
                "in_features": self.linears[name].in_features,
                "rank": factors.out.shape[0],
                "tokens": sums[name][1].tokens if sums else 0,
            }
            del factors  # float64: not to be kept while the next ones are computed
        save_file(tensors, self.folder / file)

    def _factorize(
        self, names: Sequence[str], sums: Mapping[str, tuple[str, _Moment]]
    ) -> Iterator[tuple[str, Factors]]:
        """Factors of each linear; those that share a C are neighbours, its root computed once."""
        root, root_of_leader = None, None
        for name in sorted(names, key=lambda name: sums[name][0] if sums else name):
            weight = self.linears[name].weight
            rank = rank_for(self.max_ratio, *weight.shape)
            if name not in sums:
                yield name, plain_factors(weight, rank)
                continue
            leader, moment = sums[name]
            if not moment.of_inputs:
                yield name, factorize_from_outputs(weight, moment.total, rank)
                continue
            if root is None or leader != root_of_leader:
                root = None  # frees the last one before the next is computed
                root, root_of_leader = root_of(moment.total), leader
            yield name, factorize_from_inputs(weight, root, rank)


def _text_modules(model: nn.Module) -> set[nn.Module]:
    """The modules that see a row's tokens; those of a vision tower see a picture's patches."""
    if not isinstance(model, PreTrainedModel):
        return set(model.modules())
    return {*model.get_decoder().modules(), model.get_output_embeddings()}


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Mapping):
        return {key: _to(inner, device) for key, inner in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value

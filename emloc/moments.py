"""Second moments of what a model's linears see: Σ x xᵀ or Σ y yᵀ, padding left out, one sum for
linears with one input.

- `Moments`: the sums
- `text_modules`, `unpadded`: which activations have padding, and the same without it

Letters: o out features, i in features, n tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass
class Moment:
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
        self._moments: dict[str, Moment] = {}
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

    def take(self, names: Sequence[str]) -> dict[str, tuple[str, Moment]]:
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
        x = unpadded(x, self._mask(name)).float()  # (n, i)
        weight = self._linears[name].weight
        of_inputs = _sums_inputs(self._linears[name])
        if not of_inputs:
            x = x @ weight.float().T  # (n, o)
        if name not in self._moments:
            self._moments[name] = Moment(x.new_zeros(x.shape[1], x.shape[1]), of_inputs)
        self._moments[name].total.addmm_(x.T, x)
        self._moments[name].tokens += x.shape[0]


def _sums_inputs(linear: nn.Linear) -> bool:
    """Whether a linear sums Σ x xᵀ, because its input is not wider than its output."""
    return linear.weight.shape[0] >= linear.weight.shape[1]


def text_modules(model: nn.Module) -> set[nn.Module]:
    """The modules that see a row's tokens; those of a vision tower see a picture's patches."""
    if not isinstance(model, PreTrainedModel):
        return set(model.modules())
    return {*model.get_decoder().modules(), model.get_output_embeddings()}


def unpadded(x: Tensor, mask: Tensor | None) -> Tensor:
    """Activations (B, T, i) or (B·T, i) as (n, i), without tokens that are 0 in a mask (B, T).

    Without a mask, and in any other shape, they all stay.
    """
    if mask is not None and x.ndim == 3 and x.shape[:2] == mask.shape:
        return x[mask.bool()]
    if mask is not None and x.ndim == 2 and x.shape[0] == mask.numel():
        return x[mask.bool().flatten()]
    return x.reshape(-1, x.shape[-1])

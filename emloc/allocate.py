"""Ranks of all layers under one budget of parameters, where they lower the predicted loss most.

- `allocate`: the rank of each layer
- `relative_weights`: weights that count each layer's error relative to its own output
- `weighted_loss`: what such ranks are chosen by

One more rank of a layer takes o + i parameters and lowers its squared error over the calibration
tokens by its next eigenvalue. Eigenvalues fall, so taking the largest gain for each parameter first
is optimal for what it spends.

Letters: o out features, i in features, k rank, λ_j eigenvalue j (falling).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from emloc.emulator import plan_ranks
from emloc.factor_files import FactorFiles

FLOOR = 0.25
"""Share of its uniform rank that each layer keeps. Eigenvalues know nothing but the calibration
tokens, and weights hold for small errors only: what looks empty there may count on other rows."""


@dataclass(frozen=True)
class _Layer:
    """A layer's ranks (uniform, least, most), parameters of one rank, and weighted gains w·λ_j."""

    uniform: int
    floor: int
    cap: int
    cost: int
    gains: Tensor


def allocate(
    factors: FactorFiles, ratios: Mapping[str, float], weights: Mapping[str, float] | None = None
) -> dict[str, int]:
    """The ranks with the least Σ_l w_l Σ_{j≥k_l} λ_{l,j} under the parameters of a uniform plan.

    The budget is Σ_l rank_for(ratio_l)·(o_l + i_l). What is left of it in the end is less than one
    rank of any layer that may still grow; the sum above is the least possible but for at most the
    gain of one rank that did not fit, and never more than the uniform plan's. Each layer keeps
    `FLOOR` of its uniform rank at least, and gets at most the largest rank that was calibrated.
    Of equal gains, those of layers that lie lower in proportion to their uniform rank come first.

    Args:
        factors: what calibrate wrote.
        ratios: layer name → ratio of the uniform plan, from `targets.ratios_for`.
        weights: layer name → w; None takes `relative_weights`.

    Returns:
        Layer name → rank, in the order of `ratios`.

    Raises:
        ValueError: a ratio is not in (0, 1) or above the calibration's largest one, or a weight is
            missing, negative or not finite.
    """
    if not ratios:
        return {}
    layers = _layers(factors, ratios, relative_weights(factors) if weights is None else weights)
    uniform = {name: layer.uniform for name, layer in layers.items()}
    ranks = dict(zip(layers, _grown(list(layers.values())), strict=True))
    return min(ranks, uniform, key=lambda plan: _loss(layers, plan))


def relative_weights(factors: FactorFiles) -> dict[str, float]:
    """Layer name → 1 / Σ_j λ_j; 0 for a layer whose outputs are all zero."""
    sums = {name: float(factors.eigenvalues(name).sum()) for name in factors.modules}
    return {name: 1.0 / total if total > 0 else 0.0 for name, total in sums.items()}


def weighted_loss(
    factors: FactorFiles, ranks: Mapping[str, int], weights: Mapping[str, float]
) -> float:
    """Σ_l w_l Σ_{j≥k_l} λ_{l,j} of layers with ranks k."""
    return math.fsum(
        weights[name] * float(factors.eigenvalues(name)[rank:].sum())
        for name, rank in ranks.items()
    )


def _layers(
    factors: FactorFiles, ratios: Mapping[str, float], weights: Mapping[str, float]
) -> dict[str, _Layer]:
    layers = {}
    for plan in plan_ranks(factors, ratios):
        weight = weights.get(plan.name)
        if weight is None or not 0 <= weight < math.inf:
            raise ValueError(
                f"the weight of {plan.name} is {weight}, but must be a number of at least 0: give "
                "each layer to cut one."
            )
        floor, cap = max(1, math.ceil(FLOOR * plan.rank)), factors.modules[plan.name]["rank"]
        gains = weight * factors.eigenvalues(plan.name)
        cost = plan.out_features + plan.in_features
        layers[plan.name] = _Layer(plan.rank, floor, cap, cost, gains)
    return layers


def _loss(layers: Mapping[str, _Layer], ranks: Mapping[str, int]) -> float:
    return math.fsum(float(layer.gains[ranks[name] :].sum()) for name, layer in layers.items())


def _grown(layers: list[_Layer]) -> list[int]:
    """The rank of each layer, grown from its floor by the largest gains for each parameter."""
    counts = torch.tensor([layer.cap - layer.floor for layer in layers])
    owner = torch.arange(len(layers)).repeat_interleave(counts)  # of each rank to be had
    costs = torch.tensor([layer.cost for layer in layers])
    gains = torch.cat([layer.gains[layer.floor : layer.cap] for layer in layers])
    heights = torch.cat(
        [torch.arange(layer.floor, layer.cap).double() / layer.uniform for layer in layers]
    )
    order = heights.argsort(stable=True)
    density = gains / costs[owner]
    order = order[density[order].argsort(descending=True, stable=True)]
    left = sum(layer.cost * (layer.uniform - layer.floor) for layer in layers)
    ranks = torch.tensor([layer.floor for layer in layers])
    while len(order):
        spent = costs[owner[order]].cumsum(0)
        taken = int((spent <= left).sum())
        ranks += owner[order[:taken]].bincount(minlength=len(layers))
        left -= int(spent[taken - 1]) if taken else 0
        order = order[taken:]
        # A layer whose rank does not fit now never will: its ranks cost the same, and less is left.
        order = order[costs[owner[order]] <= left]
    return ranks.tolist()

"""From the moments of one unit after the other to files of ordered factors.

- `FactorWriter`: computes them where there is room, on the device or on the CPU beside it
- `workspace_bytes`: how much room that takes

Letters: o out features, i in features, k rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from emloc.background import WorkBehind
from emloc.factors import (
    Factors,
    factorize_from_inputs,
    factorize_from_outputs,
    plain_factors,
    rank_for,
    root_of,
)
from emloc.moments import Moment, Moments

Sums = Mapping[str, tuple[str, Moment]]  # linear → (name of its sum, sum)


def workspace_bytes(weight: Tensor, moment: Moment | None) -> int:
    """Memory to compute a weight's factors in, beside the weight and its moment: room enough.

    It is 1.7 to 4.7 times what was measured on a CPU; an accelerator's eigensolvers take more.
    """
    out_features, in_features = weight.shape
    of_inputs = out_features > in_features if moment is None else moment.of_inputs
    side = in_features if of_inputs else out_features  # of what is decomposed
    return torch.float64.itemsize * (8 * side**2 + 4 * out_features * in_features)


@dataclass
class FactorWriter:
    """Factorizes the linears of one unit after the other and writes a file for each unit.

    Attributes:
        folder: where to.
        linears: name → module, all of them.
        by_unit: unit → names of its linears; a unit's place names its file.
        max_ratio: largest ratio that an emulator can be cut at.
        dtype: of the factors in the files.
        fits: whether the device has room for so many bytes of workspace. Where not, weights and
            moments go to the CPU, and `work` does it there while the next unit runs.
        work: holds one unit's weights and moments at most.
    """

    folder: Path
    linears: Mapping[str, nn.Linear]
    by_unit: Mapping[str, Sequence[str]]
    max_ratio: float
    dtype: torch.dtype
    fits: Callable[[int], bool]
    work: WorkBehind
    _entries: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    @property
    def missing(self) -> list[str]:
        """The linears of units that did not come."""
        return [n for unit in self.by_unit if unit not in self._entries for n in self.by_unit[unit]]

    def finish(self) -> list[dict[str, Any]]:
        """Wait for the last unit; what was written, an entry a linear, in the order of the pass."""
        self.work.wait()
        units = self._entries.values()
        return [{"name": name, **entry} for unit in units for name, entry in unit.items()]

    def write(self, unit: str, _: nn.Module, moments: Moments | None = None) -> None:
        """Factorize a unit's linears while its weights are loaded; without moments by plain SVD."""
        names = self.by_unit.get(unit, [])
        if not names:
            return
        if unit in self._entries:
            raise ValueError(
                f"{unit} runs more than once in one forward pass, which streaming does not "
                "support: leave it out of the targets."
            )
        weights = {name: self.linears[name].weight.detach() for name in names}
        for name, weight in weights.items():
            if not weight.isfinite().all():
                raise ValueError(
                    f"the weights of {name} are not finite (NaN or infinite): the checkpoint is "
                    "damaged; download it again."
                )
        sums = moments.take(names) if moments else {}
        self._entries[unit] = {}
        room = max(
            workspace_bytes(weight, sums[name][1] if sums else None)
            for name, weight in weights.items()
        )
        if self.fits(room):
            self._save(unit, weights, sums)
            return
        self.work.wait()  # before this unit takes memory of the CPU
        self.work.submit(partial(self._save, unit, *_on_cpu(weights, sums)))

    def _save(self, unit: str, weights: Mapping[str, Tensor], sums: Sums) -> None:
        file = f"{list(self.by_unit).index(unit):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name, factors in self._factorize(weights, sums):
            tensors |= {
                f"{name}.out": factors.out.to(self.dtype).cpu(),
                f"{name}.in": factors.in_.to(self.dtype).cpu(),
                f"{name}.eigenvalues": factors.eigenvalues.cpu(),
            }
            self._entries[unit][name] = {
                "file": file,
                "out_features": weights[name].shape[0],
                "in_features": weights[name].shape[1],
                "rank": factors.out.shape[0],
                "tokens": sums[name][1].tokens if sums else 0,
            }
            del factors  # float64: not to be kept while the next ones are computed
        save_file(tensors, self.folder / file)

    def _factorize(
        self, weights: Mapping[str, Tensor], sums: Sums
    ) -> Iterator[tuple[str, Factors]]:
        """Factors of each linear; those that share a C are neighbours, its root computed once."""
        root, root_of_leader = None, None
        for name in sorted(weights, key=lambda name: sums[name][0] if sums else name):
            weight = weights[name]
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


def _on_cpu(weights: Mapping[str, Tensor], sums: Sums) -> tuple[dict[str, Tensor], Sums]:
    """Weights and sums in the CPU's memory, a shared sum once."""
    moments = dict(sums.values())
    moved = {leader: replace(one, total=one.total.cpu()) for leader, one in moments.items()}
    return (
        {name: weight.cpu() for name, weight in weights.items()},
        {name: (leader, moved[leader]) for name, (leader, _) in sums.items()},
    )

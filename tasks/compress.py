"""Cut the emulator of one ratio from the factors."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from emloc.allocate import allocate, relative_weights, weighted_loss
from emloc.devices import pick_dtype
from emloc.emulator import LayerPlan, cut, plan_ranks, table
from emloc.factor_files import FactorFiles
from emloc.files import write_json
from emloc.models import load_model, open_model
from emloc.sensitivity import sensitivities
from emloc.targets import ratios_for, swept
from tasks import layout
from tasks.encoding import codec_of, encode
from tasks.original import find_original
from tasks.params import Params
from tasks.stage import costing, main_with_ratio
from tasks.tables import write_csv


def run(params: Params, ratio: float) -> None:
    """Write the emulator, its sizes, and rank, size and predicted loss of each layer."""
    path, pointer = find_original(params)
    folder = layout.results(ratio)
    with costing(folder / "compress.cost.json", params) as device:
        factors = FactorFiles(layout.FACTORS)
        targets = params.compress.targets
        ratios = ratios_for(factors.modules, targets, ratio, where="compress.targets")
        opened = open_model(path, dtype=pick_dtype(params.model.dtype))
        write = partial(cut, path, opened, factors, base_name=pointer["name"], progress=True)
        plan, told = plan_ranks(factors, ratios), None
        weights = _weights(params, factors, plan, write, device)
        if weights is not None:
            shared = swept(factors.modules, targets, where="compress.targets")
            ranks = allocate(factors, {name: ratios[name] for name in shared}, weights)
            told = _Told(factors, plan, ranks, weights)
            plan = plan_ranks(factors, ratios, ranks=ranks)
        sizes = write(plan, out=layout.emulator(ratio))
    layers = sizes.pop("layers")
    if told is not None:
        layers, sizes = told.beside(layers), sizes | told.losses
    write_csv(folder / "layers.csv", list(layers[0]), layers)
    write_json(folder / "compress.json", sizes)
    print(table(plan))
    if told is not None:
        before, after = told.losses.values()
        print(f"weighted loss: {after:.4g}; with uniform ranks {before:.4g}")
    print(
        f"emulator: {sizes['emulator_bytes'] / 2**20:.0f} MiB of the original's "
        f"{sizes['original_bytes'] / 2**20:.0f} MiB in {layout.emulator(ratio)}"
    )


class _Told:
    """What an allocation is told to have gained over the uniform plan."""

    def __init__(
        self,
        factors: FactorFiles,
        uniform: Sequence[LayerPlan],
        ranks: Mapping[str, int],
        weights: Mapping[str, float],
    ) -> None:
        self._uniform, self._weights = {layer.name: layer for layer in uniform}, weights
        before = {layer.name: layer.rank for layer in uniform}
        self.losses = {
            "weighted_loss_uniform": weighted_loss(factors, before, weights),
            "weighted_loss": weighted_loss(factors, {**before, **ranks}, weights),
        }

    def beside(self, layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Rows of layers.csv, each with its layer's weight and what a uniform plan would keep."""
        rows = []
        for row in layers:
            uniform = self._uniform[row["name"]]
            told = {"uniform_rank": uniform.rank, "uniform_loss": uniform.loss}
            rows.append({**row, **told, "weight": self._weights[row["name"]]})
        return rows


def _weights(
    params: Params,
    factors: FactorFiles,
    plan: Sequence[LayerPlan],
    write: Callable[..., Any],
    device: torch.device,
) -> dict[str, float] | None:
    """How much each layer's squared error counts; None leaves all ranks uniform.

    For the sensitivity a uniform emulator is cut beside the others and removed again.
    """
    if params.compress.allocation == "uniform":
        return None
    if params.compress.allocation == "relative":
        return relative_weights(factors)
    with tempfile.TemporaryDirectory(prefix=".uniform-", dir=layout.ARTIFACTS) as folder:
        emulator = Path(folder) / "emulator"
        write(plan, out=emulator)
        codec = codec_of(emulator, params)
        return sensitivities(
            load_model(emulator, dtype=pick_dtype(params.model.dtype), device=device),
            encode("calibration", codec, params),
            codec=codec,
            names=[layer.name for layer in plan],
            batch_size=params.compress.batch_size,
            progress=True,
        )


if __name__ == "__main__":
    main_with_ratio(run)

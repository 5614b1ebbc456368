"""Correct the raw adapter of one ratio for what its emulator lost."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from emloc.correct import LayerCorrection, bases_of, correct_adapter, keep_adapter
from emloc.devices import pick_dtype
from emloc.files import write_json, writing
from emloc.models import open_model
from emloc.projections import project
from tasks import layout
from tasks.original import find_original
from tasks.params import Params
from tasks.samples import calibration_inputs
from tasks.scoring import validation_loss
from tasks.sections import Correct
from tasks.stage import costing, main_with_ratio
from tasks.tables import write_csv


@dataclass(frozen=True)
class Candidate:
    """A way to correct: none, paper or weighted, with its λ."""

    method: str
    limit: float | None = None

    @property
    def name(self) -> str:
        """Such as "weighted 3"."""
        return "none" if self.method == "none" else f"{self.method} {self.limit or 'unlimited'}"


def run(params: Params, ratio: float) -> None:
    """Write the corrected adapter beside the raw one; of several candidates, the one with which the
    original has the least loss on the validation rows."""
    folder = layout.results(ratio)
    candidates = candidates_of(params.correct)
    losses: dict[str, float] = {}
    chosen = candidates[0]
    with (
        costing(folder / "correct.cost.json", params, "correct", ratio) as device,
        tempfile.TemporaryDirectory(prefix=".candidates-", dir=layout.ARTIFACTS) as made,
    ):
        places = {one: Path(made) / one.name for one in candidates}
        layers = _correct(params, ratio, places, device)
        if len(candidates) > 1:
            for one in candidates:
                losses[one.name] = validation_loss(params, places[one], one.name, device)
            chosen = min(candidates, key=lambda one: losses[one.name])  # of equals the first
        with writing(layout.adapter(ratio, "corrected")) as out:
            shutil.copytree(places[chosen], out)
    rows = layers[chosen]
    columns = [column.name for column in fields(LayerCorrection)]
    write_csv(folder / "correct.csv", columns, (asdict(layer) for layer in rows))
    write_json(
        folder / "correct.json",
        {
            "mean_size": mean(layer.size for layer in rows) if rows else 0.0,
            "clamped": mean(layer.clamped for layer in rows) if rows else 0.0,
            "method": chosen.method,
            "limit": chosen.limit,
            "validation_losses": losses,
        },
    )
    print(f"corrected: {chosen.name}")
    for name, loss in losses.items():
        print(f"  loss of the original with {name}: {loss:.4f}")


def candidates_of(settings: Correct) -> list[Candidate]:
    """What to choose from, the least correction first."""
    if settings.method == "none":
        return [Candidate("none")]
    if settings.method != "auto":
        return [Candidate(settings.method, settings.limit)]
    ways = [Candidate(way, limit) for way in ("paper", "weighted") for limit in settings.limits]
    return [Candidate("none"), *ways]


def _correct(
    params: Params, ratio: float, places: dict[Candidate, Path], device: torch.device
) -> dict[Candidate, list[LayerCorrection]]:
    """Write the adapters of all candidates."""
    path, _ = find_original(params)
    raw, dtype = layout.adapter(ratio, "raw"), pick_dtype(params.model.dtype)
    emulator = partial(open_model, layout.healed(ratio), dtype=dtype)
    projected: dict[str, Tensor] | None = None
    if any(one.method == "weighted" for one in places):
        projected = project(
            open_model(path, dtype=dtype),
            calibration_inputs(path, params),
            bases_of(raw, emulator()),
            device=device,
            progress=True,
        )
    layers: dict[Candidate, list[LayerCorrection]] = {}
    for one, place in places.items():
        if one.method == "none":
            keep_adapter(raw, place)
            layers[one] = []
            continue
        layers[one] = correct_adapter(
            raw,
            open_model(path, dtype=dtype),
            emulator(),
            limit=one.limit,
            projected=projected if one.method == "weighted" else None,
            damping=params.correct.damping,
            out=place,
            device=device,
            progress=True,
        )
    return layers


if __name__ == "__main__":
    main_with_ratio(run)

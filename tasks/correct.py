"""Correct the raw adapter of one ratio for what its emulator lost."""

from __future__ import annotations

from dataclasses import asdict, fields
from statistics import mean

from emloc.correct import LayerCorrection, correct_adapter
from emloc.devices import pick_dtype
from emloc.files import write_json
from emloc.models import open_model
from tasks import layout
from tasks.original import find_original
from tasks.params import Params
from tasks.stage import costing, main_with_ratio
from tasks.tables import write_csv


def run(params: Params, ratio: float) -> None:
    """Write the corrected adapter beside the raw one, layer by layer."""
    path, _ = find_original(params)
    dtype = pick_dtype(params.model.dtype)
    folder = layout.results(ratio)
    with costing(folder / "correct.cost.json", params, "correct", ratio) as device:
        layers = correct_adapter(
            layout.adapter(ratio, "raw"),
            open_model(path, dtype=dtype),
            open_model(layout.healed(ratio), dtype=dtype),
            limit=params.correct.limit,
            out=layout.adapter(ratio, "corrected"),
            device=device,
            progress=True,
        )
    columns = [column.name for column in fields(LayerCorrection)]
    write_csv(folder / "correct.csv", columns, (asdict(layer) for layer in layers))
    write_json(
        folder / "correct.json",
        {
            "mean_size": mean(layer.size for layer in layers) if layers else 0.0,
            "clamped": mean(layer.clamped for layer in layers) if layers else 0.0,
        },
    )


if __name__ == "__main__":
    main_with_ratio(run)

"""Stream the calibration rows through the original and write its ordered low-rank factors."""

from __future__ import annotations

from emloc.calibrate import calibrate
from emloc.devices import pick_dtype
from emloc.models import open_model
from emloc.targets import select
from tasks import layout
from tasks.original import find_original
from tasks.params import Params
from tasks.samples import calibration_inputs
from tasks.stage import costing, main


def run(params: Params) -> None:
    """One pass over the original, whatever the ratios are."""
    settings = params.calibrate
    path, _ = find_original(params)
    inputs = calibration_inputs(path, params)
    with costing(layout.RESULTS / "calibrate.cost.json", params, "calibrate") as device:
        opened = open_model(path, dtype=pick_dtype(params.model.dtype))
        calibrate(
            opened,
            inputs,
            linears=select(opened.model, settings.targets, where="calibrate.targets"),
            max_ratio=settings.max_ratio,
            out=layout.FACTORS,
            device=device,
            dtype=pick_dtype(settings.dtype),
            progress=True,
        )


if __name__ == "__main__":
    main(run)

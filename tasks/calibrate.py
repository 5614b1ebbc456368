"""Stream the calibration rows through the original and write its ordered low-rank factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emloc.calibrate import calibrate
from emloc.devices import pick_dtype
from emloc.diffusion.calibration import noised_batches
from emloc.diffusion.encoding import Encoded
from emloc.families import calibration_batches
from emloc.families.diffusion import load_family
from emloc.models import open_model
from emloc.targets import select
from tasks import layout
from tasks.encoding import codec_of, encode
from tasks.original import find_original
from tasks.params import Params
from tasks.stage import costing, main


def run(params: Params) -> None:
    """One pass over the original, whatever the ratios are."""
    settings = params.calibrate
    path, _ = find_original(params)
    inputs = _inputs(path, params) if settings.samples else []
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


def _inputs(path: Path, params: Params) -> list[dict[str, Any]]:
    """The calibration samples as arguments of the model's forward."""
    if params.noise is not None:
        return noised_batches(
            load_family(path),
            Encoded.load(layout.encoded("calibration")),
            params.calibrate.samples,
            batch_size=params.calibrate.batch_size,
            noise=params.noise,
            dtype=pick_dtype(params.model.dtype),
        )
    codec = codec_of(path, params)
    examples = encode("calibration", codec, params)
    return calibration_batches(codec, examples, params.calibrate.batch_size)


if __name__ == "__main__":
    main(run)

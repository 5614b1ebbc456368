"""The calibration samples as arguments of the forward; `calibrate` and `correct` run them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emloc.devices import pick_dtype
from emloc.diffusion.calibration import noised_batches
from emloc.diffusion.encoding import Encoded
from emloc.families import calibration_batches
from emloc.families.diffusion import load_family
from tasks import layout
from tasks.encoding import codec_of, encode
from tasks.params import Params


def calibration_inputs(path: Path, params: Params) -> list[dict[str, Any]]:
    """Batches for the original at `path`; none for the plain SVD."""
    settings = params.calibrate
    if not settings.samples:
        return []
    if params.noise is not None:
        return noised_batches(
            load_family(path),
            Encoded.load(layout.encoded("calibration")),
            settings.samples,
            batch_size=settings.batch_size,
            noise=params.noise,
            dtype=pick_dtype(params.model.dtype),
        )
    codec = codec_of(path, params)
    examples = encode("calibration", codec, params)
    return calibration_batches(codec, examples, settings.batch_size)

"""Stream training rows through the original and keep what it says, to heal emulators with."""

from __future__ import annotations

from pathlib import Path

import torch

from emloc.devices import pick_dtype
from emloc.diffusion.encoding import Encoded
from emloc.diffusion.healing import teach_denoiser
from emloc.families.diffusion import load_family
from emloc.files import writing
from emloc.models import open_model
from emloc.teach import teach
from tasks import layout
from tasks.encoding import codec_of, encode
from tasks.original import find_original
from tasks.params import Params
from tasks.stage import costing, main


def run(params: Params) -> None:
    """One pass over the original for each wave of rows, whatever the ratios are."""
    file = layout.RESULTS / "teach.cost.json"
    if not params.teach.rows:
        with costing(file, params), writing(layout.TEACHER) as folder:
            folder.mkdir()
        return
    path, _ = find_original(params)
    teach_some = _teach_rows if params.noise is None else _teach_pictures
    with costing(file, params, "teach") as device:
        teach_some(path, params, device)


def _teach_rows(path: Path, params: Params, device: torch.device) -> None:
    settings, codec = params.teach, codec_of(path, params)
    teach(
        open_model(path, dtype=pick_dtype(params.model.dtype)),
        encode("train", codec, params)[: settings.rows],
        codec=codec,
        top_k=settings.top_k,
        batch_size=settings.batch_size,
        wave=settings.wave,
        out=layout.TEACHER,
        device=device,
        progress=True,
    )


def _teach_pictures(path: Path, params: Params, device: torch.device) -> None:
    assert params.noise is not None
    settings = params.teach
    teach_denoiser(
        open_model(path, dtype=pick_dtype(params.model.dtype)),
        load_family(path),
        Encoded.load(layout.encoded("train")),
        settings.rows,
        batch_size=settings.batch_size,
        wave=settings.wave,
        noise=params.noise,
        out=layout.TEACHER,
        device=device,
        progress=True,
    )


if __name__ == "__main__":
    main(run)

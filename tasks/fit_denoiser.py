"""LoRA on the denoiser of a diffusion pipeline, with pictures while it trains."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from emloc.devices import pick_dtype
from emloc.diffusion.drawing import DrawSettings, draw
from emloc.diffusion.encoding import Encoded
from emloc.diffusion.pipelines import load_pipeline, pipeline_class
from emloc.diffusion.sheet import contact_sheet
from emloc.diffusion.training import personalize
from emloc.families.diffusion import load_family
from emloc.files import writing
from emloc.nf4 import load_base
from emloc.processes import is_first
from tasks import layout
from tasks.original import find_original
from tasks.params import Params

SHEET = "training.png"  # in the adapter's folder
SEEDS = (0, 1)
CAPTIONS = 3


def fit_denoiser(
    params: Params, model: Path, adapter: Path, checkpoints: Path, device: torch.device
) -> dict[str, Any]:
    """Fit the denoiser at `model`, an emulator or the original; its encoders and VAE stay away.

    Returns:
        As `personalize`.
    """
    path, _ = find_original(params)
    settings = params.train
    train = Encoded.load(layout.encoded("train"))
    drawn = settings.pictures
    folder = checkpoints / "pictures"
    history = personalize(
        load_base(model, lora=settings.lora, settings=settings, device=device),
        load_family(path),
        train,
        Encoded.load(layout.encoded("validation")) if params.data.validation else None,
        lora=settings.lora,
        settings=settings,
        noise=params.noise,
        prior_weight=settings.prior_weight,
        pipeline=pipeline_class(path),
        out=adapter,
        checkpoints=checkpoints,
        picture_steps=drawn.every if drawn else None,
        draw=_drawer(params, path, train, folder, device) if drawn else None,
    )
    if drawn and is_first():
        _write_sheet(folder, adapter / SHEET)
    return history


def _drawer(
    params: Params, path: Path, train: Encoded, folder: Path, device: torch.device
) -> Callable[[torch.nn.Module, int], None]:
    """Draws the training's captions by the denoiser as it is at a step, into `folder`."""
    drawn, dreambooth = params.train.pictures, params.data.dreambooth
    assert drawn is not None and dreambooth is not None
    settings = DrawSettings(
        steps=drawn.steps,
        guidance_scale=drawn.guidance_scale,
        resolution=dreambooth.resolution,
    )

    def draw_at(denoiser: torch.nn.Module, step: int) -> None:
        pipeline = load_pipeline(
            path,
            dtype=pick_dtype(params.train.precision),
            device=device,
            denoiser=denoiser,
            encoders=False,
        )
        prompts = train.prompts[:CAPTIONS]
        rows = draw(pipeline, prompts, SEEDS, settings, progress=f"pictures of step {step}")
        with writing(folder / f"{step:06d}") as partial:
            partial.mkdir(parents=True)
            for number, picture in enumerate(picture for row in rows for picture in row):
                picture.save(partial / f"{number}.png")

    return draw_at


def _write_sheet(folder: Path, file: Path) -> None:
    """One contact sheet of the pictures of all steps."""
    strips = {path.name: sorted(path.glob("*.png")) for path in sorted(folder.iterdir())}
    rows = [
        (f"step {int(name)}", [Image.open(path) for path in paths])
        for name, paths in strips.items()
    ]
    contact_sheet(rows, [""] * len(rows[0][1])).save(file)
    shutil.rmtree(folder)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()

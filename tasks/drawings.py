"""Let a diffusion pipeline draw, and score it; `baseline` and `evaluate` both do it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from emloc.devices import pick_dtype
from emloc.diffusion.drawing import DrawSettings, draw
from emloc.diffusion.encoding import Encoded
from emloc.diffusion.pipelines import denoiser_of, load_denoiser, load_pipeline
from emloc.diffusion.scoring import mean_noise_loss
from emloc.families.diffusion import load_family
from emloc.files import read_jsonl, writing
from emloc.metrics.pictures import picture_scores
from emloc.offload import shares
from emloc.pictures import load_picture
from tasks import layout
from tasks.original import find_original
from tasks.params import Params


def score_drawings(
    base: Path,
    adapter: Path | None,
    params: Params,
    *,
    label: str,
    predictions: Path,
    device: torch.device,
    placed: dict[str, dict[str, float]] | None = None,
) -> dict[str, float]:
    """Metrics of the pictures, and the loss on the test pictures at noise held out from training.

    Args:
        base: the original, or an emulator of it.
        adapter: on top of it, if any.
        label: of the progress bars.
        predictions: folder for the pictures, PROMPT-SEED.png.
        device: to compute on.
        placed: filled in with where the denoiser's weights of `label` are.
    """
    path, _ = find_original(params)
    settings = params.evaluate.pictures
    assert settings is not None and params.data.dreambooth is not None
    dtype = pick_dtype(params.model.dtype)
    pipeline = load_pipeline(
        path,
        dtype=dtype,
        device=device,
        denoiser=None if base == path else load_denoiser(base, dtype=dtype, device="cpu"),
        adapter=adapter,
        offload=settings.offload,
    )
    if placed is not None:
        placed[label] = shares(denoiser_of(pipeline))
    pictures = draw(
        pipeline,
        settings.prompts,
        settings.seeds,
        DrawSettings(
            steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            resolution=params.data.dreambooth.resolution,
            max_sequence_length=params.data.max_length,
        ),
        progress=f"{label}: pictures",
    )
    _save(pictures, settings.seeds, predictions)
    loss = mean_noise_loss(
        denoiser_of(pipeline),
        load_family(path),
        Encoded.load(layout.encoded("test")),
        draws=settings.draws,
        noise=params.noise,
        seed=params.data.seed,
        batch_size=params.evaluate.batch_size,
        progress=f"{label}: loss",
    )
    del pipeline
    return {**_scores(pictures, params, device), "loss": loss}


def validation_loss_of_pictures(
    params: Params, adapter: Path, label: str, device: torch.device
) -> float:
    """Loss of the original with an adapter on the validation pictures, or where there are none on
    the training's, at noise that training did not see."""
    path, _ = find_original(params)
    settings = params.evaluate.pictures
    assert settings is not None
    pipeline = load_pipeline(
        path,
        dtype=pick_dtype(params.model.dtype),
        device=device,
        adapter=adapter,
        encoders=False,
        offload=settings.offload,
    )
    split = "validation" if params.data.validation else "train"
    return mean_noise_loss(
        denoiser_of(pipeline),
        load_family(path),
        Encoded.load(layout.encoded(split)),
        draws=settings.draws,
        noise=params.noise,
        seed=params.data.seed + 1,
        batch_size=params.evaluate.batch_size,
        progress=f"{label}: loss",
    )


def _scores(
    pictures: list[list[Image.Image]], params: Params, device: torch.device
) -> dict[str, float]:
    """The metrics of params.yaml but for the loss."""
    settings = params.evaluate.pictures
    assert settings is not None
    rows = read_jsonl(layout.rows("test"))
    return picture_scores(
        [name for name in params.evaluate.metrics if name != "loss"],
        pictures,
        settings.prompts,
        [load_picture(str(layout.DATA / row["image"]), row["image"]) for row in rows],
        clip=settings.clip,
        dino=settings.dino,
        concept=settings.concept,
        device=device,
    )


def _save(pictures: list[list[Image.Image]], seeds: Sequence[int], out: Path) -> None:
    with writing(out) as folder:
        folder.mkdir(parents=True)
        for number, row in enumerate(pictures):
            for seed, picture in zip(seeds, row, strict=True):
                picture.save(folder / f"{number:02d}-{seed}.png")

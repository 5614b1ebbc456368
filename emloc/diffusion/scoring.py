"""How well a denoiser predicts noise that no training has seen, the same noise for every model.

- `fixed_draws`: pairs of picture, seed and noise level, spread evenly over the sampling density
- `mean_noise_loss`: mean squared error over them
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from tqdm import tqdm

from emloc.diffusion.encoding import Encoded
from emloc.families.diffusion import DiffusionFamily, draw_seed
from emloc.models import evaluating
from emloc.settings import NoiseSettings, is_whole, require

_SCORED = 1  # tells these seeds from those of training


def fixed_draws(pictures: int, draws: int, seed: int) -> list[tuple[int, int, float]]:
    """Picture, seed and noise level of each of `pictures` · `draws` predictions.

    Levels are quantiles of the sampling density: each picture has one in each of `draws` equal
    parts, and those of all pictures together are evenly spread, so that few draws do.
    """
    order = torch.randperm(pictures, generator=torch.Generator().manual_seed(seed)).tolist()
    return [
        (
            picture,
            draw_seed(seed, _SCORED, picture, draw),
            (draw + (place + 0.5) / pictures) / draws,
        )
        for picture, place in enumerate(order)
        for draw in range(draws)
    ]


def mean_noise_loss(
    denoiser: ModelMixin,
    family: DiffusionFamily,
    encoded: Encoded,
    *,
    draws: int,
    noise: NoiseSettings,
    seed: int,
    batch_size: int,
    progress: str | None = None,
) -> float:
    """Mean squared error of the denoiser's output, over all rows alike.

    The error is that of what the denoiser is trained to return (noise - latents; of Stable
    Diffusion XL the noise or the velocity), without the weights of a training's loss. The noise
    levels follow `noise`'s density.

    Args:
        denoiser: where it is, in its own dtype.
        family: of its pipeline.
        encoded: the pictures; class pictures count like others.
        draws: pairs of noise and noise level for each picture.
        noise: the density of noise levels, and the guidance that is told.
        seed: of the draws, which are the same for every model.
        batch_size: rows in one forward pass; it changes nothing but rounding.
        progress: a bar's label, or None.

    Raises:
        ValueError: there is no picture, or `draws` or `batch_size` is below 1.
    """
    require(is_whole(draws, 1), "draws", draws, "a whole number of at least 1")
    require(is_whole(batch_size, 1), "batch_size", batch_size, "a whole number of at least 1")
    if not len(encoded):
        raise ValueError("there are no pictures to score a denoiser with: give at least one.")
    model: Any = denoiser
    plan = fixed_draws(len(encoded), draws, seed)
    total = 0.0
    starts = range(0, len(plan), batch_size)
    with evaluating(denoiser):
        for start in tqdm(starts, progress, unit="batch", disable=progress is None):
            total += _errors(model, family, encoded, plan[start : start + batch_size], noise)
    return total / len(plan)


def _errors(
    model: Any,
    family: DiffusionFamily,
    encoded: Encoded,
    plan: Sequence[tuple[int, int, float]],
    noise: NoiseSettings,
) -> float:
    """Sum over rows of their mean squared error."""
    picks, seeds, levels = zip(*plan, strict=True)
    batch = family.batch(encoded, picks, seeds, noise, levels).as_type(model.dtype)
    batch = batch.to(model.device)
    prediction = model(**batch.inputs)[0].to(batch.target.device)  # an offloaded model's is away
    target = batch.target.to(prediction.device)  # an offloaded model says that it is on the CPU
    return float(((prediction.float() - target) ** 2).flatten(1).mean(1).double().sum())

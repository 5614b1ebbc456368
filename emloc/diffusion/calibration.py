"""Encoded pictures with noise, as the samples that a denoiser is calibrated on."""

from __future__ import annotations

from typing import Any

import torch

from emloc.diffusion.encoding import Encoded
from emloc.families.diffusion import DiffusionFamily
from emloc.settings import NoiseSettings


def noised_batches(
    family: DiffusionFamily,
    encoded: Encoded,
    samples: int,
    *,
    batch_size: int,
    noise: NoiseSettings,
    dtype: torch.dtype,
) -> list[dict[str, Any]]:
    """Keyword arguments of a denoiser's forward for `samples` pairs of picture and noise.

    Pictures take turns, each time with other noise; noise levels are drawn as in training.

    Raises:
        ValueError: samples are asked for, and there is no picture.
    """
    if samples and not len(encoded):
        raise ValueError("there are no pictures to calibrate with: give at least one.")
    batches = []
    for start in range(0, samples, batch_size):
        seeds = range(start, min(start + batch_size, samples))
        batch = family.batch(encoded, [seed % len(encoded) for seed in seeds], seeds, noise)
        batches.append(batch.as_type(dtype).inputs)
    return batches

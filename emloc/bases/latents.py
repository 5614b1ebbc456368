"""Pictures as a VAE's latents, and what flow matching learns from them.

Letters: P pictures, B pictures of a batch, c channels of a latent, h × w its size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor

VAE_BATCH = 16


@dataclass(frozen=True)
class Latents:
    """Scaled latents of pictures and of their mirror images.

    Attributes:
        means, stds: (2, P, c, h, w) float32 of the posterior; as they are, then mirrored.
    """

    means: Tensor
    stds: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, vae: Any, pixels: Tensor) -> Latents:
        """Encode pictures (P, 3, H, W); the VAE's config learns their latents' mean and spread."""
        found: dict[str, list[Tensor]] = {"mean": [], "std": []}
        for batch in (*pixels.split(VAE_BATCH), *pixels.flip(-1).split(VAE_BATCH)):
            posterior = vae.encode(batch.to(vae.device)).latent_dist
            for name, tensors in found.items():
                tensors.append(getattr(posterior, name).cpu())
        means, stds = (torch.cat(tensors).unflatten(0, (2, -1)) for tensors in found.values())
        shift = means.mean().item()
        scale = (means.var(correction=0) + stds.square().mean()).rsqrt().item()
        vae.register_to_config(shift_factor=shift, scaling_factor=scale)
        return cls((means - shift) * scale, stds * scale)

    def noised(
        self, rows: Tensor, sigma: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Noised latents of these pictures, half of them mirrored, and the velocity to learn.

        The velocity noise - latents is the mean over all noise and all latents of the posterior
        that give the noised latents: it has the same best prediction as that of one draw, and all
        that no model could predict is gone from the loss.

        Args:
            rows: (B,) int64.
            sigma: (B,) float32 in (0, 1), the share of noise.
            generator: of the draws.

        Returns:
            Two tensors (B, h · w / 4, 4 · c) float32.
        """
        mirrored = torch.randint(2, (len(rows),), generator=generator)
        means, stds = (_packed(part[mirrored, rows]) for part in (self.means, self.stds))
        share = sigma[:, None, None]
        variance = ((1 - share) * stds).square() + share.square()
        added = variance.sqrt() * torch.randn(means.shape, generator=generator)
        velocity = added * (share - (1 - share) * stds.square()) / variance - means
        return (1 - share) * means + added, velocity


def _packed(latents: Tensor) -> Tensor:
    return FluxPipeline._pack_latents(latents, *latents.shape)

"""The diffusion families: Flux, Stable Diffusion 3 and Stable Diffusion XL.

- `load_family`: the family of a pipeline folder; see `DiffusionFamily` for what it offers
- `Batch` and `draw_seed` come from `emloc.families.noising`

Noise, inputs, target and weights are those of diffusers' DreamBooth LoRA scripts, in float32.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)
from torch import Tensor

from emloc.diffusion.pipelines import denoiser_folder, pipeline_class
from emloc.families.noising import Batch, DiffusionFamily, Drawn, draw_seed
from emloc.files import read_json
from emloc.settings import NoiseSettings

__all__ = ["Batch", "DiffusionFamily", "draw_seed", "load_family"]
_QUANTILES = 20_000  # draws that stand for the sampling density where it is asked for quantiles


class _Flow(DiffusionFamily):
    """Flow matching: the denoiser predicts noise - latents."""

    patch = 2

    def __init__(self, path: Path, denoiser: Mapping[str, Any]) -> None:
        super().__init__(path, denoiser)
        config = FlowMatchEulerDiscreteScheduler.load_config(path / "scheduler")
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        self._quantiles: dict[tuple[Any, ...], Tensor] = {}

    def _density(self, noise: NoiseSettings, count: int, generator: torch.Generator) -> Tensor:
        return compute_density_for_timestep_sampling(
            noise.weighting,
            count,
            logit_mean=noise.logit_mean,
            logit_std=noise.logit_std,
            mode_scale=noise.mode_scale,
            generator=generator,
        )

    def _share(
        self, noise: NoiseSettings, generator: torch.Generator, level: float | None
    ) -> Tensor:
        if level is None:
            return self._density(noise, 1, generator)[0]
        key = (noise.weighting, noise.logit_mean, noise.logit_std, noise.mode_scale)
        if key not in self._quantiles:
            fixed = torch.Generator().manual_seed(0)
            self._quantiles[key] = self._density(noise, _QUANTILES, fixed).sort().values
        return torch.quantile(self._quantiles[key], level)

    def _noised(self, drawn: Drawn, noise: NoiseSettings) -> Batch:
        steps = self.scheduler.config.num_train_timesteps
        indices = (drawn.shares * steps).long().clamp(0, steps - 1)  # a density can reach 1
        timesteps, sigmas = self.scheduler.timesteps[indices], self.scheduler.sigmas[indices]
        sigma = sigmas.view(-1, 1, 1, 1)
        noisy = (1.0 - sigma) * drawn.latents + sigma * drawn.noises
        weights = compute_loss_weighting_for_sd3(noise.weighting, sigmas).float()
        inputs, target = self._inputs(
            noisy, drawn.noises - drawn.latents, timesteps, drawn.prompts.shape[1], noise
        )
        shared = {
            "encoder_hidden_states": drawn.prompts,
            "pooled_projections": drawn.pooled,
            "return_dict": False,
        }
        return Batch(inputs | shared, target, self._weighted(weights, sigmas), drawn.prior)

    def _inputs(
        self, noisy: Tensor, target: Tensor, times: Tensor, tokens: int, noise: NoiseSettings
    ) -> tuple[dict[str, Any], Tensor]:
        raise NotImplementedError

    def _weighted(self, weights: Tensor, sigmas: Tensor) -> Tensor:
        return weights


class _Flux(_Flow):
    """Latents in packed order, (B, h/2·w/2, 4c), in the input, the output and the target."""

    lora_targets = (
        r"(.*\.)?attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|(.*\.)?ff(_context)?\.net\.(0\.proj|2)"
    )

    def _inputs(
        self, noisy: Tensor, target: Tensor, times: Tensor, tokens: int, noise: NoiseSettings
    ) -> tuple[dict[str, Any], Tensor]:
        rows, _, height, width = noisy.shape
        guided = self.denoiser.get("guidance_embeds", False)
        place = FluxPipeline._prepare_latent_image_ids
        inputs = {
            "hidden_states": FluxPipeline._pack_latents(noisy, *noisy.shape),
            "timestep": times / 1000,  # the transformer multiplies it again
            "guidance": torch.full((rows,), float(noise.guidance)) if guided else None,
            "txt_ids": torch.zeros(tokens, 3),
            "img_ids": place(rows, height // 2, width // 2, noisy.device, noisy.dtype),
        }
        return inputs, FluxPipeline._pack_latents(target, *target.shape)


class _SD3(_Flow):
    """As in the script, the prediction is turned into one of the latents, -σ·prediction + noisy;
    its squared error is σ² times that of the prediction itself, so σ² goes into the weights."""

    lora_targets = r"(.*\.)?attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"

    def _inputs(
        self, noisy: Tensor, target: Tensor, times: Tensor, tokens: int, noise: NoiseSettings
    ) -> tuple[dict[str, Any], Tensor]:
        return {"hidden_states": noisy, "timestep": times}, target

    def _weighted(self, weights: Tensor, sigmas: Tensor) -> Tensor:
        return weights * sigmas**2


class _SDXL(DiffusionFamily):
    """The noise of DDPM; the UNet predicts the noise, or the velocity."""

    lora_targets = r"(.*\.)?attn[12]\.(to_[qkv]|to_out\.0)"

    def __init__(self, path: Path, denoiser: Mapping[str, Any]) -> None:
        super().__init__(path, denoiser)
        self.scheduler = DDPMScheduler.from_config(DDPMScheduler.load_config(path / "scheduler"))
        self.multiple = max(8, self.shrink)  # the pipeline wants 8
        kind, known = self.scheduler.config.prediction_type, ("epsilon", "v_prediction")
        if kind not in known:
            raise ValueError(
                f"the scheduler of {path} has prediction_type {kind!r}, but training knows "
                f"{' and '.join(known)}: use a pipeline with one of them."
            )

    def _scaled(self, latents: Tensor) -> Tensor:
        mean, std = self.vae.get("latents_mean"), self.vae.get("latents_std")
        if mean is None or std is None:
            return latents * self.vae["scaling_factor"]
        means, stds = (torch.tensor(value).view(1, -1, 1, 1) for value in (mean, std))
        return (latents - means) * self.vae["scaling_factor"] / stds

    def _share(
        self, noise: NoiseSettings, generator: torch.Generator, level: float | None
    ) -> Tensor:
        return torch.rand((), generator=generator) if level is None else torch.tensor(level)

    def _noised(self, drawn: Drawn, noise: NoiseSettings) -> Batch:
        steps = self.scheduler.config.num_train_timesteps
        timesteps = (drawn.shares * steps).long().clamp(0, steps - 1)
        velocity = self.scheduler.config.prediction_type == "v_prediction"
        target = drawn.noises
        if velocity:
            target = self.scheduler.get_velocity(drawn.latents, drawn.noises, timesteps)
        weights = torch.ones(len(timesteps))
        if noise.snr_gamma is not None:
            snr = compute_snr(self.scheduler, timesteps)
            balanced = snr.clamp(max=noise.snr_gamma) / snr + float(velocity)
            weights = torch.where(drawn.prior, weights, balanced)  # class pictures all weigh alike
        inputs = {
            "sample": self.scheduler.add_noise(drawn.latents, drawn.noises, timesteps),
            "timestep": timesteps,
            "encoder_hidden_states": drawn.prompts,
            "added_cond_kwargs": {"text_embeds": drawn.pooled, "time_ids": drawn.time_ids},
            "return_dict": False,
        }
        return Batch(inputs, target, weights, drawn.prior)


_FAMILIES: dict[str, type[DiffusionFamily]] = {
    "FluxPipeline": _Flux,
    "FluxKontextPipeline": _Flux,
    "StableDiffusion3Pipeline": _SD3,
    "StableDiffusionXLPipeline": _SDXL,
}


def load_family(path: str | os.PathLike[str]) -> DiffusionFamily:
    """The family of a pipeline folder; reads its configs only.

    Raises:
        ValueError: the folder holds no pipeline, or one that is not supported.
    """
    kind = _FAMILIES[pipeline_class(path).__name__]
    return kind(Path(path), read_json(denoiser_folder(path) / "config.json"))

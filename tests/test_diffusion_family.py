"""Noise, inputs, target and loss are those of diffusers' DreamBooth LoRA scripts.

The expected values are computed here from diffusers' functions in the way of the scripts, on the
whole batch; only the random draws are made row by row, as each row has its own generator.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)
from torch import Tensor

from emloc.diffusion.encoding import Encoded
from emloc.diffusion.pipelines import load_denoiser
from emloc.families.diffusion import DiffusionFamily, draw_seed, load_family
from emloc.settings import WEIGHTINGS, NoiseSettings
from tests.tiny_diffusion import LATENT_CHANNELS, SHRINK, TEXT_WIDTH, save_tiny_pipeline
from tests.training import one_thread

__all__ = ["one_thread"]
PICKS, SEEDS = [2, 0, 2, 1], [11, 12, 13, 14]
SIDE = 8  # of a latent
SHIFT, SCALE = 0.1, 0.9  # of the tiny VAE


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("pipelines")
    return {n: save_tiny_pipeline(n, base / n) for n in ("flux", "kontext", "sd3", "sdxl")}


def drawn_encoded(name: str, pictures: int = 3, priors: int = 0) -> Encoded:
    """Encodings as of a tiny pipeline, drawn; the last `priors` are class pictures."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    pooled = TEXT_WIDTH * (2 if name == "sd3" else 1)
    latent = (pictures, LATENT_CHANNELS, SIDE, SIDE)
    prompts = [
        {"prompt_embeds": draw(1, 6, 2 * TEXT_WIDTH), "pooled_prompt_embeds": draw(1, pooled)}
        for _ in range(2)
    ]
    return Encoded(
        draw(*latent),
        0.1 * draw(*latent).abs(),
        torch.arange(pictures) % 2,
        torch.arange(pictures) >= pictures - priors,
        prompts,
        torch.arange(6.0).repeat(pictures, 1) + 16,
    )


def script_draws(
    encoded: Encoded, noise: NoiseSettings, flow: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Unscaled samples, noise and the density's u (or the share of a UNet's steps)."""
    samples, noises, shares = [], [], []
    for pick, seed in zip(PICKS, SEEDS, strict=True):
        generator = torch.Generator().manual_seed(seed)
        mean, std = encoded.means[pick], encoded.stds[pick]
        samples.append(mean + std * torch.randn(mean.shape, generator=generator))
        noises.append(torch.randn(mean.shape, generator=generator))
        density: dict[str, Any] = dict(
            logit_mean=noise.logit_mean, logit_std=noise.logit_std, mode_scale=noise.mode_scale
        )
        shares.append(
            compute_density_for_timestep_sampling(
                noise.weighting if flow else "none", 1, generator=generator, **density
            )
        )
    return torch.stack(samples), torch.stack(noises), torch.cat(shares)


def script_loss(prediction: Tensor, target: Tensor, weighting: Tensor) -> Tensor:
    error = weighting.float() * (prediction.float() - target.float()) ** 2
    return torch.mean(error.reshape(target.shape[0], -1), 1).mean()


def flow_noise(folder: Path, encoded: Encoded, noise: NoiseSettings) -> tuple[Tensor, ...]:
    """As in the scripts: latents, noise, timesteps, sigmas and noisy latents."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    samples, noises, u = script_draws(encoded, noise, flow=True)
    latents = (samples - SHIFT) * SCALE
    indices = (u * scheduler.config.num_train_timesteps).long()
    timesteps = scheduler.timesteps[indices]
    steps = [(scheduler.timesteps == t).nonzero().item() for t in timesteps]
    sigmas = scheduler.sigmas[steps].flatten()[:, None, None, None]
    return latents, noises, timesteps, sigmas, (1.0 - sigmas) * latents + sigmas * noises


def gathered(encoded: Encoded, name: str) -> Tensor:
    return torch.cat([encoded.prompts[int(encoded.captions[pick])][name] for pick in PICKS])


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("name", ["flux", "kontext"])
def test_flux_is_trained_as_in_the_script(
    name: str, weighting: str, folders: dict[str, Path]
) -> None:
    encoded, noise = drawn_encoded(name), NoiseSettings(weighting=weighting, guidance=3.5)
    family, denoiser = load_family(folders[name]), _denoiser(folders[name])
    latents, noises, timesteps, sigmas, noisy = flow_noise(folders[name], encoded, noise)
    cpu = torch.device("cpu")
    wanted = {
        "hidden_states": FluxPipeline._pack_latents(noisy, 4, LATENT_CHANNELS, SIDE, SIDE),
        "timestep": timesteps / 1000,
        "guidance": torch.tensor([3.5]).expand(4),
        "pooled_projections": gathered(encoded, "pooled_prompt_embeds"),
        "encoder_hidden_states": gathered(encoded, "prompt_embeds"),
        "txt_ids": torch.zeros(6, 3),
        "img_ids": FluxPipeline._prepare_latent_image_ids(
            4, SIDE // 2, SIDE // 2, cpu, torch.float32
        ),
        "return_dict": False,
    }
    batch = family.batch(encoded, PICKS, SEEDS, noise)
    assert batch.inputs.keys() == wanted.keys()
    torch.testing.assert_close(batch.inputs, wanted, rtol=0, atol=0)
    assert len(set(timesteps.tolist())) == 4
    with torch.no_grad():
        prediction = denoiser(**wanted)[0]
    unpacked = FluxPipeline._unpack_latents(prediction, SIDE * SHRINK, SIDE * SHRINK, SHRINK)
    weights = compute_loss_weighting_for_sd3(weighting_scheme=weighting, sigmas=sigmas)
    expected = script_loss(unpacked, noises - latents, weights)
    torch.testing.assert_close(family.loss(prediction, batch), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_sd3_is_trained_as_in_the_script(weighting: str, folders: dict[str, Path]) -> None:
    encoded, noise = drawn_encoded("sd3"), NoiseSettings(weighting=weighting, logit_mean=0.3)
    family, denoiser = load_family(folders["sd3"]), _denoiser(folders["sd3"])
    latents, _, timesteps, sigmas, noisy = flow_noise(folders["sd3"], encoded, noise)
    wanted = {
        "hidden_states": noisy,
        "timestep": timesteps,
        "encoder_hidden_states": gathered(encoded, "prompt_embeds"),
        "pooled_projections": gathered(encoded, "pooled_prompt_embeds"),
        "return_dict": False,
    }
    batch = family.batch(encoded, PICKS, SEEDS, noise)
    assert batch.inputs.keys() == wanted.keys()
    torch.testing.assert_close(batch.inputs, wanted, rtol=0, atol=0)
    with torch.no_grad():
        prediction = denoiser(**wanted)[0]
    weights = compute_loss_weighting_for_sd3(weighting_scheme=weighting, sigmas=sigmas)
    expected = script_loss(prediction * (-sigmas) + noisy, latents, weights)  # preconditioned
    torch.testing.assert_close(family.loss(prediction, batch), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("gamma", [None, 0.05])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_sdxl_is_trained_as_in_the_script(
    kind: str, gamma: float | None, folders: dict[str, Path]
) -> None:
    family = _with_prediction(folders["sdxl"], kind)
    scheduler = DDPMScheduler.from_pretrained(folders["sdxl"] / "scheduler")
    encoded, noise = drawn_encoded("sdxl"), NoiseSettings(snr_gamma=gamma)
    samples, noises, shares = script_draws(encoded, noise, flow=False)
    latents, timesteps = samples * SCALE, (shares * 1000).long()
    wanted = {
        "sample": scheduler.add_noise(latents, noises, timesteps),
        "timestep": timesteps,
        "encoder_hidden_states": gathered(encoded, "prompt_embeds"),
        "added_cond_kwargs": {
            "text_embeds": gathered(encoded, "pooled_prompt_embeds"),
            "time_ids": encoded.time_ids[PICKS],
        },
        "return_dict": False,
    }
    batch = family.batch(encoded, PICKS, SEEDS, noise)
    assert batch.inputs.keys() == wanted.keys()
    torch.testing.assert_close(batch.inputs, wanted, rtol=0, atol=0)
    with torch.no_grad():
        prediction = _denoiser(folders["sdxl"])(**wanted)[0]
    target = noises
    if kind == "v_prediction":
        target = scheduler.get_velocity(latents, noises, timesteps)
    if gamma is None:
        expected = F.mse_loss(prediction, target)
    else:
        snr = compute_snr(scheduler, timesteps)
        weights = torch.stack([snr, gamma * torch.ones_like(timesteps)], dim=1).min(dim=1)[0] / snr
        weights = weights + 1 if kind == "v_prediction" else weights
        assert weights.min() < 0.99 * weights.max()
        each = F.mse_loss(prediction, target, reduction="none").mean(dim=[1, 2, 3])
        expected = (each * weights).mean()
    torch.testing.assert_close(family.loss(prediction, batch), expected, rtol=1e-6, atol=0)


def _denoiser(folder: Path) -> Any:
    return load_denoiser(folder, dtype=torch.float32, device="cpu")


def _with_prediction(folder: Path, kind: str) -> DiffusionFamily:
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "prediction_type": kind}))
    return load_family(folder)


@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_class_pictures_are_a_part_of_the_loss_of_their_own(
    name: str, folders: dict[str, Path]
) -> None:
    encoded, noise = drawn_encoded(name, priors=1), NoiseSettings(snr_gamma=1.0)
    family = load_family(folders[name])
    picks = [0, 1, 2, 2]  # as in the scripts: first the subject's, then as many class pictures
    batch = family.batch(encoded, picks, SEEDS, noise)
    prediction = batch.target + torch.randn(
        batch.target.shape, generator=torch.Generator().manual_seed(0)
    )
    halves = [
        family.loss(prediction[part], family.batch(encoded, picks[part], SEEDS[part], noise))
        for part in (slice(0, 2), slice(2, 4))
    ]
    expected = halves[0] + 0.3 * halves[1]
    torch.testing.assert_close(family.loss(prediction, batch, 0.3), expected)
    plain = F.mse_loss(prediction[2:], batch.target[2:])  # min-SNR is not for class pictures
    torch.testing.assert_close(halves[1], plain)


@pytest.mark.parametrize("name", ["flux", "sd3", "sdxl"])
def test_a_row_does_not_depend_on_its_neighbours(name: str, folders: dict[str, Path]) -> None:
    encoded, noise = drawn_encoded(name), NoiseSettings(weighting="sigma_sqrt", snr_gamma=2.0)
    family = load_family(folders[name])
    whole = family.batch(encoded, PICKS, SEEDS, noise)
    prediction, losses = torch.zeros_like(whole.target), []
    for number, (pick, seed) in enumerate(zip(PICKS, SEEDS, strict=True)):
        alone = family.batch(encoded, [pick], [seed], noise)
        assert torch.equal(alone.target[0], whole.target[number])
        losses.append(family.loss(torch.zeros_like(alone.target), alone))
    torch.testing.assert_close(family.loss(prediction, whole), torch.stack(losses).mean())


def test_levels_are_quantiles_of_the_density(folders: dict[str, Path]) -> None:
    encoded, noise = drawn_encoded("flux"), NoiseSettings(logit_mean=0.5, logit_std=0.8)
    family = load_family(folders["flux"])
    batch = family.batch(encoded, [0, 0, 0], [1, 1, 1], noise, levels=[0.1, 0.5, 0.9])
    normal = torch.distributions.Normal(0.5, 0.8).icdf(torch.tensor([0.1, 0.5, 0.9]))
    expected = 1 - torch.sigmoid(normal)  # timesteps fall with u
    torch.testing.assert_close(batch.inputs["timestep"], expected, rtol=0, atol=0.01)  # 0.003
    again = family.batch(encoded, [0], [1], noise, levels=[0.9])
    assert torch.equal(again.target[0], batch.target[0])


def test_a_batch_takes_another_dtype_but_keeps_times_ids_and_target(
    folders: dict[str, Path],
) -> None:
    batch = load_family(folders["sdxl"]).batch(drawn_encoded("sdxl"), [0], [0], NoiseSettings())
    low = batch.as_type(torch.bfloat16).to(torch.device("cpu"))
    added = low.inputs["added_cond_kwargs"]
    assert low.inputs["sample"].dtype == added["text_embeds"].dtype == torch.bfloat16
    assert low.inputs["timestep"].dtype == torch.int64 and low.inputs["return_dict"] is False
    assert added["time_ids"].dtype == low.target.dtype == low.weights.dtype == torch.float32


@pytest.mark.parametrize("name", ["flux", "sd3", "sdxl"])
def test_default_targets_are_those_of_the_script(name: str, folders: dict[str, Path]) -> None:
    import re

    attention = {"to_q", "to_k", "to_v", "to_out.0"}
    added = {"add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"}
    forward = {f"ff{x}.net.{y}" for x in ("", "_context") for y in ("0.proj", "2")}
    script = {
        "flux": {f"attn.{n}" for n in attention | added} | forward,
        "sd3": {f"attn.{n}" for n in attention | added},
        "sdxl": attention,
    }[name]
    pattern, denoiser = load_family(folders[name]).lora_targets, _denoiser(folders[name])
    names = [n for n, _ in denoiser.named_modules()]
    wanted = {n for n in names if any(n.endswith(f".{ending}") for ending in script)}
    assert {n for n in names if re.fullmatch(pattern, n)} == wanted and wanted


def test_what_is_no_supported_pipeline_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no diffusion pipeline"):
        load_family(tmp_path)
    with pytest.raises(ValueError, match="prediction_type 'sample', but training knows epsilon"):
        _with_prediction(folders["sdxl"], "sample")
    _with_prediction(folders["sdxl"], "epsilon")


def test_seeds_differ_with_each_number() -> None:
    seeds = {draw_seed(a, b, c) for a in range(5) for b in range(5) for c in range(5)}
    assert len(seeds) == 125 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(weighting="uniform"), "weighting is 'uniform', but it must be one of logit_normal"),
        (dict(logit_std=-1), "logit_std is -1, but it must be a number of at least 0"),
        (dict(guidance=None), "guidance is None"),
        (dict(snr_gamma=0), "snr_gamma is 0, but it must be empty or a number above 0"),
        (dict(mode_scale=True), "mode_scale is True"),
    ],
)
def test_noise_settings_refuse(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseSettings(**changes)

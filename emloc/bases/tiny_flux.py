"""A Flux trained from scratch on easy-VQA's pictures, with captions made of their questions.

One concept, a colour and a shape together, is left out, so that a fine-tuning can teach it.

1. The text encoders stay random: a few words need no learning.
2. The VAE learns to rebuild pictures.
3. The transformer learns flow matching on the VAE's latents. Some captions say less than all: "a
   red shape", "a circle" or "a shape". The texts count as padded to any length that a pipeline may
   pad to, and guidance is 1.

Letters: P pictures, B pictures of a batch, c channels of a latent, h × w its size.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FluxPipeline
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor
from torch.nn import functional

from emloc.bases.captions import Captions, shorter
from emloc.bases.fitting import batches_of, fit
from emloc.bases.flux_parts import (
    FACTOR,
    SHIFT,
    SIDE,
    build_encoders,
    build_transformer,
    build_vae,
    is_modulation,
    save_pipeline,
)
from emloc.bases.latents import VAE_BATCH, Latents
from emloc.bases.settings import TinyFluxSettings
from emloc.data.easy_vqa import easy_vqa_captions
from emloc.metrics.shapes import COLORS, SHAPES, measure_shape
from emloc.pictures import load_picture

OTHER_WORDS = ("a", "an", "the", "of", "on", "and", "photo", "picture", "shape", "shapes", "sks")
"""Words beside colours and shapes that are one token; "sks" is in no caption."""
_HELD_OUT = 0.05  # share of the other pictures
_KL = 3e-3
_SHORTER = 0.15  # share of captions that say less
_SEEDS = 4  # pictures of a caption when the pipeline is measured
_STEPS = 20  # of drawing them


def build_pipeline(
    train_folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    settings: TinyFluxSettings,
    seed: int,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Train the pipeline and write it as a FluxPipeline's folder, in one go at the end.

    Args:
        train_folder: the folder of easy-VQA's training part.
        out: the pipeline's folder; what was there is replaced.
        settings: how long and how fast to train, and what to leave out.
        seed: of the weights, the held-out pictures and all that training draws.
        device: where to train.
        progress: show a bar for each part with its loss.

    Returns:
        `parameters` (of the transformer), `vae_parameters`, `pictures` (trained on), `psnr` of
        held-out pictures and `psnr_held_out` of the held-out concept (where there are any), as the
        VAE rebuilds them, `vae_loss` and `loss` (the last ones), and `right_color_and_shape`: the
        share of drawn pictures, four for each caption of the training, that show what it says.

    Raises:
        ValueError: the folder is unusable, or the loss became NaN or infinite.
    """
    device = torch.device(device)
    generator = torch.Generator().manual_seed(seed)
    seen, concept = split_rows(easy_vqa_captions(train_folder), settings.held_out)
    order = torch.randperm(len(seen), generator=generator).tolist()
    held_out = max(1, round(_HELD_OUT * len(seen)))
    train = [seen[number] for number in order[held_out:]]
    if not train:
        raise ValueError(
            f"{train_folder} has {len(seen)} pictures that may be trained on, but two are needed "
            "to hold one out: take a whole part of easy-vqa."
        )
    captions = [row["caption"] for row in train]
    encoders = build_encoders([*OTHER_WORDS, *COLORS, *SHAPES], seed=seed)
    encoded = Captions([text for each in captions for text in (each, *shorter(each))], encoders)
    vae = build_vae(seed=seed).to(device)
    transformer = build_transformer(seed=seed).to(device)
    pixels = _pixels(train)
    vae_loss = _train_vae(vae, pixels, settings, generator, progress)
    metrics: dict[str, Any] = {
        "parameters": sum(p.numel() for p in transformer.parameters()),
        "vae_parameters": sum(p.numel() for p in vae.parameters()),
        "pictures": len(train),
        "psnr": psnr(vae, _pixels([seen[number] for number in order[:held_out]])),
        "vae_loss": vae_loss,
    }
    if concept:
        metrics["psnr_held_out"] = psnr(vae, _pixels(concept))
    latents = Latents.of(vae, pixels)
    metrics["loss"] = _train_transformer(
        transformer, latents, encoded, captions, settings, generator, progress
    )
    pipeline = save_pipeline(encoders, vae.eval(), transformer.eval(), out).to(device)
    metrics["right_color_and_shape"] = right_share(pipeline, sorted(set(captions)), _SEEDS)
    return metrics


def split_rows(
    rows: Sequence[dict[str, Any]], held_out: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows that may be trained on, and those whose caption names the held-out concept."""
    concept = f"a {held_out}"
    return (
        [row for row in rows if row["caption"] != concept],
        [row for row in rows if row["caption"] == concept],
    )


def _pixels(rows: Sequence[dict[str, Any]]) -> Tensor:
    """(P, 3, 64, 64) float32 from -1 to 1."""
    process = VaeImageProcessor(vae_scale_factor=FACTOR)
    pictures = [load_picture(row["image"], row["image"]) for row in rows]
    return process.preprocess(pictures, height=SIDE, width=SIDE)


def _train_vae(
    vae: Any,
    pixels: Tensor,
    settings: TinyFluxSettings,
    generator: torch.Generator,
    progress: bool,
) -> float:
    """Train the VAE on pictures, half of them mirrored; return the mean of the last losses."""

    def loss(rows: Tensor) -> Tensor:
        batch = pixels[rows]
        mirrored = torch.rand(len(batch), generator=generator) < 0.5
        batch = torch.where(mirrored[:, None, None, None], batch.flip(-1), batch).to(vae.device)
        posterior = vae.encode(batch).latent_dist
        rebuilt = vae.decode(posterior.sample(generator)).sample
        error = functional.l1_loss(rebuilt, batch) + functional.mse_loss(rebuilt, batch)
        return error + _KL * posterior.kl().mean() / posterior.mean[0].numel()

    return fit(
        vae,
        loss,
        batches_of(len(pixels), VAE_BATCH, generator),
        steps=settings.vae_steps,
        learning_rate=settings.learning_rate,
        is_matrix=lambda name, parameter: parameter.ndim > 1,
        title="rebuild",
        progress=progress,
    )


@torch.no_grad()
def psnr(vae: Any, pixels: Tensor) -> float:
    """Mean over pictures (P, 3, H, W) of how well the VAE rebuilds them, in dB."""
    found = []
    for batch in pixels.split(VAE_BATCH):
        rebuilt = vae.decode(vae.encode(batch.to(vae.device)).latent_dist.mode()).sample.cpu()
        error = (rebuilt.clamp(-1, 1) - batch).square().mean((1, 2, 3))
        found.append(10 * torch.log10(4 / error))
    return torch.cat(found).mean().item()


def _train_transformer(
    transformer: Any,
    latents: Latents,
    captions: Captions,
    texts: Sequence[str],
    settings: TinyFluxSettings,
    generator: torch.Generator,
    progress: bool,
) -> float:
    """Train the transformer by flow matching; return the mean of the last losses."""
    device = transformer.device
    said = torch.stack([captions.numbers([text, *shorter(text)]) for text in texts])  # (P, 4)
    side = SIDE // FACTOR // 2
    places = FluxPipeline._prepare_latent_image_ids(1, side, side, device, torch.float32)
    no_places = torch.zeros(captions.length, 3, device=device)

    def loss(rows: Tensor) -> Tensor:
        sigma = (torch.randn(len(rows), generator=generator) + math.log(SHIFT)).sigmoid()
        noised, truth = latents.noised(rows, sigma, generator)
        part = torch.randint(1, said.shape[1], rows.shape, generator=generator)
        less = torch.rand(len(rows), generator=generator) < _SHORTER
        numbers = said[rows, torch.where(less, part, 0)]
        bias = captions.bias(numbers, len(places), captions.draw_length(generator))
        velocity = transformer(
            hidden_states=noised.to(device),
            encoder_hidden_states=captions.embeds[numbers].to(device),
            pooled_projections=captions.pooled[numbers].to(device),
            timestep=sigma.to(device),
            img_ids=places,
            txt_ids=no_places,
            guidance=torch.ones(len(rows), device=device),
            joint_attention_kwargs={"attention_mask": bias.to(device)},
            return_dict=False,
        )[0]
        return functional.mse_loss(velocity, truth.to(device))

    return fit(
        transformer,
        loss,
        batches_of(len(texts), settings.batch_size, generator),
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        is_matrix=lambda name, p: p.ndim == 2 and "blocks." in name and not is_modulation(name),
        title="draw",
        progress=progress,
    )


def right_share(pipeline: Any, captions: Sequence[str], seeds: int) -> float:
    """Share of pictures, `seeds` for each caption "a COLOUR SHAPE", that show just that."""
    right = 0
    for caption in captions:
        pictures = pipeline(
            [caption] * seeds,
            height=SIDE,
            width=SIDE,
            num_inference_steps=_STEPS,
            guidance_scale=1.0,
            max_sequence_length=32,
            generator=[torch.Generator().manual_seed(seed) for seed in range(seeds)],
        ).images
        right += sum(caption == " ".join(["a", *map(str, measure_shape(p))]) for p in pictures)
    return right / (len(captions) * seeds)

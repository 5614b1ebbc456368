"""Pictures from prompts.

- `DrawSettings`: steps, guidance, resolution
- `resolution_step`: what a pipeline's resolutions are multiples of
- `draw`: one picture for each prompt and seed, by the pipeline's own call
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from emloc.diffusion.pipelines import DENOISERS, GUIDED, denoiser_of
from emloc.models import evaluating
from emloc.settings import is_real, is_whole, require

Prompt = str | dict[str, Tensor]
POSITIVE = ("prompt_embeds", "pooled_prompt_embeds")
NEGATIVE = tuple(f"negative_{name}" for name in POSITIVE)


@dataclass
class DrawSettings:
    """How pictures are drawn.

    Args:
        steps: denoising steps of a picture.
        guidance_scale: of classifier-free guidance, which runs the denoiser twice a step when above
            1; Flux is only told the number and runs once.
        resolution: width and height in pixels.
        negative_prompt: what pictures should not show; not for Flux. Prompts given as embeddings
            bring their own.
        max_sequence_length: tokens that a T5 pads a text to; None is what the pipeline uses.

    Raises:
        ValueError: a value is not allowed; the message names it.
    """

    steps: int
    guidance_scale: float
    resolution: int
    negative_prompt: str | None = None
    max_sequence_length: int | None = None

    def __post_init__(self) -> None:
        require(is_whole(self.steps, 1), "steps", self.steps, "a whole number of at least 1")
        good = is_real(self.guidance_scale, 0)
        require(good, "guidance_scale", self.guidance_scale, "a number of at least 0")
        good = is_whole(self.resolution, 1)
        require(good, "resolution", self.resolution, "a whole number of pixels")
        good = self.negative_prompt is None or isinstance(self.negative_prompt, str)
        require(good, "negative_prompt", self.negative_prompt, "a text or null")
        tokens = self.max_sequence_length
        require(tokens is None or is_whole(tokens, 1), "max_sequence_length", tokens, "1 or more")


def resolution_step(pipeline: DiffusionPipeline) -> int:
    """The number of pixels that width and height of a pipeline's pictures are multiples of.

    Raises:
        ValueError: the pipeline is of no supported class.
    """
    kind = type(pipeline).__name__
    if kind not in DENOISERS:
        raise ValueError(
            f"the pipeline is a {kind}, but pictures can be drawn with one of "
            f"{', '.join(DENOISERS)}."
        )
    known: Any = pipeline
    scale: int = known.vae_scale_factor
    if kind == "StableDiffusionXLPipeline":
        return math.lcm(8, scale)  # its own check asks for 8, whatever the VAE
    return scale * (known.patch_size if kind == "StableDiffusion3Pipeline" else 2)


def draw(
    pipeline: DiffusionPipeline,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    settings: DrawSettings,
    progress: str | None = None,
) -> list[list[Image.Image]]:
    """One picture for each prompt and seed, [prompt][seed], in RGB.

    Pictures are drawn one at a time from noise made on the CPU, so that a picture depends on its
    own prompt and seed alone. The denoiser is in eval mode meanwhile.

    Args:
        pipeline: one of the four supported classes, on any device.
        prompts: texts; or, for a pipeline without text encoders, embeddings by the names of the
            pipeline's arguments, (1, tokens, width) and (1, width), those of a negative prompt
            included where guidance needs them.
        seeds: whole numbers.
        settings: how to draw.
        progress: title of a progress bar over the pictures; None for none.

    Raises:
        ValueError: the resolution is not a multiple of the pipeline's step; a text without text
            encoders; embeddings missing, of other names or of several prompts; a negative prompt
            for a pipeline that takes none.
    """
    _check_settings(pipeline, settings)
    for number, prompt in enumerate(prompts, start=1):
        _check_prompt(pipeline, prompt, settings, f"prompt {number}")
    total, call = len(prompts) * len(seeds), cast(Any, pipeline)
    drawn: list[list[Image.Image]] = []
    with (
        evaluating(denoiser_of(pipeline)),
        tqdm(total=total, desc=progress, unit="picture", disable=progress is None) as bar,
    ):
        for prompt in prompts:
            arguments = _arguments(pipeline, prompt, settings)
            drawn.append([])
            for seed in seeds:
                generator = torch.Generator().manual_seed(seed)
                picture = call(**arguments, generator=generator).images[0]
                drawn[-1].append(picture.convert("RGB"))
                bar.update()
    return drawn


def _check_settings(pipeline: Any, settings: DrawSettings) -> None:
    step, resolution = resolution_step(pipeline), settings.resolution
    if resolution % step:
        below = resolution // step * step
        near = " or ".join(str(size) for size in (below, below + step) if size)
        raise ValueError(
            f"resolution is {resolution}, but pictures of a {type(pipeline).__name__} with this "
            f"VAE have multiples of {step} pixels: write {near}."
        )
    if settings.negative_prompt is not None and type(pipeline).__name__ not in GUIDED:
        raise ValueError(
            f"negative_prompt is {settings.negative_prompt!r}, but a {type(pipeline).__name__} "
            "takes none: leave it out."
        )


def _check_prompt(pipeline: Any, prompt: Prompt, settings: DrawSettings, name: str) -> None:
    if isinstance(prompt, str):
        if pipeline.text_encoder_2 is None:
            raise ValueError(
                f"{name} is a text, but the pipeline was loaded without its text encoders: load it "
                f"with them, or give embeddings ({' and '.join(POSITIVE)})."
            )
        return
    negative = _is_guided(pipeline, settings) and not _negates_nothing(pipeline, settings)
    needed = POSITIVE + (NEGATIVE if negative else ())
    if not set(needed) <= set(prompt) <= {*POSITIVE, *NEGATIVE}:
        raise ValueError(
            f"{name} has the embeddings {', '.join(sorted(prompt)) or 'none at all'}, but a "
            f"{type(pipeline).__name__} with guidance_scale {settings.guidance_scale} needs "
            f"{', '.join(needed)}: give those."
        )
    for key, value in prompt.items():
        if value.shape[0] != 1:
            raise ValueError(
                f"{name} has {key} of shape {tuple(value.shape)}, which is of several prompts: "
                "give each prompt embeddings of its own, with 1 in front."
            )


def _arguments(pipeline: Any, prompt: Prompt, settings: DrawSettings) -> dict[str, Any]:
    """What the pipeline's call is given for a prompt, but for the generator."""
    size = settings.resolution
    arguments: dict[str, Any] = {
        "height": size,
        "width": size,
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
    }
    if type(pipeline).__name__ == "FluxKontextPipeline":
        arguments["max_area"] = size**2  # it would draw about a million pixels otherwise
    guided = _is_guided(pipeline, settings)
    if isinstance(prompt, str):
        if guided:
            arguments["negative_prompt"] = settings.negative_prompt
        if settings.max_sequence_length and type(pipeline).__name__ != "StableDiffusionXLPipeline":
            arguments["max_sequence_length"] = settings.max_sequence_length
        return {**arguments, "prompt": prompt}
    names = [name for name in POSITIVE + (NEGATIVE if guided else ()) if name in prompt]
    place = {"device": pipeline._execution_device, "dtype": denoiser_of(pipeline).dtype}
    return {**arguments, **{name: prompt[name].to(**place) for name in names}}


def _is_guided(pipeline: Any, settings: DrawSettings) -> bool:
    """Whether the pipeline's call needs a negative prompt."""
    return type(pipeline).__name__ in GUIDED and settings.guidance_scale > 1


def _negates_nothing(pipeline: Any, settings: DrawSettings) -> bool:
    """Whether the pipeline takes zeros for a negative prompt that is not given (SDXL's way)."""
    zeros: bool = pipeline.config.get("force_zeros_for_empty_prompt", False)
    return zeros and settings.negative_prompt is None

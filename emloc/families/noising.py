"""What all diffusion families share: rows drawn and noised, each on its own, and the loss.

- `DiffusionFamily.batch`: encoded pictures, noised, as arguments of the denoiser's forward
- `DiffusionFamily.loss`: weighted squared error, with the prior-preservation part apart
- `draw_seed`: a seed of its own for each draw

The numbers are those of diffusers' DreamBooth LoRA scripts, in float32. Each row draws from its own
generator, so that a batch does not depend on its neighbours.

Letters: B rows of a batch, c h w of a latent, n tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from emloc.files import read_json
from emloc.settings import NoiseSettings

if TYPE_CHECKING:
    from emloc.diffusion.encoding import Encoded

_KEPT = ("timestep", "guidance", "txt_ids", "img_ids", "time_ids")  # inputs never cast


@dataclass
class Drawn:
    """What was drawn for a batch: latents and noises (B, c, h, w), shares of the schedule (B,);
    and what belongs to the rows: prompts (B, n, width), pooled prompts (B, width), `time_ids`
    (B, 6) and which are class pictures (B,)."""

    latents: Tensor
    noises: Tensor
    shares: Tensor
    prompts: Tensor
    pooled: Tensor
    time_ids: Tensor
    prior: Tensor


@dataclass
class Batch:
    """Noised rows.

    Args:
        inputs: keyword arguments of the denoiser's forward, `return_dict=False` included.
        target: what the denoiser should return, of its output's shape, float32.
        weights: of each row in the loss, (B,) float32.
        prior: which rows are class pictures of prior preservation, (B,) bool.
    """

    inputs: dict[str, Any]
    target: Tensor
    weights: Tensor
    prior: Tensor

    def as_type(self, dtype: torch.dtype) -> Batch:
        """The same with latents and encodings in `dtype`; times, ids and the target stay."""

        def cast(name: str, tensor: Tensor) -> Tensor:
            kept = name in _KEPT or not tensor.is_floating_point()
            return tensor if kept else tensor.to(dtype)

        return replace(self, inputs=_mapped(self.inputs, cast))

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""

        def move(_name: str, tensor: Tensor) -> Tensor:
            return tensor.to(device)

        return Batch(
            **{entry.name: _mapped(getattr(self, entry.name), move) for entry in fields(self)}
        )


class DiffusionFamily:
    """A pipeline's family; `emloc.families.diffusion.load_family` gives the right one.

    Attributes:
        lora_targets: regex on whole module names: the layers that get a LoRA by default.
        multiple: what a picture's height and width must be a multiple of.
        shrink: pixels of a latent's side.
    """

    lora_targets: ClassVar[str]
    patch: ClassVar[int] = 1  # latents that the denoiser takes as one, in each direction

    def __init__(self, path: Path, denoiser: Mapping[str, Any]) -> None:
        self.vae, self.denoiser = read_json(path / "vae" / "config.json"), denoiser
        self.shrink = 2 ** (len(self.vae["block_out_channels"]) - 1)
        self.multiple = self.shrink * self.patch

    def batch(
        self,
        encoded: Encoded,
        picks: Sequence[int],
        seeds: Sequence[int],
        noise: NoiseSettings,
        levels: Sequence[float] | None = None,
    ) -> Batch:
        """Noise the rows `picks`, each with the draws of its own seed.

        Args:
            encoded: encoded pictures.
            picks: row numbers, any number of times each; all of one size.
            seeds: one for each pick: of its posterior sample, its noise and its noise level.
            noise: how levels are drawn and weighted.
            levels: one for each pick, from 0 to below 1: the noise level is that quantile of the
                sampling density instead of a draw.
        """
        latents, noises, shares = [], [], []
        for number, (pick, seed) in enumerate(zip(picks, seeds, strict=True)):
            generator = torch.Generator().manual_seed(seed)
            mean, std = encoded.means[pick], encoded.stds[pick]  # c h w
            latents.append(mean + std * torch.randn(mean.shape, generator=generator))
            noises.append(torch.randn(mean.shape, generator=generator))
            level = None if levels is None else levels[number]
            shares.append(self._share(noise, generator, level))
        prompts = [encoded.prompts[int(encoded.captions[pick])] for pick in picks]
        text = {name: torch.cat([prompt[name] for prompt in prompts]) for name in prompts[0]}
        rows = torch.as_tensor(picks)
        drawn = Drawn(
            self._scaled(torch.stack(latents)),
            torch.stack(noises),
            torch.stack(shares),
            text["prompt_embeds"],
            text["pooled_prompt_embeds"],
            encoded.time_ids[rows],
            encoded.prior[rows],
        )
        return self._noised(drawn, noise)

    def loss(self, prediction: Tensor, batch: Batch, prior_weight: float = 1.0) -> Tensor:
        """Mean over the pictures of their weighted squared error, plus `prior_weight` times the
        same mean over the class pictures; a part without rows counts nothing.

        Args:
            prediction: the first output of the denoiser.
            batch: what it was called with, on the same device.
        """
        error = (prediction.float() - batch.target) ** 2
        rows = batch.weights * error.flatten(1).mean(1)  # (B,)
        parts = [(1.0, rows[~batch.prior]), (prior_weight, rows[batch.prior])]
        return torch.stack([weight * part.mean() for weight, part in parts if len(part)]).sum()

    def _scaled(self, latents: Tensor) -> Tensor:
        """(B, c, h, w) from the VAE as the denoiser sees them."""
        return (latents - (self.vae.get("shift_factor") or 0.0)) * self.vae["scaling_factor"]

    def _share(
        self, noise: NoiseSettings, generator: torch.Generator, level: float | None
    ) -> Tensor:
        """Where the row's noise level stands in the schedule, from 0 to below 1."""
        raise NotImplementedError

    def _noised(self, drawn: Drawn, noise: NoiseSettings) -> Batch:
        raise NotImplementedError


def _mapped(value: Any, change: Callable[[str, Tensor], Tensor], name: str = "") -> Any:
    if isinstance(value, Mapping):
        return {key: _mapped(entry, change, key) for key, entry in value.items()}
    return change(name, value) if isinstance(value, Tensor) else value


def draw_seed(*numbers: int) -> int:
    """A seed for torch from whole numbers of at least 0: the same for the same, else another."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))

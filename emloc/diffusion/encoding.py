"""Pictures and captions as a denoiser takes them, computed once.

- `encode_prompts`: a pipeline's text encoders, loaded and freed inside
- `encode_rows`: captions, then pictures through the VAE → `Encoded`
- `Encoded`: one safetensors file

Letters: P pictures, c h w of a latent.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from emloc.diffusion.prompts import encode_prompts, free_memory
from emloc.families.diffusion import load_family
from emloc.files import writing
from emloc.pictures import load_picture
from emloc.quiet import quiet_diffusers

CROPS = ("center", "random")


@dataclass
class Encoded:
    """Encoded pictures and captions, on the CPU.

    Args:
        means: of the VAE's posterior, (P, c, h, w) float32, neither scaled nor shifted.
        stds: its standard deviations, of the same shape.
        captions: each picture's place in `prompts`, (P,) int64.
        prior: which are class pictures of prior preservation, (P,) bool.
        prompts: of each different caption the encodings, named as the pipeline's call takes them
            (prompt_embeds, pooled_prompt_embeds, and negative ones where its guidance needs
            them), with a batch dimension of 1.
        time_ids: what Stable Diffusion XL is told of each picture: height and width before, top
            and left of the crop, height and width after; (P, 6) float32.
    """

    means: Tensor
    stds: Tensor
    captions: Tensor
    prior: Tensor
    prompts: list[dict[str, Tensor]]
    time_ids: Tensor

    def __len__(self) -> int:
        return len(self.means)

    def at(self, places: Sequence[int]) -> Encoded:
        """Those pictures alone, with the captions that they have."""
        rows = list(places)
        used, captions = self.captions[rows].unique(return_inverse=True)
        prompts = [self.prompts[number] for number in used.tolist()]
        parts = (self.means[rows], self.stds[rows], captions, self.prior[rows])
        return Encoded(*parts, prompts, self.time_ids[rows])

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write one safetensors file; it appears when it is whole."""
        names = ("means", "stds", "captions", "prior", "time_ids")
        tensors = {name: getattr(self, name).contiguous() for name in names}
        for number, prompt in enumerate(self.prompts):
            tensors |= {f"prompts.{number}.{n}": t.contiguous() for n, t in prompt.items()}
        with writing(file) as partial:
            save_file(tensors, partial)

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Encoded:
        """Read what `save` wrote."""
        prompts: dict[int, dict[str, Tensor]] = {}
        fields: dict[str, Any] = {}
        with safe_open(str(file), framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118 (it is no mapping)
                if key.startswith("prompts."):
                    _, number, name = key.split(".")
                    prompts.setdefault(int(number), {})[name] = stored.get_tensor(key)
                else:
                    fields[key] = stored.get_tensor(key)
        return cls(**fields, prompts=[prompts[number] for number in sorted(prompts)])


def encode_rows(
    pipeline_path: str | os.PathLike[str],
    rows: Sequence[Mapping[str, Any]],
    *,
    resolution: int,
    crop: str,
    flip: bool,
    seed: int,
    device: torch.device | str,
    dtype: torch.dtype,
    max_sequence_length: int | None = None,
    root: str | os.PathLike[str] = ".",
    progress: bool = False,
) -> Encoded:
    """Encode the pictures and captions of rows: first the captions, then the pictures.

    A picture is resized so that its shorter side is `resolution` (bilinear), flipped or not, and
    cropped to a square, as in diffusers' DreamBooth scripts.

    Args:
        rows: each with "image", a path, and "caption"; "prior": true marks a class picture.
        resolution: side of the square, in pixels.
        crop: "center" or "random", drawn once for each row.
        flip: mirror half of the pictures, drawn once for each row.
        seed: of crops and flips.
        device: for the encoders and the VAE, which are there one after the other.
        dtype: of the text encoders; the VAE runs in float32.
        max_sequence_length: see `encode_prompts`.
        root: the folder that relative paths of pictures start from.
        progress: show a bar.

    Raises:
        ValueError: no rows, a caption that is too long, a resolution that the pipeline cannot
            take, or a picture that cannot be read.
    """
    if not rows:
        raise ValueError("there are no pictures to encode: give at least one row.")
    if crop not in CROPS:
        raise ValueError(f"crop is {crop!r}, but must be one of {', '.join(CROPS)}.")
    multiple = load_family(pipeline_path).multiple
    if resolution < multiple or resolution % multiple:
        nearest = max(1, (resolution + multiple // 2) // multiple) * multiple
        raise ValueError(
            f"resolution is {resolution}, but must be a multiple of {multiple} for this pipeline: "
            f"the nearest is {nearest}."
        )
    captions = list(dict.fromkeys(row["caption"] for row in rows))
    prompts = encode_prompts(
        pipeline_path,
        captions,
        device=device,
        dtype=dtype,
        max_sequence_length=max_sequence_length,
        negative=True,
    )
    squares = _squares(rows, Path(root), resolution, crop, flip, seed)
    bar = tqdm(squares, "encode", len(rows), unit="picture", disable=not progress)
    means, stds, time_ids = _posteriors(Path(pipeline_path) / "vae", bar, torch.device(device))
    return Encoded(
        means,
        stds,
        torch.tensor([captions.index(row["caption"]) for row in rows]),
        torch.tensor([bool(row.get("prior", False)) for row in rows]),
        prompts,
        time_ids,
    )


def _squares(
    rows: Sequence[Mapping[str, Any]], root: Path, side: int, crop: str, flip: bool, seed: int
) -> Iterator[tuple[Tensor, list[int]]]:
    """Each row's picture as (1, 3, side, side) in [-1, 1], and its time ids."""
    for number, row in enumerate(rows):
        draw = random.Random(f"{seed}:{number}")
        image = load_picture(str(root / row["image"]), f"row {number} (counted from 0)")
        before = [image.height, image.width]
        image = _resized(image, side)
        if flip and draw.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        room = (image.height - side, image.width - side)
        if crop == "random":
            top, left = (draw.randint(0, free) for free in room)
        else:
            top, left = (round(free / 2) for free in room)
        square = np.asarray(image.crop((left, top, left + side, top + side)), dtype=np.float32)
        pixels = torch.from_numpy(square / 127.5 - 1).permute(2, 0, 1)[None].contiguous()
        yield pixels, [*before, top, left, side, side]


def _resized(image: Image.Image, side: int) -> Image.Image:
    """The shorter side as long as `side`, the longer rounded down."""
    short, long = sorted(image.size)
    other = side * long // short
    size = (side, other) if image.width <= image.height else (other, side)
    return image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)


def _posteriors(
    folder: Path, squares: Iterable[tuple[Tensor, list[int]]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    with quiet_diffusers():
        vae: Any = AutoencoderKL.from_pretrained(str(folder), dtype=torch.float32)
    vae.to(device).eval()
    means, stds, time_ids = [], [], []
    with torch.no_grad():
        for pixels, ids in squares:
            posterior = vae.encode(pixels.to(device)).latent_dist
            means.append(posterior.mean.cpu())
            stds.append(posterior.std.cpu())
            time_ids.append(ids)
    del vae
    free_memory()
    return torch.cat(means), torch.cat(stds), torch.tensor(time_ids, dtype=torch.float32)

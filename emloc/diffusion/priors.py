"""Class pictures for DreamBooth's prior preservation (Ruiz et al., arXiv 2208.12242, equation 2).

They show what the original draws of the subject's class ("a photo of a dog") before it is trained;
trained on beside the subject's pictures, they keep the class from becoming the subject.

- `class_pictures`: draw them into a folder, going on where an earlier run stopped
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from tqdm import tqdm

from emloc.diffusion.drawing import DrawSettings, draw
from emloc.files import writing
from emloc.pictures import load_picture
from emloc.settings import is_whole, require

_log = logging.getLogger(__name__)


def class_pictures(
    pipeline: DiffusionPipeline,
    prompt: str,
    count: int,
    *,
    folder: str | os.PathLike[str],
    seed: int,
    settings: DrawSettings,
    progress: bool = True,
) -> list[Path]:
    """Draw pictures of `prompt` as `folder`/00000.png, 00001.png, ...

    Picture n is drawn from a seed of its own, made of `seed` and n, so neither `count` nor a run
    that was interrupted changes what it shows. Whole pictures of the right size
    that lie in the folder are kept: give each set of the other arguments a folder of its own.

    Args:
        pipeline: the original, on the device to draw on.
        count: how many pictures, at least 1.
        folder: where they go; it is made.
        seed: at least 0.
        settings: how to draw.
        progress: show a progress bar.

    Returns:
        the paths of the `count` pictures.

    Raises:
        ValueError: the prompt is empty, a number is too small, or `draw` refuses a setting.
    """
    if not prompt.strip():
        raise ValueError("the class prompt is empty: name the class, as in 'a photo of a dog'.")
    for name, value, least in (("count", count, 1), ("seed", seed, 0)):
        require(is_whole(value, least), name, value, f"a whole number of at least {least}")
    paths = [Path(folder) / f"{number:05d}.png" for number in range(count)]
    missing = [
        number for number, path in enumerate(paths) if not _is_whole(path, settings.resolution)
    ]
    if kept := count - len(missing):
        _log.info("%d of %d class pictures lie in %s already", kept, count, folder)
    bar = tqdm(missing, desc="class pictures", unit="picture", disable=not progress)
    for number, one in zip(bar, picture_seeds(seed, missing), strict=True):
        [[picture]] = draw(pipeline, [prompt], [one], settings)
        with writing(paths[number]) as partial:
            picture.save(partial)
    return paths


def picture_seeds(seed: int, numbers: Sequence[int]) -> list[int]:
    """A seed (63 bits) for each numbered picture, unlike those of other numbers and seeds."""
    words = [
        np.random.SeedSequence((seed, number)).generate_state(1, np.uint64) for number in numbers
    ]
    return [int(word[0] >> np.uint64(1)) for word in words]


def _is_whole(path: Path, resolution: int) -> bool:
    """Whether a picture of the right size lies at `path`."""
    try:
        return load_picture(str(path), str(path)).size == (resolution, resolution)
    except ValueError:
        return False

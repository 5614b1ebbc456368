"""What a picture in the manner of easy-VQA shows: one coloured shape on a light background.

- `COLORS`, `SHAPES`: what there can be
- `measure_shape`: the colour and the shape of the largest region that is not background

No model takes part: the region is compared with a circle, an upright rectangle and a triangle that
stands on its base, each of the region's own place, size and blur. Right about both in 99 % and more
of easy-VQA's pictures, also after JPEG at quality 30, noise of sigma 10 or a blur of radius 1.

Letters: H, W height and width of the reduced picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

COLORS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "teal": (0, 128, 128),
    "gray": (128, 128, 128),
    "black": (0, 0, 0),
    "brown": (165, 42, 42),
}
SHAPES = ("circle", "rectangle", "triangle")
SIDE = 64
"""Larger pictures are reduced to this many pixels a side, the size of easy-VQA's."""
CONTRAST = 60
"""How far a pixel is from the background (in RGB, per 255) to count as part of a shape."""
COLOR_RADIUS = 85
"""How far a colour may be from one of `COLORS` and still bear its name."""
LEAST_PIXELS = 6
DOMINANCE = 0.6
"""The share of all that is not background that has to be one region."""
MISFIT = 0.45
"""The share of its area by which a region may differ from a shape and still bear its name."""
BLURS = (0.3, 0.6, 1.0, 1.5)
"""Blurs of the edges that are tried, standard deviations in pixels."""

Array = NDArray[np.float64]


def measure_shape(image: Image.Image) -> tuple[str | None, str | None]:
    """Names of the colour and of the shape of the largest region that is not background.

    Args:
        image: a picture of any size and mode; easy-VQA's have 64 × 64 pixels.

    Returns:
        A colour of `COLORS` and one of `SHAPES`; both None where nothing stands out from the
        background, what does is scattered or has no such colour; the shape alone None where the
        region is nothing like any of them.
    """
    pixels = _reduced(image)
    background = _background(pixels)
    distance = np.linalg.norm(pixels - background, axis=-1)  # (H, W)
    foreground = distance > CONTRAST
    region = _largest_region(foreground)
    if region.sum() < max(LEAST_PIXELS, DOMINANCE * foreground.sum()):
        return None, None
    color = _color(pixels[region], distance[region])
    if color is None:
        return None, None
    return color, _shape(_coverage(pixels, background, np.array(COLORS[color], float), region))


def _reduced(image: Image.Image) -> Array:
    """The picture's RGB values from 0 to 255, at most `SIDE` pixels wide and high, (H, W, 3)."""
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64)


def _background(pixels: Array) -> Array:
    """The colour in the middle of those along the border, (3,)."""
    border = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
    middle: Array = np.median(np.concatenate(border), axis=0)
    return middle


def _neighbours(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each place the largest value there, above, below, left and right of it, (H, W)."""
    padded = np.pad(values, 1)
    views = [padded[1:-1, 1:-1], padded[:-2, 1:-1], padded[2:, 1:-1]]
    views += [padded[1:-1, :-2], padded[1:-1, 2:]]
    largest: NDArray[np.int64] = np.maximum.reduce(views)
    return largest


def _largest_region(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask of the largest connected part of a mask, (H, W)."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        spread = np.where(mask, _neighbours(labels), 0)
        if (spread == labels).all():
            break
        labels = spread
    sizes = np.bincount(labels[mask], minlength=2)
    return mask & (labels == sizes.argmax())


def _color(pixels: Array, distance: Array) -> str | None:
    """The colour's name, by the quarter of a region that is farthest from the background."""
    core = pixels[distance >= np.quantile(distance, 0.75)].mean(axis=0)
    gaps = {name: float(np.linalg.norm(core - np.array(rgb))) for name, rgb in COLORS.items()}
    nearest = min(gaps, key=gaps.__getitem__)
    return nearest if gaps[nearest] <= COLOR_RADIUS else None


def _coverage(pixels: Array, background: Array, color: Array, region: NDArray[np.bool_]) -> Array:
    """How much of each pixel in and next to the region has its colour, from 0 to 1, (H, W)."""
    line = color - background
    share = np.clip((pixels - background) @ line / (line @ line), 0, 1)
    near = region.astype(np.int64)
    for _ in range(2):
        near = _neighbours(near)
    return np.where(near > 0, share, 0.0)


def _shape(coverage: Array) -> str | None:
    """The shape whose drawing differs least from the coverage, if it is anything like it."""
    misfits = {
        shape: min(float(np.abs(drawn - coverage).sum()) for drawn in _drawings(shape, coverage))
        for shape in SHAPES
    }
    best = min(misfits, key=misfits.__getitem__)
    return best if misfits[best] <= MISFIT * coverage.sum() else None


@dataclass
class _Box:
    """Where a shape lies, in pixels; `middle` is its centre of mass."""

    middle_x: float
    middle_y: float
    width: float
    height: float


def _drawings(shape: str, coverage: Array) -> list[Array]:
    """A shape of the coverage's centre and spread, at each of `BLURS`."""
    ys, xs = np.indices(coverage.shape) + 0.5
    weights = coverage / coverage.sum()
    x, y = float((weights * xs).sum()), float((weights * ys).sum())
    spread_x, spread_y = (weights * (xs - x) ** 2).sum(), (weights * (ys - y) ** 2).sum()
    factor = {"circle": 16, "rectangle": 12, "triangle": 24}[shape]
    drawings = []
    for blur in BLURS:
        width, height = (
            float(np.sqrt(factor * max(spread - blur**2, 0.1))) for spread in (spread_x, spread_y)
        )
        if shape == "circle":
            width = height = float(np.sqrt(4 * coverage.sum() / np.pi))
        elif shape == "triangle":
            height *= np.sqrt(18 / 24)
        drawings.append(_draw(shape, _Box(x, y, width, height), blur, coverage.shape))
    return drawings


FINE = 4
"""Points a pixel that a shape is drawn with, along each side."""


def _draw(shape: str, box: _Box, blur: float, size: tuple[int, ...]) -> Array:
    """The share of each pixel that a shape covers, blurred, (H, W)."""
    x = (np.arange(size[1] * FINE) + 0.5) / FINE - box.middle_x
    y = ((np.arange(size[0] * FINE) + 0.5) / FINE - box.middle_y)[:, None]
    if shape == "circle":
        inside = x**2 + y**2 <= (box.width / 2) ** 2
    elif shape == "rectangle":
        inside = (abs(x) <= box.width / 2) & (abs(y) <= box.height / 2)
    else:
        down = y / box.height + 2 / 3  # 0 at the tip, 1 at the base
        inside = (down <= 1) & (abs(x) <= box.width / 2 * down)
    share = inside.reshape(size[0], FINE, size[1], FINE).mean(axis=(1, 3))
    return _kernel(size[0], blur) @ share @ _kernel(size[1], blur).T


def _kernel(size: int, blur: float) -> Array:
    """The matrix of a Gaussian blur along one side, (size, size)."""
    gaps = np.arange(size)[:, None] - np.arange(size)
    weights = np.exp(-0.5 * (gaps / blur) ** 2)
    kernel: Array = weights / weights.sum(axis=1, keepdims=True)
    return kernel

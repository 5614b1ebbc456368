"""Colour and shape of pictures drawn as easy-VQA's are, clean and spoilt."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

from emloc.metrics.shapes import COLORS, SHAPES, measure_shape

FINE = 8  # times finer than the picture


def drawn(
    color: tuple[int, int, int],
    shape: str,
    *,
    place: tuple[float, float] = (32, 32),
    size: tuple[float, float] = (16, 16),
    background: tuple[int, int, int] = (240, 250, 235),
    side: int = 64,
) -> Image.Image:
    """A shape in the middle of its place (in pixels of 64), its edges smooth."""
    fine = Image.new("RGB", (side * FINE, side * FINE), background)
    pen, unit = ImageDraw.Draw(fine), side * FINE / 64
    (x, y), (width, height) = place, size
    left, top = (x - width / 2) * unit, (y - height / 2) * unit
    right, bottom = (x + width / 2) * unit, (y + height / 2) * unit
    if shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=color)
    elif shape == "rectangle":
        pen.rectangle((left, top, right, bottom), fill=color)
    else:
        pen.polygon([(left, bottom), (right, bottom), (x * unit, top)], fill=color)
    return fine.resize((side, side), Image.Resampling.BOX)


def jpeg(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=30)
    return Image.open(file)


def noisy(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=float)
    values = values + np.random.default_rng(0).normal(0, 10, values.shape)
    return Image.fromarray(np.clip(values, 0, 255).round().astype(np.uint8))


def blurred(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(1))


def as_is(image: Image.Image) -> Image.Image:
    return image


@pytest.mark.parametrize("spoil", [as_is, jpeg, noisy, blurred])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", COLORS)
def test_each_colour_and_shape_has_its_name(
    color: str, shape: str, spoil: Callable[[Image.Image], Image.Image]
) -> None:
    height = {"circle": 16, "rectangle": 10, "triangle": 14}[shape]
    picture = drawn(COLORS[color], shape, place=(40, 25), size=(16, height))
    assert measure_shape(spoil(picture)) == (color, shape)


@settings(max_examples=40, deadline=None)
@given(
    color=st.sampled_from(sorted(COLORS)),
    shape=st.sampled_from(SHAPES),
    x=st.floats(18, 46),
    y=st.floats(18, 46),
    size=st.floats(9, 30),
    aspect=st.floats(1, 3),
    background=st.tuples(*[st.integers(230, 255)] * 3),
)
def test_wherever_and_however_large(
    color: str,
    shape: str,
    x: float,
    y: float,
    size: float,
    aspect: float,
    background: tuple[int, int, int],
) -> None:
    height = {"circle": size, "triangle": size * 0.87, "rectangle": max(4, size / aspect)}[shape]
    picture = drawn(COLORS[color], shape, place=(x, y), size=(size, height), background=background)
    assert measure_shape(picture) == (color, shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_larger_picture_or_another_mode_measures_the_same(shape: str) -> None:
    large = drawn(COLORS["teal"], shape, side=300)
    assert measure_shape(large) == ("teal", shape)
    assert measure_shape(large.convert("RGBA")) == ("teal", shape)
    assert measure_shape(drawn((0, 0, 0), shape).convert("L")) == ("black", shape)


def test_the_fine_noise_of_a_large_picture_averages_out() -> None:
    large = np.asarray(drawn(COLORS["blue"], "triangle", side=512), dtype=float)
    large = large + np.random.default_rng(0).normal(0, 60, large.shape)
    picture = Image.fromarray(np.clip(large, 0, 255).astype(np.uint8))
    assert measure_shape(picture) == ("blue", "triangle")


def test_a_colour_somewhat_off_keeps_its_name_and_a_foreign_one_has_none() -> None:
    assert measure_shape(drawn((30, 40, 215), "circle")) == ("blue", "circle")
    assert measure_shape(drawn((200, 0, 200), "circle")) == (None, None)


def test_the_largest_region_counts() -> None:
    picture = drawn(COLORS["red"], "triangle", place=(24, 30), size=(24, 21))
    ImageDraw.Draw(picture).rectangle((55, 55, 59, 59), fill=COLORS["blue"])
    assert measure_shape(picture) == ("red", "triangle")


def test_no_clear_shape_has_no_name() -> None:
    assert measure_shape(Image.new("RGB", (64, 64), "white")) == (None, None)
    assert measure_shape(Image.new("RGB", (1, 1), "white")) == (None, None)
    specks = drawn(COLORS["red"], "circle", size=(2, 2))
    assert measure_shape(specks) == (None, None)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert measure_shape(Image.fromarray(noise))[1] is None
    scattered = Image.new("RGB", (64, 64), "white")
    for x in (6, 26, 46):
        ImageDraw.Draw(scattered).rectangle((x, 20, x + 9, 29), fill=COLORS["red"])
    assert measure_shape(scattered) == (None, None)


def test_a_region_unlike_any_shape_has_a_colour_only() -> None:
    picture = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(picture).ellipse((10, 10, 54, 54), outline=COLORS["red"], width=4)
    assert measure_shape(picture) == ("red", None)

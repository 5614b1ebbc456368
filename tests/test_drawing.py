"""Pictures drawn by tiny pipelines, and the sheet that shows them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from PIL import Image

from emloc.diffusion.drawing import DrawSettings, draw, resolution_step
from emloc.diffusion.sheet import contact_sheet
from tests.tiny_diffusion import tiny_pipeline

KINDS = ("flux", "kontext", "sd3", "sdxl")
STEPS = {"flux": 4, "kontext": 4, "sd3": 4, "sdxl": 8}
TEXTS = ["a blue triangle", "a dog"]


@cache
def pipeline_of(kind: str) -> Any:
    pipeline = tiny_pipeline(kind)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def without_encoders() -> Iterator[Any]:
    """A function that takes the text encoders out of a pipeline, until the test is over."""
    taken = []

    def take(pipeline: Any) -> Any:
        for name in [name for name in pipeline.components if name.startswith("text_encoder")]:
            taken.append((pipeline, name, getattr(pipeline, name)))
            setattr(pipeline, name, None)
        return pipeline

    yield take
    for pipeline, name, encoder in taken:
        setattr(pipeline, name, encoder)


def settings(kind: str, **other: Any) -> DrawSettings:
    size = 4 * STEPS[kind]
    return DrawSettings(**{"steps": 2, "guidance_scale": 3.0, "resolution": size, **other})


def embeddings(kind: str, text: str, negative: str | None = None) -> dict[str, torch.Tensor]:
    pipeline = pipeline_of(kind)
    with torch.no_grad():
        if kind in ("flux", "kontext"):
            prompt, pooled, _ = pipeline.encode_prompt(text, text)
            return {"prompt_embeds": prompt, "pooled_prompt_embeds": pooled}
        others = {"prompt_3": text} if kind == "sd3" else {}
        encoded = pipeline.encode_prompt(text, text, negative_prompt=negative, **others)
    names = ("prompt_embeds", "negative_prompt_embeds")
    names += ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return dict(zip(names, encoded, strict=True))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_what_the_pipeline_itself_draws_and_of_the_asked_size(kind: str) -> None:
    wanted = settings(kind)
    pictures = draw(pipeline_of(kind), TEXTS, [7, 8], wanted)
    assert [len(row) for row in pictures] == [2, 2]
    size = wanted.resolution
    area = {"max_area": size**2} if kind == "kontext" else {}
    own = pipeline_of(kind)(
        prompt=TEXTS[1], height=size, width=size, num_inference_steps=2, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(8), **area,
    ).images[0]  # fmt: skip
    assert own.size == (size, size)
    assert same(pictures[1][1], own)
    shown = [picture for row in pictures for picture in row]
    assert len({picture.tobytes() for picture in shown}) == 4  # each prompt and seed its own
    assert all(picture.mode == "RGB" for picture in shown)


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_depends_on_its_own_prompt_and_seed_alone(kind: str) -> None:
    together = draw(pipeline_of(kind), TEXTS, [1, 2, 3], settings(kind))
    alone = draw(pipeline_of(kind), TEXTS[1:], [3], settings(kind))
    assert same(together[1][2], alone[0][0])


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_draw_what_their_text_draws_without_text_encoders(
    kind: str, without_encoders: Any
) -> None:
    (expected,) = draw(pipeline_of(kind), TEXTS[:1], [5], settings(kind))
    encoded = embeddings(kind, TEXTS[0])
    pipeline = without_encoders(pipeline_of(kind))
    (drawn,) = draw(pipeline, [encoded], [5], settings(kind))
    assert same(drawn[0], expected[0])
    doubled = {name: value.double() for name, value in encoded.items()}
    ((picture,),) = draw(pipeline, [doubled], [5], settings(kind))
    assert same(picture, expected[0])  # in the denoiser's dtype
    if kind == "sdxl":  # zeros stand for a negative prompt that is not given
        positive = {name: encoded[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
        ((picture,),) = draw(pipeline, [positive], [5], settings(kind))
        assert same(picture, expected[0])


@pytest.mark.parametrize("kind", ["sd3", "sdxl"])
def test_a_negative_prompt_counts_with_guidance_only(kind: str) -> None:
    pipeline = pipeline_of(kind)

    def drawn(prompt: Any, **other: Any) -> Image.Image:
        return draw(pipeline, [prompt], [0], settings(kind, **other))[0][0]

    text = TEXTS[0]
    assert not same(drawn(text), drawn(text, negative_prompt="blur"))
    assert same(drawn(text, negative_prompt="blur"), drawn(embeddings(kind, text, "blur")))
    plain = drawn(text, guidance_scale=1.0)
    assert same(plain, drawn(text, guidance_scale=1.0, negative_prompt="blur"))
    assert not same(plain, drawn(text))


def test_flux_is_told_the_guidance() -> None:
    one, other = (
        draw(pipeline_of("flux"), TEXTS[:1], [0], settings("flux", guidance_scale=scale))[0][0]
        for scale in (1.0, 5.0)
    )
    assert not same(one, other)


def test_the_denoiser_is_in_eval_mode_meanwhile_and_as_before_afterwards() -> None:
    pipeline = pipeline_of("flux")
    ((expected,),) = draw(pipeline, TEXTS[:1], [0], settings("flux"))
    block = pipeline.transformer.transformer_blocks[0]
    dropout = torch.nn.Dropout(0.9)
    handle = block.register_forward_hook(lambda _, __, out: tuple(dropout(value) for value in out))
    block.add_module("dropout", dropout)
    pipeline.transformer.train()
    frozen = block.norm1.eval()
    try:
        ((drawn,),) = draw(pipeline, TEXTS[:1], [0], settings("flux"))
        assert dropout.training and not frozen.training
    finally:
        handle.remove()
        del block.dropout
        pipeline.transformer.eval()
    assert same(drawn, expected)


@pytest.mark.parametrize(("kind", "step"), STEPS.items())
def test_a_resolution_the_pipeline_cannot_draw_is_refused_with_the_nearest(
    kind: str, step: int
) -> None:
    assert resolution_step(pipeline_of(kind)) == step
    near = f"multiples of {step} pixels: write {2 * step} or {3 * step}"
    with pytest.raises(ValueError, match=near):
        draw(pipeline_of(kind), TEXTS, [0], settings(kind, resolution=2 * step + 1))
    with pytest.raises(ValueError, match=f"resolution is 1, .* write {step}\\."):
        draw(pipeline_of(kind), TEXTS, [0], settings(kind, resolution=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0, but it must be a whole number of at least 1"),
        ({"steps": 2.0}, "steps is 2.0"),
        ({"guidance_scale": -1}, "guidance_scale is -1, but it must be a number of at least 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"resolution": 0}, "resolution is 0, but it must be a whole number of pixels"),
        ({"resolution": True}, "resolution is True"),
        ({"negative_prompt": 3}, "negative_prompt is 3, but it must be a text or null"),
    ],
)
def test_bad_settings_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings("flux", **change)


def test_bad_prompts_are_named(without_encoders: Any) -> None:
    encoded = embeddings("sd3", "a dog")
    positive = {name: encoded[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
    pipeline = without_encoders(pipeline_of("sd3"))
    cases: list[tuple[Any, str]] = [
        ("a dog", "prompt 2 is a text, but the pipeline was loaded without its text encoders"),
        (positive, "guidance_scale 3.0 needs .*negative_prompt_embeds, negative_pooled"),
        ({**encoded, "image": encoded["prompt_embeds"]}, "prompt 2 has the embeddings image, "),
        ({}, "prompt 2 has the embeddings none at all"),
        (
            {name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in encoded.items()},
            r"has prompt_embeds of shape \(2, .*of several prompts",
        ),
    ]
    for prompt, message in cases:
        with pytest.raises(ValueError, match=message):
            draw(pipeline, [encoded, prompt], [0], settings("sd3"))
    draw(pipeline, [positive], [0], settings("sd3", guidance_scale=1.0))  # needs no negative


def test_flux_refuses_a_negative_prompt_and_unknown_pipelines_are_named() -> None:
    with pytest.raises(ValueError, match="negative_prompt is 'blur', but a FluxPipeline takes"):
        draw(pipeline_of("flux"), TEXTS, [0], settings("flux", negative_prompt="blur"))
    with pytest.raises(ValueError, match="a DDPMPipeline, but pictures can be drawn with one of"):
        resolution_step(DDPMPipeline(unet=None, scheduler=None))


def plain(color: str, size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", size, color)


def count(sheet: Image.Image, color: tuple[int, int, int]) -> int:
    return int((pixels(sheet) == color).all(-1).sum())


def test_the_sheet_shows_every_picture_at_its_place() -> None:
    colors = [["#ff0000", "#00ff00", "#0000ff"], ["#ff00ff", "#ffff00", "#00ffff"]]
    rows = [
        (f"row {number}", [plain(color, (64, 64)) for color in line])
        for number, line in enumerate(colors)
    ]
    sheet = contact_sheet(rows, ["a", "b", "c"])
    assert sheet.mode == "RGB" and sheet.getpixel((0, 0)) == (255, 255, 255)
    centers = {}
    for row, line in enumerate(colors):
        for column, name in enumerate(line):
            color = Image.new("RGB", (1, 1), name).getpixel((0, 0))
            mask = (pixels(sheet) == color).all(-1)
            assert mask.sum() == 192 * 192  # 64 pixels, three times as large
            centers[row, column] = np.argwhere(mask).mean(0)
    for row in range(2):
        heights = {centers[row, column][0] for column in range(3)}
        assert len(heights) == 1
        assert centers[row, 0][1] < centers[row, 1][1] < centers[row, 2][1]
    assert centers[0, 0][0] < centers[1, 0][0]
    gaps = {centers[0, 1][1] - centers[0, 0][1], centers[0, 2][1] - centers[0, 1][1]}
    assert len(gaps) == 1 and gaps.pop() > 192


def test_small_pictures_keep_hard_pixels_and_large_ones_shrink() -> None:
    checks = Image.fromarray(np.indices((64, 64)).sum(0).astype(np.uint8) % 2 * 255).convert("1")
    small = contact_sheet([("", [checks])], [""])
    assert count(small, (0, 0, 0)) == 64 * 32 * 3 * 3
    assert len(np.unique(pixels(small).reshape(-1, 3), axis=0)) == 3  # and the frame's colour
    large = contact_sheet([("", [plain("#ff0000", (1000, 500))])], [""])
    assert count(large, (255, 0, 0)) == 256 * 128
    flat = contact_sheet([("a label", [plain("#ff0000", (4000, 16))])], ["b"])
    assert count(flat, (255, 0, 0)) == 256


def test_smaller_pictures_stand_in_the_middle_of_their_cells() -> None:
    rows = [("", [plain("#ff0000", (192, 192))]), ("", [plain("#0000ff", (192, 96))])]
    sheet = contact_sheet(rows, [""])
    red, blue = (
        np.argwhere((pixels(sheet) == color).all(-1)) for color in ((255, 0, 0), (0, 0, 255))
    )
    assert red[:, 1].mean() == blue[:, 1].mean()
    tall = red[:, 0].min(), red[:, 0].max()
    shift = blue[:, 0].mean() - np.mean(tall)
    assert blue[:, 0].min() - tall[1] > 48 and shift == pytest.approx(192 + 12)


def test_labels_and_heads_are_written_and_long_ones_stay_in_their_room() -> None:
    pictures = [plain("#ff0000", (64, 64))] * 2
    bare = contact_sheet([("", pictures)], ["", ""])
    labelled = contact_sheet([("corrected", pictures)], ["one", "two"])
    assert labelled.width > bare.width
    long = contact_sheet([("word " * 500 + "x" * 500, pictures)], ["head " * 99, "two"])
    ink = np.argwhere((pixels(long) < 120).all(-1))  # dark: letters
    red = np.argwhere((pixels(long) == (255, 0, 0)).all(-1))
    assert long.height < labelled.height + 60 and long.width < labelled.width + 220
    assert len(ink) > len(np.argwhere((pixels(labelled) < 120).all(-1))) > 50
    inside = (ink[:, 0] >= red[:, 0].min()) & (ink[:, 1] >= red[:, 1].min())
    assert not inside.any()  # neither label nor head runs into the pictures
    assert count(long, (255, 0, 0)) == 2 * 192 * 192


def test_letters_beyond_ascii_are_drawn() -> None:
    def sheet(label: str) -> bytes:
        return contact_sheet([(label, [plain("#ff0000", (64, 64))])], [""]).tobytes()

    assert len({sheet("ä"), sheet("λ"), sheet("→"), sheet("П")}) == 4  # no boxes


def test_bad_sheets_are_named() -> None:
    picture = plain("#ff0000", (8, 8))
    with pytest.raises(ValueError, match="has 0 rows and 1 columns, but it must have at least one"):
        contact_sheet([], ["a"])
    with pytest.raises(ValueError, match="row 'raw' .* has 1 pictures, but there are 2 columns"):
        contact_sheet([("raw", [picture])], ["a", "b"])


def test_a_bar_counts_the_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    draw(pipeline_of("flux"), TEXTS, [0, 1], settings("flux", steps=1), progress="pictures")
    assert "pictures: 100%" in (shown := capsys.readouterr().err) and "4/4" in shown
    draw(pipeline_of("flux"), TEXTS, [0, 1], settings("flux", steps=1))
    assert "%" not in capsys.readouterr().err


def test_drawing_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(pipeline_of("kontext"), TEXTS[:1], [0], settings("kontext", steps=1))

"""The text-to-image pipeline that the project trains itself: whole, repeatable, one concept new."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image, ImageDraw
from torch.testing import assert_close

from emloc.bases.captions import Captions, shorter
from emloc.bases.flux_parts import Encoders, build_encoders, build_transformer, build_vae
from emloc.bases.latents import Latents
from emloc.bases.tiny_flux import (
    OTHER_WORDS,
    TinyFluxSettings,
    build_pipeline,
    psnr,
    right_share,
    split_rows,
)
from emloc.data.easy_vqa import easy_vqa_captions
from emloc.files import digest
from emloc.metrics.shapes import COLORS, SHAPES
from tests.tiny import draw_weights

CONCEPTS = (("red", "circle"), ("green", "rectangle"), ("blue", "triangle"))
SHORT = TinyFluxSettings(vae_steps=2, steps=2, batch_size=4)


def drawn(color: str, shape: str, left: int = 10) -> Image.Image:
    """One shape in the manner of easy-VQA."""
    image = Image.new("RGB", (64, 64), "#eef2f6")
    box = (left, 14, left + 24, 38)
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse(box, fill=COLORS[color])
    elif shape == "rectangle":
        draw.rectangle(box, fill=COLORS[color])
    else:
        draw.polygon([(left, 38), (left + 24, 38), (left + 12, 14)], fill=COLORS[color])
    return image


def save_part(folder: Path, pictures: int = 12) -> Path:
    """A part of a small data set in easy-VQA's layout, each third picture a blue triangle."""
    (folder / "images").mkdir(parents=True)
    questions = []
    for number in range(pictures):
        color, shape = CONCEPTS[number % 3]
        drawn(color, shape, 2 * number).save(folder / "images" / f"{number}.png")
        questions += [["what color is the shape?", color, number], ["what shape?", shape, number]]
    (folder / "questions.json").write_text(json.dumps(questions))
    return folder


def build(folder: Path, out: Path, seed: int = 0) -> dict[str, Any]:
    return build_pipeline(folder, out, settings=SHORT, seed=seed, progress=False)


def content(folder: Path) -> str:
    """A hash of all files below a folder, by name."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return digest({"names": [str(file.relative_to(folder)) for file in files]}, files)


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_part(tmp_path_factory.mktemp("easy-vqa") / "train")


@pytest.fixture(scope="module")
def built(part: Path) -> tuple[Path, dict[str, Any]]:
    """A pipeline that has barely begun to learn, and what was measured of it."""
    return part.parent / "base", build(part, part.parent / "base")


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    return build_encoders([*OTHER_WORDS, *COLORS, *SHAPES], seed=0)


def test_the_folder_loads_as_a_plain_pipeline_and_draws(built: tuple[Path, dict]) -> None:
    folder, metrics = built
    pipeline = FluxPipeline.from_pretrained(folder)
    assert 1e6 < metrics["parameters"] == pipeline.transformer.num_parameters() < 6e6
    pipeline.set_progress_bar_config(disable=True)
    pictures = [
        pipeline(
            "a sks shape",
            height=64,
            width=64,
            num_inference_steps=2,
            guidance_scale=1.0,
            max_sequence_length=16,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        for seed in (0, 0, 1)
    ]
    assert pictures[0].size == (64, 64)
    assert pictures[0].tobytes() == pictures[1].tobytes() != pictures[2].tobytes()


def test_the_metrics_tell_of_both_parts_and_of_both_kinds_of_pictures(
    built: tuple[Path, dict],
) -> None:
    _, metrics = built
    assert metrics["pictures"] == 7  # of 12: 4 of the held-out concept, 1 held out of the others
    assert 0 < metrics["psnr"] < 60 and 0 < metrics["psnr_held_out"] < 60
    assert metrics["vae_loss"] > 0 and metrics["loss"] > 0
    assert 0 <= metrics["right_color_and_shape"] <= 1
    json.dumps(metrics, allow_nan=False)


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(
    built: tuple[Path, dict], part: Path, tmp_path: Path
) -> None:
    assert build(part, tmp_path / "again") == built[1]
    assert content(tmp_path / "again") == content(built[0])
    build(part, tmp_path / "other", seed=1)
    assert content(tmp_path / "other") != content(built[0])


@pytest.mark.parametrize(("changed", "matters"), [((2, 5, 8, 11), False), ((0, 1, 3, 4), True)])
def test_only_pictures_of_other_concepts_leave_a_trace(
    built: tuple[Path, dict], tmp_path: Path, changed: tuple[int, ...], matters: bool
) -> None:
    part = save_part(tmp_path / "train")
    for number in changed:
        Image.new("RGB", (64, 64), "purple").save(part / "images" / f"{number}.png")
    build(part, tmp_path / "base")
    assert (content(tmp_path / "base") != content(built[0])) == matters


def test_the_held_out_caption_and_its_pictures_are_set_apart(part: Path) -> None:
    rows = easy_vqa_captions(part)
    seen, concept = split_rows(rows, "blue triangle")
    assert len(seen) + len(concept) == len(rows) == 12
    assert {row["caption"] for row in concept} == {"a blue triangle"}
    texts = {text for row in seen for text in (row["caption"], *shorter(row["caption"]))}
    assert "a blue triangle" not in texts and {"a red circle", "a shape"} < texts
    assert not {row["image"] for row in seen} & {row["image"] for row in concept}


def test_each_word_is_one_token_and_others_are_spelt(encoders: Encoders) -> None:
    for words in ([*OTHER_WORDS, *COLORS, *SHAPES], ["sks", "a", "blue", "shape"]):
        text = " ".join(words)
        assert len(encoders.tokenizer(text).input_ids) == len(words) + 2  # a start and an end
        assert len(encoders.tokenizer_2(text).input_ids) == len(words) + 1  # an end
    assert (
        encoders.tokenizer.decode(
            encoders.tokenizer("a mauve shape").input_ids, skip_special_tokens=True
        ).replace(" ", "")
        == "amauveshape"
    )
    assert encoders.tokenizer_2.unk_token_id not in encoders.tokenizer_2("a mauve one?").input_ids


def test_texts_differ_for_both_encoders(encoders: Encoders) -> None:
    captions = Captions(["a red circle", "a blue circle", "a sks shape"], encoders)
    for states in (captions.pooled, captions.embeds.flatten(1)):
        apart = torch.cdist(states, states)[*torch.triu_indices(3, 3, 1)]
        assert apart.min() > 0.1 * states.norm(dim=1).mean()


@torch.no_grad()
def test_little_padding_with_the_bias_does_what_much_padding_does(encoders: Encoders) -> None:
    captions = Captions(["a red circle", "a shape"], encoders)
    transformer: Any = build_transformer(seed=0)
    draw_weights(transformer, 0)
    numbers, padded_to = captions.numbers(["a red circle", "a shape"]), 40
    read = encoders.tokenizer_2(
        captions.texts, padding="max_length", max_length=padded_to, return_tensors="pt"
    )
    latents = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0))
    places = FluxPipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32)

    def velocity(embeds: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return transformer(
            hidden_states=latents,
            encoder_hidden_states=embeds,
            pooled_projections=captions.pooled[numbers],
            timestep=torch.tensor([0.3, 0.8]),
            img_ids=places,
            txt_ids=torch.zeros(embeds.shape[1], 3),
            guidance=torch.ones(2),
            joint_attention_kwargs={"attention_mask": bias},
            return_dict=False,
        )[0]

    embeds = captions.embeds[numbers]
    much = velocity(encoders.text_encoder_2(read.input_ids)[0][numbers], None)
    little = velocity(embeds, captions.bias(numbers, len(places), padded_to))
    assert_close(little, much, rtol=1e-3, atol=1e-4)
    assert (velocity(embeds, None) - much).abs().max() > 1e-2  # or the bias would do nothing


def test_latents_are_centred_and_of_unit_spread_by_the_config_of_the_vae() -> None:
    vae = build_vae(seed=0)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(6, 3, 64, 64, generator=generator) * 2 - 1
    latents = Latents.of(vae, pixels)
    sample, _ = latents.noised(torch.arange(6).repeat(20), torch.full((120,), 1e-6), generator)
    assert sample.shape == (120, 16, 64)
    assert abs(sample.mean()) < 0.05 and abs(sample.std() - 1) < 0.05
    with torch.no_grad():
        mode = vae.encode(pixels).latent_dist.mode()
    shifted = (mode - vae.config.shift_factor) * vae.config.scaling_factor
    assert_close(latents.means[0], shifted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sigma", [0.1, 0.6, 0.95])
def test_the_velocity_to_learn_is_the_best_guess_at_that_of_a_draw(sigma: float) -> None:
    mean, std, draws = 0.7, 0.5, 400
    shape = (2, 1, 16, 8, 8)
    latents = Latents(torch.full(shape, mean), torch.full(shape, std))
    generator = torch.Generator().manual_seed(0)
    rows = torch.zeros(draws, dtype=torch.long)
    noised, velocity = latents.noised(rows, torch.full((draws,), sigma), generator)
    drawn_latents = mean + std * torch.randn(noised.shape, generator=generator)
    noise = torch.randn(noised.shape, generator=generator)
    mixed, target = (1 - sigma) * drawn_latents + sigma * noise, noise - drawn_latents
    assert_close(noised.mean(), mixed.mean(), rtol=0, atol=0.01)
    assert_close(noised.std(), mixed.std(), rtol=0.01, atol=0)
    slope, best = (
        torch.cov(torch.stack([x.flatten(), y.flatten()]))[0, 1] / x.var()
        for x, y in ((noised, velocity), (mixed, target))
    )
    assert_close(slope, best, rtol=0, atol=0.02)
    assert_close(velocity.mean(), target.mean(), rtol=0, atol=0.02)
    assert velocity.var() < target.var()


def test_psnr_is_that_of_the_error() -> None:
    pixels = torch.zeros(2, 3, 8, 8)
    posterior = SimpleNamespace(mode=lambda: pixels)
    vae = SimpleNamespace(
        device="cpu",
        encode=lambda batch: SimpleNamespace(latent_dist=posterior),
        decode=lambda latents: SimpleNamespace(sample=latents + 0.2),
    )
    assert psnr(vae, pixels) == pytest.approx(20.0)  # an error of a tenth of the range


def test_right_are_pictures_of_the_asked_colour_and_shape() -> None:
    def pipeline(prompts: list[str], **options: Any) -> Any:
        return SimpleNamespace(images=[drawn("red", "circle"), drawn("blue", "circle")])

    assert right_share(pipeline, ["a red circle"], 2) == 0.5
    assert right_share(pipeline, ["a red circle", "a red triangle"], 2) == 0.25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vae_steps": 0}, "vae_steps is 0"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"batch_size": True}, "batch_size is True"),
        ({"learning_rate": 0}, "learning_rate is 0"),
        ({"held_out": "mauve circle"}, "held_out is 'mauve circle', but it must be a colour"),
    ],
)
def test_bad_settings_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SHORT, **change)


def test_too_few_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 1 picture.*two are needed"):
        build(save_part(tmp_path / "train", pictures=1), tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_a_loss_that_is_no_number_ends_the_training(part: Path, tmp_path: Path) -> None:
    wild = TinyFluxSettings(vae_steps=4, steps=1, learning_rate=1e30)
    with pytest.raises(ValueError, match="of 'rebuild': try a lower learning_rate"):
        build_pipeline(part, tmp_path / "base", settings=wild, seed=0, progress=False)
    assert not (tmp_path / "base").exists()

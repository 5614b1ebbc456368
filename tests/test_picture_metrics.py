"""Scores of pictures, against plain computations with tiny CLIP and ViT models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)

from emloc.metrics import pictures as module
from emloc.metrics.pictures import PICTURE_METRICS, check_picture_metrics, picture_scores
from tests.test_shapes import drawn
from tests.tiny_diffusion import draw_weights, tiny_clip_tokenizer

SIZE = 32
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]
WIDTHS: dict[str, Any] = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
)
PROMPTS = ["a blue triangle", "some longer text of a dog"]


def processor(folder: Path, kind: str) -> None:
    """Pictures of SIZE are only normalised by it."""
    side = {"height": SIZE, "width": SIZE}
    content = {
        "image_processor_type": kind, "do_resize": True, "do_normalize": True, "do_rescale": True,
        "image_mean": MEAN, "image_std": STD, "size": side, "crop_size": side, "resample": 3,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


def save(model: PreTrainedModel, folder: Path, kind: str) -> str:
    draw_weights(model, 0)
    model.save_pretrained(folder)
    processor(folder, kind)
    return str(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = tiny_clip_tokenizer()
    tokenizer.save_pretrained(folder)
    text = dict(
        vocab_size=len(tokenizer), max_position_embeddings=40, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id, **WIDTHS,
    )  # fmt: skip
    vision = dict(image_size=SIZE, patch_size=8, **WIDTHS)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    return save(CLIPModel(config), folder, "CLIPImageProcessor")


def save_vit(folder: Path, kind: str = "vit") -> str:
    if kind == "dinov2":
        config = Dinov2Config(image_size=SIZE, patch_size=8, mlp_ratio=2, **_without_middle())
        return save(Dinov2Model(config), folder, "ViTImageProcessor")
    return save(
        ViTModel(ViTConfig(image_size=SIZE, patch_size=8, **WIDTHS), add_pooling_layer=False),
        folder,
        "ViTImageProcessor",
    )


def _without_middle() -> dict[str, Any]:
    return {name: value for name, value in WIDTHS.items() if name != "intermediate_size"}


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_vit(tmp_path_factory.mktemp("dino"))


def some_pictures(count: int, seed: int, mode: str = "RGB") -> list[Image.Image]:
    noise = np.random.default_rng(seed)
    return [
        Image.fromarray(noise.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).convert(mode)
        for _ in range(count)
    ]


def values(images: list[Image.Image]) -> torch.Tensor:
    stacked = np.stack([np.asarray(image.convert("RGB")) for image in images]) / 255
    return torch.tensor((stacked - MEAN) / STD, dtype=torch.float32).permute(0, 3, 1, 2)


def scores(names: list[str], shown: Any, references: Any = (), **other: Any) -> dict[str, float]:
    models = {"clip": None, "dino": None, "concept": None, "device": "cpu", **other}
    return picture_scores(names, shown, PROMPTS[: len(shown)], references, **models)


@torch.no_grad()
def test_the_scores_are_the_plain_ones(clip: str, dino: str) -> None:
    shown, references = [some_pictures(3, 1), some_pictures(2, 2)], some_pictures(4, 3, "RGBA")
    got = scores(["dino", "clip_t", "clip_i"], shown, references, clip=clip, dino=dino)
    assert list(got) == ["dino", "clip_t", "clip_i"]
    clip_model, vit = CLIPModel.from_pretrained(clip), AutoModel.from_pretrained(dino)
    tokenizer = tiny_clip_tokenizer()
    everything = [*shown[0], *shown[1], *references]
    told, pairs = [], {"clip_i": [], "dino": []}
    for number, image in enumerate([*shown[0], *shown[1]]):
        text = tokenizer([PROMPTS[int(number > 2)]], return_tensors="pt")
        both = clip_model(pixel_values=values([image]), **text)
        told.append(cosine_similarity(both.image_embeds, both.text_embeds).item())
    text = tokenizer(["a"], return_tensors="pt")
    embedded = clip_model(pixel_values=values(everything), **text).image_embeds
    tokens = vit(pixel_values=values(everything)).last_hidden_state[:, 0]
    for name, rows in (("clip_i", embedded), ("dino", tokens)):
        for row in rows[:5]:
            pairs[name] += [cosine_similarity(row, other, dim=0).item() for other in rows[5:]]
    expected = {"clip_t": np.mean(told), **{name: np.mean(pairs[name]) for name in pairs}}
    assert len(set(got.values())) == 3 and all(abs(value) < 0.99 for value in got.values())
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, abs=2e-6), name  # measured 1e-7


def test_the_same_picture_gives_one(clip: str, tmp_path: Path) -> None:
    (picture,) = some_pictures(1, 5)
    dino = save_vit(tmp_path, "dinov2")
    for name in ("clip_i", "dino"):
        got = scores([name], [[picture] * 2], [picture], clip=clip, dino=dino)
        assert got[name] == pytest.approx(1, abs=1e-6)
        other = scores([name], [some_pictures(1, 6)], [picture], clip=clip, dino=dino)
        assert other[name] < 0.999


def test_batches_do_not_matter(clip: str, dino: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, references = [some_pictures(3, 1), some_pictures(3, 2)], some_pictures(2, 3)
    names = ["clip_t", "clip_i", "dino"]
    whole = scores(names, shown, references, clip=clip, dino=dino)
    monkeypatch.setattr(module, "BATCH", 1)
    single = scores(names, shown, references, clip=clip, dino=dino)
    assert single == pytest.approx(whole, abs=2e-6)


def test_a_prompt_longer_than_clip_takes_is_cut(clip: str) -> None:
    prompts = ["a b c d e f g h i j k l m n o p q r s t u v w x y z " * 3 + end for end in "xy"]
    shown = [some_pictures(1, 1)] * 2
    got = [
        picture_scores(["clip_t"], [row], [prompt], [], clip=clip, dino=None, concept=None,
                       device="cpu")
        for row, prompt in zip(shown, prompts, strict=True)
    ]  # fmt: skip
    assert got[0] == got[1]


def test_shape_and_color_is_the_share_of_pictures_that_show_the_concept() -> None:
    blue, red = ((0, 0, 255), (255, 0, 0))
    shown = [
        [drawn(blue, "triangle"), drawn(blue, "circle"), drawn(blue, "triangle", place=(20, 40))],
        [drawn(red, "triangle")],
    ]
    assert scores(["shape_and_color"], shown, concept="blue triangle") == {"shape_and_color": 0.5}
    assert scores(["shape_and_color"], shown, concept="red triangle") == {"shape_and_color": 0.25}
    assert scores(["shape_and_color"], shown, concept="black circle") == {"shape_and_color": 0.0}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clip_t", "clip_t needs evaluate.pictures.clip, which is not set: write the folder or"),
        ("clip_i", "clip_i needs evaluate.pictures.clip,"),
        ("dino", "dino needs evaluate.pictures.dino, which is not set: .* or leave dino out"),
        ("shape_and_color", "needs evaluate.pictures.concept, which is not set: write a colour"),
        ("clipt", r"is 'clipt' \(did you mean clip_t\?\), but it must be one of shape_and_color,"),
    ],
)
def test_a_metric_without_what_it_needs_is_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_picture_metrics([name], None, None, None)
    with pytest.raises(ValueError, match=message):
        scores([name], [some_pictures(1, 0)])
    check_picture_metrics(PICTURE_METRICS, "clip", "dino", "blue triangle")
    check_picture_metrics([], None, None, None)


@pytest.mark.parametrize("concept", ["dog", "triangle", "triangle blue", "a blue triangle", "pink"])
def test_a_concept_that_cannot_be_measured_is_named(concept: str) -> None:
    message = f"evaluate.pictures.concept is '{concept}', but it must be a colour"
    with pytest.raises(ValueError, match=message):
        check_picture_metrics(["shape_and_color"], None, None, concept)
    check_picture_metrics(["clip_t"], "clip", None, concept)  # nothing measures it


def test_bad_models_are_named(clip: str, dino: str, tmp_path: Path) -> None:
    shown = [some_pictures(1, 0)]
    cases: list[tuple[str, dict[str, str], str]] = [
        ("clip_t", {"clip": dino}, f"clip is '{dino}', .*it is of type vit, not clip"),
        ("dino", {"dino": clip}, r"dino is .*it is of type clip, not vit or dinov2"),
        ("clip_t", {"clip": str(tmp_path / "none")}, "clip is .*none', which could not be loaded"),
    ]
    for name, models, message in cases:
        with pytest.raises(ValueError, match=f"evaluate.pictures.{message}"):
            scores([name], shown, shown[0], **models)


def test_a_model_without_all_its_weights_is_refused(dino: str, tmp_path: Path) -> None:
    for file in Path(dino).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    name = sorted(weights)[-1]
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shown = some_pictures(1, 0)
    with pytest.raises(ValueError, match="its files hold no weights for"):
        scores(["dino"], [shown], shown, dino=str(tmp_path))


def test_pictures_prompts_and_references_must_be_there(clip: str) -> None:
    shown = some_pictures(1, 0)
    with pytest.raises(ValueError, match=r"pictures \[1, 0\] for 2 prompts, but each"):
        scores(["clip_t"], [shown, []], clip=clip)
    with pytest.raises(ValueError, match=r"pictures \[1\] for 0 prompts"):
        picture_scores(["clip_t"], [shown], [], [], clip=clip, dino=None, concept=None,
                       device="cpu")  # fmt: skip
    with pytest.raises(ValueError, match="clip_i compares with pictures of the subject, but there"):
        scores(["clip_i"], [shown], clip=clip)

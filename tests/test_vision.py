"""Rows with pictures as inputs: what the model's own processor gives, with labels on answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from emloc.families import TextCodec, VisionCodec, load_codec
from emloc.families.text import prompt_ids
from emloc.models import sees_pictures
from tests.tiny import save_tiny
from tests.tiny_vision import FAMILIES, conversation, save_picture, save_tiny_vision

TALK = {
    "messages": [
        {"role": "user", "content": [{"type": "image", "image": "a.png"},
                                     {"type": "text", "text": "This?"}]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": [{"type": "text", "text": "And "},
                                     {"type": "image", "image": "wide.png"},
                                     {"type": "text", "text": " this?"}]},
        {"role": "assistant", "content": "blue"},
    ]
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    save_picture(folder / "a.png", 28, 28)
    save_picture(folder / "wide.png", 90, 40, seed=1)
    save_picture(folder / "tall.png", 40, 90, seed=2)
    return folder


@pytest.fixture(scope="module")
def internvl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vision("internvl-llama", tmp_path_factory.mktemp("internvl"))


def encode(codec: Any, row: dict[str, Any]) -> Any:
    (example,) = codec.encode([row], max_length=4000, source="s")
    return example


def parts(turn: dict[str, Any]) -> dict[str, Any]:
    content = turn["content"]
    return {**turn, "content": [{"type": "text", "text": content}]} if isinstance(
        content, str
    ) else turn  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_and_pixels_are_the_processor_s_own(family: str, tmp_path: Path, root: Path) -> None:
    codec = load_codec(save_tiny_vision(family, tmp_path), root=root)
    assert isinstance(codec, VisionCodec)
    rows = [TALK, conversation("tall.png", "a.png", question="Which?", answer="a")]
    names = [["a.png", "wide.png"], ["tall.png", "a.png"]]
    images = [[Image.open(root / name) for name in row] for row in names]
    texts = [
        codec.tokenizer.apply_chat_template([parts(t) for t in row["messages"]], tokenize=False)
        for row in rows
    ]
    whole = codec.processor(text=texts, images=images, padding=True, return_tensors="pt")
    examples = codec.encode(rows, max_length=4000, source="s")
    for ids, mask, example in zip(
        whole["input_ids"], whole["attention_mask"], examples, strict=True
    ):
        expected = ids[mask.bool()].tolist()
        assert example["input_ids"] == expected[: len(example["input_ids"])]
        rest = codec.tokenizer.decode(expected[len(example["input_ids"]) :])
        assert rest == "\n"  # the template's last line break is not learnt
    batch = codec.collate(examples, side="right")
    pixels = [name for name in whole if name not in ("input_ids", "attention_mask")]
    for name in pixels:
        length = batch["input_ids"].shape[1] if "type" in name else None
        torch.testing.assert_close(batch[name], whole[name][:, :length] if length else whole[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_alone_are_labelled(family: str, tmp_path: Path, root: Path) -> None:
    codec = load_codec(save_tiny_vision(family, tmp_path), root=root)
    example = encode(codec, TALK)
    labelled = [token for token in example["labels"] if token != -100]
    assert codec.tokenizer.decode(labelled) == "red<|im_end|>blue<|im_end|>"
    prompt = codec.tokenizer.decode(prompt_ids(example))
    assert prompt.endswith(" this?<|im_end|>\n<|im_start|>assistant\n")
    assert example["pictures"] == ["a.png", "wide.png"]


def test_more_tiles_are_allowed_by_the_settings(internvl: Path, root: Path) -> None:
    row = conversation("wide.png")
    lengths = {}
    for most in (1, 2, 6):
        codec = load_codec(internvl, root=root, pictures={"max_patches": most, "min_patches": 1})
        example = encode(codec, row)
        pixels = codec.collate([example], side="right")["pixel_values"]
        marks = example["input_ids"].count(codec.processor.image_token_id)
        assert marks == 4 * len(pixels)
        lengths[most] = len(pixels)
    assert lengths[1] == 1 < lengths[2] <= 3 and lengths[6] > lengths[1]


def test_rows_of_text_need_no_picture(internvl: Path) -> None:
    codec = load_codec(internvl)
    example = encode(codec, {"prompt": "one", "answer": "two"})
    batch = codec.collate([example], side="left")
    assert "pixel_values" not in batch and example["pictures"] == []
    said = codec.tokenizer.decode(example["input_ids"])
    assert said == "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>"


def test_each_size_is_tried_once(internvl: Path, root: Path, monkeypatch: Any) -> None:
    codec = load_codec(internvl, root=root)
    sizes: list[Any] = []
    process = VisionCodec._process

    def counted(self: Any, rows: Any, **options: Any) -> Any:
        sizes.extend(image.size for row in rows for image in row)
        return process(self, rows, **options)

    monkeypatch.setattr(VisionCodec, "_process", counted)
    rows = [conversation("a.png"), conversation("wide.png", "a.png"), conversation("a.png")]
    codec.encode(rows, max_length=4000, source="s")
    assert sorted(sizes) == [(28, 28), (90, 40)]


def test_a_setting_that_the_processor_lacks_raises(internvl: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data.pictures sets max_pixels to 9, but this model's"):
        load_codec(internvl, pictures={"max_pixels": 9})
    with pytest.raises(ValueError, match="max_patches to 3, but a language model sees none"):
        load_codec(save_tiny("llama", tmp_path), pictures={"max_patches": 3})


def test_a_mark_in_the_text_raises(internvl: Path, root: Path) -> None:
    codec = load_codec(internvl, root=root)
    row = conversation("a.png", question="What does <IMG_CONTEXT> mean?")
    with pytest.raises(ValueError, match="s: row 1 has 1 pictures, but .* 2 places"):
        encode(codec, row)
    with pytest.raises(ValueError, match="s: row 1 has 0 pictures, but"):
        encode(codec, {"prompt": "hi", "answer": "<IMG_CONTEXT>"})


def test_a_long_row_is_refused_and_its_answer_never_cut(internvl: Path, root: Path) -> None:
    codec = load_codec(internvl, root=root, pictures={"max_patches": 12})
    with pytest.raises(ValueError, match=r"s: row 1 has \d+ tokens, but max_length is 40"):
        codec.encode([conversation("wide.png")], max_length=40, source="s")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "s: row 2: there is no picture"),
        (lambda path: path.write_text("text"), "s: row 2: .* is not a picture"),
    ],
)
def test_a_picture_that_is_not_one_names_its_row(
    spoil: Any, message: str, internvl: Path, tmp_path: Path
) -> None:
    save_picture(tmp_path / "good.png", 28, 28)
    spoil(Path(save_picture(tmp_path / "bad.png", 28, 28)))
    codec = load_codec(internvl, root=tmp_path)
    rows = [conversation("good.png"), conversation("bad.png")]
    with pytest.raises(ValueError, match=message):
        codec.encode(rows, max_length=4000, source="s")


def test_a_language_model_refuses_pictures(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    codec = load_codec(folder)
    assert type(codec) is TextCodec and not sees_pictures(folder)
    with pytest.raises(ValueError, match="s: row 1 has pictures, which a language model cannot"):
        encode(codec, conversation("a.png"))


def test_a_missing_processor_file_raises_in_one_sentence(tmp_path: Path) -> None:
    folder = save_tiny_vision("internvl-llama", tmp_path)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="the processor of .* cannot be read") as caught:
        load_codec(folder)
    assert "\n" not in str(caught.value)


def test_a_model_without_marks_for_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "blip-2"}')
    with pytest.raises(ValueError, match="models of type 'blip-2' are not supported"):
        load_codec(tmp_path)


def test_the_chat_template_may_be_the_processor_s(tmp_path: Path, root: Path) -> None:
    folder = save_tiny_vision("internvl-llama", tmp_path)
    expected = encode(load_codec(folder, root=root), TALK)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="need a chat template"):
        encode(load_codec(folder, root=root), TALK)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert encode(load_codec(folder, root=root), TALK) == expected

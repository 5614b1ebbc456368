"""The base that the project trains itself: whole, repeatable, and taught by yes and no alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch import nn
from transformers import AutoModelForImageTextToText

from emloc.bases import easy_vqa
from emloc.bases.easy_vqa import EasyVqaSettings, build_base
from emloc.bases.internvl import build_model, build_tokenizer, image_processor, save_checkpoint
from emloc.bases.packing import ANSWERS, Packer
from emloc.bases.questions import NOT_ASKED, Questions, read_questions
from emloc.data import easy_vqa_rows
from emloc.families import load_codec
from emloc.files import digest, read_json
from emloc.targets import select
from tasks import prepare, pretrain
from tasks.params import load_params
from tests.project import ROOT

SHAPES, COLOURS = ("circle", "rectangle"), ("red", "blue", "green")
SHORT = EasyVqaSettings(vision_steps=1, steps=1, batch_size=4)
OPEN = [["what color is the shape?", "mauve", 0], ["what is the red shape?", "dodecagon", 1]]


def entries(pictures: int) -> list[list[Any]]:
    """Questions about one shape on each picture; not each is asked everywhere."""
    made = []
    for number in range(pictures):
        shape, colour = SHAPES[number % 2], COLOURS[number % 3]
        for word in (*SHAPES, *(f"{name} shape" for name in COLOURS)):
            there = word == shape or word.startswith(colour)
            made.append([f"is there a {word}?", "yes" if there else "no", number])
            if number % 4:
                made.append([f"is there not a {word}?", "no" if there else "yes", number])
    return made


def save_part(folder: Path, pictures: int = 8, extra: list[list[Any]] | None = None) -> Path:
    """A part of a small data set in easy-VQA's layout."""
    (folder / "images").mkdir(parents=True)
    for number in range(pictures):
        image = Image.new("RGB", (64, 64), "white")
        draw = ImageDraw.Draw(image)
        draw_shape = draw.ellipse if number % 2 == 0 else draw.rectangle
        left = 4 + 3 * number % 24
        draw_shape((left, 10, left + 30, 34), fill=COLOURS[number % 3])
        image.save(folder / "images" / f"{number}.png")
    (folder / "questions.json").write_text(json.dumps([*(extra or []), *entries(pictures)]))
    return folder


def build(folder: Path, out: Path, settings: EasyVqaSettings = SHORT, seed: int = 0) -> Any:
    return build_base(folder, out, settings=settings, seed=seed, progress=False)


def content(folder: Path) -> str:
    """A hash of all files of a folder, by name."""
    files = sorted(folder.iterdir())
    return digest({"names": [file.name for file in files]}, files)


def questions_of(folder: Path) -> Questions:
    process = image_processor()
    return read_questions(folder, lambda p: process(p, return_tensors="pt")["pixel_values"])


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_part(tmp_path_factory.mktemp("easy-vqa") / "train")


@pytest.fixture(scope="module")
def base(part: Path) -> Path:
    """A base that has barely begun to learn."""
    build(part, part.parent / "base")
    return part.parent / "base"


def test_the_checkpoint_is_whole_and_answers(base: Path, part: Path) -> None:
    model, report = AutoModelForImageTextToText.from_pretrained(base, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert 3e6 < sum(parameter.numel() for parameter in model.parameters()) < 8e6
    codec = load_codec(base)
    example = codec.encode(easy_vqa_rows(part)[:1], max_length=96, source="rows")[0]
    batch = codec.collate([example], side="left")
    del batch["labels"]
    output = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert output.shape[1] > batch["input_ids"].shape[1]
    end = codec.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id == end


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(
    base: Path, part: Path, tmp_path: Path
) -> None:
    build(part, tmp_path / "again")
    assert content(tmp_path / "again") == content(base)
    build(part, tmp_path / "other", seed=1)
    assert content(tmp_path / "other") != content(base)


def test_other_questions_change_nothing(base: Path, tmp_path: Path) -> None:
    with_open = save_part(tmp_path / "train", extra=OPEN)
    assert len(easy_vqa_rows(with_open, subset="open")) == len(OPEN)
    build(with_open, tmp_path / "base")
    assert content(tmp_path / "base") == content(base)
    words = load_codec(base).tokenizer.get_vocab()
    assert {"Ġred", "Ġyes"} < words.keys() and not {"Ġmauve", "Ġwhat", "Ġcolor"} & words.keys()


TOKENIZER = build_tokenizer(["is there a red shape?", *ANSWERS])


@given(st.text())
def test_no_letter_is_lost(text: str) -> None:
    numbers = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.decode(numbers).strip(" ") == text.strip(" ")


def test_a_word_is_one_token_wherever_it_stands() -> None:
    assert TOKENIZER.tokenize("red") == TOKENIZER.tokenize("red shape")[:1] == ["Ġred"]
    assert TOKENIZER.tokenize("shape red?") == ["Ġshape", "Ġred", "?"]
    assert TOKENIZER.tokenize("<|im_end|>") == ["<|im_end|>"]


def test_packed_questions_get_the_logits_that_each_gets_alone(part: Path, tmp_path: Path) -> None:
    questions = questions_of(part).at(torch.tensor([1, 2]))
    tokenizer = build_tokenizer([*questions.texts, *ANSWERS])
    model = build_model(tokenizer, seed=0).eval()
    packer = Packer(tokenizer, questions, question_weight=0.0, device=torch.device("cpu"))
    packed = packer.pack(questions, 3, torch.Generator().manual_seed(0))
    assert int(packed.decisive.sum()) == 2 * 3
    save_checkpoint(model, tokenizer, tmp_path / "base")
    codec = load_codec(tmp_path / "base")
    rows = [row for row in easy_vqa_rows(part) if "1.png" in str(row) or "2.png" in str(row)]
    examples = codec.encode(rows, max_length=96, source="rows")
    found = 0
    with torch.no_grad():
        together = model(**packed.inputs).logits
        for row, segment in ((row, segment) for row in range(2) for segment in range(3)):
            length = packer.rest.shape[2]
            start = len(packer.picture) + segment * length
            ids = packed.inputs["input_ids"][row]
            alone = torch.cat([ids[: len(packer.picture)], ids[start : start + length]]).tolist()
            (example,) = (e for e in examples if alone[: len(e["input_ids"])] == e["input_ids"])
            batch = codec.collate([example], side="right")
            del batch["labels"]
            where = packed.decisive[row, start : start + length].nonzero().item() + start
            before = len(example["input_ids"]) - 3  # the answer and its end follow
            single = model(**batch).logits[0, before]
            torch.testing.assert_close(  # measured: 2e-6
                together[row, where - 1], single, atol=2e-5, rtol=0
            )
            found += 1
    assert found == 6


def test_every_question_asked_is_packed_once_and_no_other(part: Path) -> None:
    questions = questions_of(part)
    asked = (questions.answers != NOT_ASKED).sum(1)
    assert asked.min() < asked.max()
    tokenizer = build_tokenizer([*questions.texts, *ANSWERS])
    packer = Packer(tokenizer, questions, question_weight=0.0, device=torch.device("cpu"))
    packed = packer.pack(questions, int(asked.max()), torch.Generator().manual_seed(0))
    assert packed.decisive.sum(1).tolist() == asked.tolist()
    said = packed.inputs["input_ids"][packed.decisive].tolist()
    yes = (questions.answers == 1).sum().item()
    assert said.count(tokenizer.get_vocab()["Ġyes"]) == yes


def test_words_count_only_where_the_rarer_answer_is_given(part: Path) -> None:
    questions = questions_of(part)
    tokenizer = build_tokenizer([*questions.texts, *ANSWERS])
    packer = Packer(tokenizer, questions, question_weight=0.5, device=torch.device("cpu"))
    weighted = (packer.weights == 0.5).any(-1)  # (Q, 2): no, yes
    red, not_red = (questions.texts.index(f"is there {word} red shape?") for word in ("a", "not a"))
    assert weighted[red].tolist() == [False, True]
    assert weighted[not_red].tolist() == [True, False]


@pytest.mark.slow
def test_the_loss_falls_and_the_answers_get_right(tmp_path: Path) -> None:
    folder = save_part(tmp_path / "train", pictures=16)
    short = build(folder, tmp_path / "short")
    settings = EasyVqaSettings(vision_steps=30, steps=30, batch_size=8)
    long = build(folder, tmp_path / "long", settings)
    assert long["vision_loss"] < 0.5 * short["vision_loss"]
    assert long["loss"] < 0.5 * short["loss"]
    assert long["yes_no_accuracy"] > short["yes_no_accuracy"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"vision_steps": 1.5}, "vision_steps is 1.5"),
        ({"batch_size": True}, "batch_size is True"),
        ({"learning_rate": 0}, "learning_rate is 0, but it must be a number above 0"),
    ],
)
def test_bad_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EasyVqaSettings(**values)


def test_one_picture_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="about 1 picture only"):
        build(save_part(tmp_path / "train", pictures=1), tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_a_loss_that_is_not_finite_stops_and_leaves_what_was_there(
    part: Path, tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "mine").touch()
    wild = EasyVqaSettings(vision_steps=6, steps=1, batch_size=4, learning_rate=1e30)
    with pytest.raises(ValueError, match=r"loss became \w+ at step \d of 'see'.*lower"):
        build(part, tmp_path / "base", wild)
    assert [file.name for file in (tmp_path / "base").iterdir()] == ["mine"]


def preset(folder: Path, part: Path, **changes: Any) -> None:
    """The preset's params in `folder`, on a small data set and with few steps."""
    params = yaml.safe_load((ROOT / "presets/easy-vqa.yaml").read_text())
    few = {"vision_steps": 1, "steps": 1, "batch_size": 4}
    params["pretrain"] |= {"source": str(part), "sha256": None, **few}
    sizes = {"train": 2, "validation": 1, "test": 1}
    params["data"] |= {"source": str(part), "test_source": None, "sha256": None, **sizes}
    params["calibrate"]["samples"] = 1
    params |= {"device": "cpu", **changes}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMLOC_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_the_stage_makes_the_original_that_prepare_takes(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [[text, answer, number] for text, answer, _ in OPEN for number in range(4)]
    preset(project, save_part(project / "train", extra=more))
    pretrain.run(load_params())
    metrics = read_json("results/pretrain.json")
    assert "% of the held-out yes/no questions right" in capsys.readouterr().out
    assert 0 <= metrics["yes_no_accuracy"] <= 1 and metrics["parameters"] > 3e6
    assert read_json("results/pretrain.cost.json")["seconds"] > 0
    prepare.run(load_params())
    assert read_json("artifacts/model.json")["model_type"] == "internvl"
    assert read_json("results/prepare.json")["rows"]["train"] == 2


def test_without_a_recipe_the_stage_leaves_no_model(
    project: Path, part: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {"source": "org/name", "dtype": "float32"}
    preset(project, part, pretrain=None, model=model)
    pretrain.run(load_params())
    assert "skipped" in capsys.readouterr().out
    assert [file.read_text() for file in Path("artifacts/base").iterdir()] == ["null\n"]
    assert read_json("results/pretrain.json") == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrain": None}, "pretrain is null, but model.source is 'artifacts/base'"),
        ({"model": {"source": "org/name"}}, "pretrain is set, but model.source is 'org/name'"),
        ({"pretrain": {"recipe": "other"}}, "pretrain.recipe is 'other'"),
        (
            {"pretrain": {"source": "x"}},
            "pretrain.recipe is missing",
        ),
        (
            {"pretrain": {"recipe": "easy-vqa", "source": "x", "stps": 1}},
            "pretrain.stps is no known key; did you mean steps?",
        ),
    ],
)
def test_a_recipe_and_its_original_belong_together(
    project: Path, part: Path, changes: dict[str, Any], message: str
) -> None:
    preset(project, part, **changes)
    with pytest.raises(ValueError) as raised:
        load_params()
    assert message in str(raised.value)


def test_the_preset_compresses_both_towers_and_leaves_the_projector_whole() -> None:
    params = load_params(ROOT / "presets/easy-vqa.yaml")
    model = build_model(TOKENIZER, seed=0)
    chosen = set(select(model, params.calibrate.targets, where="calibrate.targets").values())
    towers = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    inside = {part for tower in towers for part in tower.modules() if isinstance(part, nn.Linear)}
    assert chosen == inside and len(inside) == 4 * 6 + 4 * 7
    assert not chosen & set(model.model.multi_modal_projector.modules())
    assert easy_vqa.EasyVqaSettings(
        **{name: getattr(params.pretrain, name) for name in ("vision_steps", "steps")}
    )

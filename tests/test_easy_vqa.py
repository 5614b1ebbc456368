"""easy-VQA, in a small folder with the layout of its package."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from emloc.data import easy_vqa_captions, easy_vqa_rows, read_data
from emloc.data.easy_vqa import COLORS, SHAPES
from emloc.pictures import pictures_of
from tests.test_pictures import save_picture

ENTRIES = [
    ["what is the blue shape?", "rectangle", 0],
    ["is there a circle?", "no", 0],
    ["what color is the shape?", "teal", 7],
    ["does the image contain a triangle?", "yes", 7],
]


def save_part(folder: Path, entries: Any) -> Path:
    """One part of the data set."""
    for number in (0, 7):
        save_picture(folder / "images" / f"{number}.png", (64, 64), seed=number)
    (folder / "questions.json").write_text(json.dumps(entries))
    return folder


def test_each_question_is_a_row_after_its_picture(tmp_path: Path) -> None:
    rows = easy_vqa_rows(save_part(tmp_path / "train", ENTRIES))
    picture = str(tmp_path / "train" / "images" / "0.png")
    assert rows[0] == {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": picture},
                    {"type": "text", "text": "what is the blue shape?"},
                ],
            },
            {"role": "assistant", "content": "rectangle"},
        ]
    }
    assert [row["messages"][0]["content"][1]["text"] for row in rows] == [e[0] for e in ENTRIES]
    assert all(Path(path).is_file() for row in rows for path in pictures_of(row))
    assert easy_vqa_rows(tmp_path / "train") == rows


def test_subsets_part_the_questions(tmp_path: Path) -> None:
    folder = save_part(tmp_path, ENTRIES)
    rows = read_data(folder, format="easy-vqa")
    assert read_data(folder, format="easy-vqa", subset="yes-no") == rows[1::2]
    assert read_data(folder, format="easy-vqa", subset="open") == rows[0::2]
    with pytest.raises(ValueError, match="no subset 'colour': take one of yes-no, open, or null"):
        easy_vqa_rows(folder, subset="colour")
    with pytest.raises(ValueError, match=r"questions\.json has no question of the subset open"):
        easy_vqa_rows(save_part(tmp_path / "few", ENTRIES[1:2]), subset="open")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (["what?", "teal"], "is no list of a question, an answer and the number"),
        ({"question": "what?"}, "is no list of a question"),
        (["what?", "teal", "../../x"], "is no list of a question"),
        (["what?", "teal", True], "is no list of a question"),
        (["what?", 3, 7], "the answer is a number, but it must be a string"),
        ([" ", "teal", 7], "the question is empty"),
    ],
)
def test_a_bad_entry_is_named(tmp_path: Path, entry: Any, message: str) -> None:
    folder = save_part(tmp_path, [*ENTRIES, entry])
    where = re.escape(f"{folder}/questions.json: entry 5")
    with pytest.raises(ValueError, match=f"^{where}.*{message}"):
        easy_vqa_rows(folder)
    with pytest.raises(ValueError, match=f"^{where}.*{message}"):
        easy_vqa_captions(folder)


def test_another_folder_or_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no questions\.json: give the folder of one part"):
        easy_vqa_rows(tmp_path)
    with pytest.raises(ValueError, match=r"questions\.json is an object, but it must be a list"):
        easy_vqa_rows(save_part(tmp_path, {"a": 1}))
    with pytest.raises(ValueError, match=r"questions\.json has no question of the subset null"):
        easy_vqa_rows(save_part(tmp_path, []))


RED_CIRCLE = (
    [["what is the color of the circle?", "red", 7]],
    [["what is the red shape?", "circle", 7]],
    [["what color is the shape?", "red", 7], ["what shape is present?", "circle", 7]],
    [["is there a red shape?", "yes", 7], ["does the image contain a circle?", "yes", 7]],
    [["is no red shape present?", "no", 7], ["is there not a circle?", "no", 7]],
    [
        ["is a red shape present?", "yes", 7],
        ["is there a triangle in the image?", "no", 7],
        ["does the image not contain a rectangle?", "yes", 7],
    ],
    [
        ["is there not a red shape in the image?", "no", 7],
        *[[f"is there a {color} shape?", "no", 7] for color in COLORS if color != "red"],
        ["what shape is in the image?", "circle", 7],
    ],
    [
        *[[f"is no {color} shape present?", "yes", 7] for color in COLORS if color != "red"],
        ["Is there a Circle?", "yes", 7],
    ],
)
UNSURE = (
    [["is there a red shape?", "yes", 7], ["is there a circle?", "no", 7]],
    [["what shape is present?", "circle", 7], ["is there a blue shape?", "no", 7]],
    [["is there a red circle?", "no", 7]],
)


@pytest.mark.parametrize("entries", RED_CIRCLE)
def test_a_caption_is_what_the_questions_tell(tmp_path: Path, entries: Any) -> None:
    folder = save_part(tmp_path, entries)
    row = {"image": str(tmp_path / "images" / "7.png"), "caption": "a red circle"}
    assert easy_vqa_captions(folder) == [row] and pictures_of(row) == [row["image"]]
    if len(entries) > 1:
        with pytest.raises(ValueError, match="does not tell of any picture that it shows a color"):
            easy_vqa_captions(save_part(tmp_path, entries[:-1]))


@pytest.mark.parametrize("entries", UNSURE)
def test_pictures_without_a_sure_caption_are_left_out(tmp_path: Path, entries: Any) -> None:
    folder = save_part(tmp_path, [*entries, ["what is the gray shape?", "triangle", 0]])
    [row] = easy_vqa_captions(folder)
    assert row["caption"] == "a gray triangle" and row["image"].endswith("/0.png")


def test_captions_are_in_the_order_of_the_numbers_and_part_by_concept(tmp_path: Path) -> None:
    entries = [
        ["what is the blue shape?", "rectangle", 10],
        ["what is the teal shape?", "circle", 9],
        ["what is the color of the rectangle?", "blue", 0],
        ["is there a teal shape?", "no", 10],
    ]
    folder = save_part(tmp_path, entries)
    rows = read_data(folder, format="easy-vqa-captions")
    assert [Path(row["image"]).stem for row in rows] == ["0", "9", "10"]
    blue = read_data(folder, format="easy-vqa-captions", subset="blue rectangle")
    assert blue == [rows[0], rows[2]] and {row["caption"] for row in blue} == {"a blue rectangle"}
    with pytest.raises(
        ValueError, match=r"not tell of any picture that it shows a red circle: tak"
    ):
        easy_vqa_captions(folder, subset="red circle")


@pytest.mark.parametrize("subset", ["pink circle", "red", "red star", "circle red", "open", ""])
def test_an_unknown_concept_is_refused_with_those_there_are(tmp_path: Path, subset: str) -> None:
    names = f"the colors are {', '.join(COLORS)}, the shapes {', '.join(SHAPES)}"
    with pytest.raises(ValueError, match=f"no pictures of {subset!r}: name one .*; {names}"):
        easy_vqa_captions(save_part(tmp_path, ENTRIES), subset=subset)


@pytest.mark.parametrize(
    "entries",
    [
        [["what color is the shape?", "red", 7], ["what color is the shape?", "blue", 7]],
        [["what color is the shape?", "red", 7], ["is there a red shape?", "no", 7]],
        [[f"is there a {shape}?", "no", 7] for shape in SHAPES],
    ],
)
def test_answers_that_contradict_each_other_are_refused(tmp_path: Path, entries: Any) -> None:
    with pytest.raises(ValueError, match=r"questions\.json: picture 7 is none or more than one of"):
        easy_vqa_captions(save_part(tmp_path, entries))

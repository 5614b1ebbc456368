"""easy-VQA, in a small folder with the layout of its package."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from emloc.data import easy_vqa_rows, read_data
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


def test_another_folder_or_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no questions\.json: give the folder of one part"):
        easy_vqa_rows(tmp_path)
    with pytest.raises(ValueError, match=r"questions\.json is an object, but it must be a list"):
        easy_vqa_rows(save_part(tmp_path, {"a": 1}))
    with pytest.raises(ValueError, match=r"questions\.json has no question of the subset null"):
        easy_vqa_rows(save_part(tmp_path, []))

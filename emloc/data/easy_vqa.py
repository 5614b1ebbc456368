"""easy-VQA: questions about one coloured shape on a picture of 64 x 64 pixels.

The PyPI package `easy-vqa` has a folder for each part, train and test, with `questions.json`, a
list of [question, answer, number of the picture], and `images/NUMBER.png`.

- `easy_vqa_rows`: a row for each question
- `easy_vqa_captions`: a row for each picture, with a caption such as "a red circle"
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emloc.data.parts import image_part, text_part
from emloc.data.rows import Row, check_text, kind
from emloc.files import read_json
from emloc.pictures import below

SUBSETS = ("yes-no", "open")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")

_YES_NO = ("yes", "no")


def easy_vqa_rows(folder: str | os.PathLike[str], *, subset: str | None = None) -> list[Row]:
    """One row for each question of a part, in the order of its file: the picture, then the text.

    Args:
        folder: the folder of one part, `easy_vqa/data/train` or `.../test` in the package.
        subset: "yes-no" for the questions whose answer is yes or no, "open" for those after a
            shape or a colour, None for all.

    Raises:
        ValueError: an unknown subset, no such folder, an entry that is no question, or none left.
    """
    if subset is not None and subset not in SUBSETS:
        raise ValueError(
            f"easy-vqa has no subset {subset!r}: take one of {', '.join(SUBSETS)}, or null for all."
        )
    path, entries = _read(folder)
    rows = [_row(question, answer, picture) for question, answer, _, picture in entries]
    if subset is not None:
        rows = [row for row in rows if _is_yes_no(row) == (subset == "yes-no")]
    if not rows:
        raise ValueError(f"{path} has no question of the subset {subset or 'null'}: take another.")
    return rows


def easy_vqa_captions(folder: str | os.PathLike[str], *, subset: str | None = None) -> list[Row]:
    """One row for each picture of a part, in the order of their numbers: image and caption.

    A caption is "a red circle", from what the questions and answers tell: the answer to an open
    question, a yes, or a no to all colours (or shapes) but one. Pictures whose colour or shape
    stays unknown are left out.

    Args:
        folder: as in `easy_vqa_rows`.
        subset: a colour and a shape, such as "red circle", for the pictures of that; None for all.

    Raises:
        ValueError: an unknown colour or shape, no such folder, an entry that is no question,
            answers that contradict each other, or no picture left.
    """
    if subset not in (None, *(f"{color} {shape}" for color in COLORS for shape in SHAPES)):
        raise ValueError(
            f"easy-vqa has no pictures of {subset!r}: name one color and one shape, such as "
            f"'red circle'; the colors are {', '.join(COLORS)}, the shapes {', '.join(SHAPES)}."
        )
    path, entries = _read(folder)
    facts: dict[int, tuple[str, set[str], set[str]]] = {}
    for question, answer, number, picture in entries:
        _, present, absent = facts.setdefault(number, (picture, set(), set()))
        _learn(question, answer, present, absent)
    rows = []
    for number, (picture, present, absent) in sorted(facts.items()):
        where = f"{path}: picture {number}"
        color = _only(COLORS, present, absent, where)
        shape = _only(SHAPES, present, absent, where)
        if color and shape and subset in (None, f"{color} {shape}"):
            rows.append({"image": picture, "caption": f"a {color} {shape}"})
    if not rows:
        raise ValueError(
            f"{path} does not tell of any picture that it shows a {subset or 'color and a shape'}: "
            "take another subset or another part."
        )
    return rows


def _learn(question: str, answer: str, present: set[str], absent: set[str]) -> None:
    """Add the colours and shapes that a question and its answer tell of."""
    words = set(re.findall(r"[a-z]+", question.lower()))
    named = words & {*COLORS, *SHAPES}
    if answer not in _YES_NO:
        present |= named | {answer}
    elif (answer == "yes") != bool(words & {"no", "not"}):
        present |= named
    else:
        absent |= named


def _only(names: Sequence[str], present: set[str], absent: set[str], where: str) -> str | None:
    """The one of `names` that holds; None if that stays open."""
    left = [name for name in names if name not in absent]
    sure = [name for name in names if name in present]
    if not left or len(sure) > 1 or absent.intersection(sure):
        raise ValueError(
            f"{where} is none or more than one of {', '.join(names)}, or both is and is not one of "
            "them, by its questions: take the file as it is in the package."
        )
    return next(iter(sure or (left if len(left) == 1 else [])), None)


def _is_yes_no(row: Row) -> bool:
    return row["messages"][-1]["content"] in _YES_NO


def _read(folder: str | os.PathLike[str]) -> tuple[Path, list[tuple[str, str, int, str]]]:
    """The file of a part, and its entries: question, answer, picture as a number and a path."""
    path = Path(folder) / "questions.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no questions.json: give the folder of one part of easy-vqa, such as "
            "pypi:easy-vqa==1.0/easy_vqa/data/train/."
        )
    entries = read_json(path)
    if not isinstance(entries, list):
        raise ValueError(f"{path} is {kind(entries)}, but it must be a list of questions.")
    return path, [_entry(entry, path, n) for n, entry in enumerate(entries, start=1)]


def _entry(entry: Any, path: Path, number: int) -> tuple[str, str, int, str]:
    where = f"{path}: entry {number}"
    if not isinstance(entry, list) or len(entry) != 3 or type(entry[2]) is not int:
        raise ValueError(
            f"{where} is no list of a question, an answer and the number of a picture: take the "
            "file as it is in the package."
        )
    question = check_text(entry[0], "the question", where)
    answer = check_text(entry[1], "the answer", where)
    return question, answer, entry[2], below(path.parent, f"images/{entry[2]}.png", where)


def _row(question: str, answer: str, picture: str) -> Row:
    return {
        "messages": [
            {"role": "user", "content": [image_part(picture), text_part(question)]},
            {"role": "assistant", "content": answer},
        ]
    }

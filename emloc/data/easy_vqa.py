"""easy-VQA: questions about one coloured shape on a picture of 64 x 64 pixels.

The PyPI package `easy-vqa` has a folder for each part, train and test, with `questions.json`, a
list of [question, answer, number of the picture], and `images/NUMBER.png`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from emloc.data.parts import image_part, text_part
from emloc.data.rows import Row, check_text, kind
from emloc.files import read_json
from emloc.pictures import below

SUBSETS = ("yes-no", "open")


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
    path = Path(folder) / "questions.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no questions.json: give the folder of one part of easy-vqa, such as "
            "pypi:easy-vqa==1.0/easy_vqa/data/train/."
        )
    entries = read_json(path)
    if not isinstance(entries, list):
        raise ValueError(f"{path} is {kind(entries)}, but it must be a list of questions.")
    rows = [_row(entry, path, number) for number, entry in enumerate(entries, start=1)]
    if subset is not None:
        rows = [row for row in rows if _is_yes_no(row) == (subset == "yes-no")]
    if not rows:
        raise ValueError(f"{path} has no question of the subset {subset or 'null'}: take another.")
    return rows


def _is_yes_no(row: Row) -> bool:
    return row["messages"][-1]["content"] in ("yes", "no")


def _row(entry: Any, path: Path, number: int) -> Row:
    where = f"{path}: entry {number}"
    if not isinstance(entry, list) or len(entry) != 3 or type(entry[2]) is not int:
        raise ValueError(
            f"{where} is no list of a question, an answer and the number of a picture: take the "
            "file as it is in the package."
        )
    question = check_text(entry[0], "the question", where)
    answer = check_text(entry[1], "the answer", where)
    picture = image_part(below(path.parent, f"images/{entry[2]}.png", where))
    return {
        "messages": [
            {"role": "user", "content": [picture, text_part(question)]},
            {"role": "assistant", "content": answer},
        ]
    }

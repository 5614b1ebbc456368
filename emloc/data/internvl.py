"""InternVL 2.5's data: a meta file in JSON that names data sets of pictures and conversations.

    {"websrc": {"root": "images/", "annotation": "websrc.jsonl", "data_augment": false,
                "repeat_time": 1, "length": 3}}

`root` is the folder of the pictures; `annotation` holds one JSON object a line:

    {"id": 0, "image": "a/1.png", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is the price?"}, {"from": "gpt", "value": "$3"}]}

`image` is a path below `root` or a list of them, one for each `<image>` mark of the human turns; a
single picture without any mark stands before the first human turn. A line without `image` is text
only. `width`, `height` and all other keys are dropped.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from emloc.data.parts import MARK, line_pictures, place
from emloc.data.rows import Row, check_answers, check_last, check_text, json_lines, kind
from emloc.files import read_json

_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}

_log = logging.getLogger(__name__)


def internvl_rows(meta_path: str | os.PathLike[str], *, subset: str | None = None) -> list[Row]:
    """The rows of the data sets that a meta file names, one set after the other.

    `root` and `annotation` start at the current folder, or at the folder of the meta file if
    nothing is there. A `repeat_time` of 2 or more becomes the row's `repeat`; below 1, it is the
    share of the file, from its start, that is read. Pictures are not opened.

    Args:
        meta_path: the meta file.
        subset: the name of one of its data sets; None means all of them.

    Raises:
        ValueError: no such file or data set, a value of the wrong type, or a line that is no
            conversation or does not have a picture for every mark; the message says where.
    """
    path = Path(meta_path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file: give the path of an InternVL meta file in JSON.")
    meta = read_json(path)
    if not isinstance(meta, dict) or not meta:
        raise ValueError(
            f"{path} is {kind(meta)}, but it must be a JSON object with root and annotation for "
            "the name of each data set."
        )
    if subset is not None and subset not in meta:
        raise ValueError(f"{path} has no data set {subset!r}: it has {', '.join(meta)}.")
    names = list(meta) if subset is None else [subset]
    return [row for name in names for row in _read_set(path, name, meta[name])]


def _read_set(meta_path: Path, name: str, entry: Any) -> list[Row]:
    """The rows of one data set."""
    where = f"{meta_path}: the data set {name!r}"
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {kind(entry)}, but it must be a JSON object.")
    root = _find(entry, "root", meta_path, where)
    annotation = _find(entry, "annotation", meta_path, where)
    if not annotation.is_file():
        raise ValueError(
            f"{where} names the annotation {annotation}, which is not a file: correct it, as a "
            "path from the current folder or from that of the meta file."
        )
    lines = list(json_lines(annotation))
    share, repeat = _repeat_time(entry.get("repeat_time", 1), where)
    _warn(entry, len(lines), where)
    chosen = lines[: int(len(lines) * share)]
    if not chosen:
        raise ValueError(
            f"{where} has no row: {annotation} has {len(lines)} lines, of which repeat_time "
            f"{entry.get('repeat_time', 1)} leaves none."
        )
    more = {"repeat": repeat} if repeat > 1 else {}
    return [{**_read_line(line, root, at), **more} for at, line in chosen]


def _find(entry: dict[str, Any], key: str, meta_path: Path, where: str) -> Path:
    """The path under `key`, from the current folder or, if nothing is there, the meta file's."""
    value = entry.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key} is {kind(value)}, but it must be the path as a string.")
    found = Path(value)
    return found if found.exists() else meta_path.parent / found


def _repeat_time(value: Any, where: str) -> tuple[float, int]:
    """The share of the lines to read, and how often each row stands in the training split."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not value > 0 or (value > 1 and value != value // 1):
        raise ValueError(
            f"{where}: repeat_time is {value!r}, but it must be a whole number of at least 1, or "
            "a share between 0 and 1."
        )
    return (value, 1) if value < 1 else (1, int(value))


def _warn(entry: dict[str, Any], lines: int, where: str) -> None:
    """Say what the data set asks for and does not get."""
    if entry.get("data_augment"):
        _log.warning("%s has data_augment on, but pictures are not augmented here", where)
    if entry.get("max_dynamic_patch") is not None:
        _log.warning("%s has max_dynamic_patch, which is not read: set data.pictures", where)
    if entry.get("length") not in (None, lines):
        _log.warning("%s has the length %s, but %d lines", where, entry["length"], lines)


def _read_line(line: dict[str, Any], root: Path, where: str) -> Row:
    """One line as a row; `where` (file:line) starts every error."""
    if line.get("video"):
        raise ValueError(f"{where}: the line has a video, but only pictures are read: remove it.")
    turns = _check_turns(line.get("conversations"), where)
    pictures = line_pictures(line, root, where, keys=("image",))
    if pictures and not root.is_dir():
        raise ValueError(f"{where}: the root {root} of its pictures is not a folder: correct it.")
    marks = sum(text.count(MARK) for role, text in turns if role == "user")
    if marks == 0 and len(pictures) == 1:
        first = [role for role, _ in turns].index("user")
        turns[first] = ("user", f"{MARK}\n{turns[first][1]}")
    elif marks != len(pictures):
        raise ValueError(
            f"{where}: the human turns have {marks} {MARK} marks, but image names {len(pictures)} "
            "pictures: make the two numbers equal."
        )
    messages = []
    for role, text in turns:
        count = text.count(MARK) if role == "user" else 0
        shown, pictures = pictures[:count], pictures[count:]
        messages.append({"role": role, "content": place(text, shown) if shown else text})
    return {"messages": messages, **check_answers(line, where)}


def _check_turns(conversations: Any, where: str) -> list[tuple[str, str]]:
    """The turns as (role, text), once they make up a conversation."""
    if not isinstance(conversations, list) or not conversations:
        raise ValueError(
            f"{where}: conversations is {kind(conversations)}, but it must be a list of objects "
            "with from and value, the last from gpt."
        )
    turns = []
    for number, turn in enumerate(conversations, start=1):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise ValueError(f"{where}: turn {number} must be an object with from and value.")
        speaker = turn["from"]
        if speaker not in list(_ROLES) or (speaker == "system" and number > 1):
            raise ValueError(
                f"{where}: turn {number} is from {speaker!r}, but it must be from human or gpt, "
                "or, as the first one, from system."
            )
        role = _ROLES[speaker]
        text = check_text(
            turn["value"], f"the value of turn {number}", where, may_be_empty=role == "system"
        )
        turns.append((role, text))
    check_last([{"role": role} for role, _ in turns], where)
    return turns

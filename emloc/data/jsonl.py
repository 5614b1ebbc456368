"""Rows to train on, from a JSON Lines file: one JSON object a line.

Two forms, which may be mixed:

- `{"prompt": "...", "answer": "..."}`; with pictures also `"image"`, a path or a list of paths.
  They stand before the prompt, or where it has `<image>` marks
- `{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}`
  with roles system, user and assistant; a line that has `messages` is read so, whatever else it
  has. A content may be a list of parts, `{"type": "text", "text": "..."}` and
  `{"type": "image", "image": "..."}`; the paths may also stand in the line's own list `"images"`

Paths start at the folder of the file. Either form may have `"answers"`, all answers that count as
right. Other keys are dropped. Every error names the file and the line.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from emloc.data.parts import MARK, image_part, line_pictures, name_pictures, place, read_parts
from emloc.data.parts import text_part as as_text
from emloc.data.rows import ROLES, Row, check_answers, check_last, check_text, json_lines, kind

__all__ = ["Row", "read_rows"]


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """Read every row of a JSON Lines file (UTF-8, with or without a byte order mark).

    Blank lines are skipped. Line numbers in errors start at 1 and count blank lines. Pictures are
    named by absolute paths in the rows; none is opened.

    Raises:
        ValueError: no such file; nothing in it; or a line that is not UTF-8, not JSON, of neither
            form, with a value of the wrong type, an empty text, an unknown role, a last turn that
            is not the assistant's, or pictures that are no files below the folder or not as many
            as places for them. The message starts with `file:line`.
    """
    path = Path(path)
    rows = [_read_line(line, path.parent, where) for where, line in json_lines(path)]
    if not rows:
        raise ValueError(f"{path} is empty: write at least one row of prompt and answer into it.")
    return rows


def _read_line(line: dict[str, Any], root: Path, where: str) -> Row:
    """One line as a checked row; `where` (file:line) starts every error."""
    answers = check_answers(line, where)
    if line.get("messages") is not None:
        messages = _check_messages(line["messages"], root, where)
        name_pictures(messages, line_pictures(line, root, where), where)
        return {"messages": messages, **answers}
    if "prompt" in line and "answer" in line:
        pair = {name: check_text(line[name], name, where) for name in ("prompt", "answer")}
        pictures = line_pictures(line, root, where)
        named = line.get("image") is not None or line.get("images") is not None
        if pictures or (named and MARK in pair["prompt"]):
            return {"messages": _with_pictures(**pair, pictures=pictures, where=where), **answers}
        return {**pair, **answers}
    raise ValueError(
        f"{where}: the keys are {', '.join(sorted(line)) or 'none at all'}, but a row needs "
        "prompt and answer, or messages."
    )


def _with_pictures(
    prompt: str, answer: str, pictures: list[str], where: str
) -> list[dict[str, Any]]:
    """Prompt and answer as messages, with the pictures at their places."""
    marks = prompt.count(MARK)
    if marks not in (0, len(pictures)):
        raise ValueError(
            f"{where}: the prompt has {marks} {MARK} marks, but the line names {len(pictures)} "
            "pictures: make the two numbers equal, or leave the marks out."
        )
    if marks:
        content = place(prompt, pictures)
    else:
        content = [*map(image_part, pictures), as_text(prompt)]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def _check_messages(messages: Any, root: Path, where: str) -> list[dict[str, Any]]:
    """The messages with their role and content only, once they make up a conversation."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f"{where}: messages is {kind(messages)}, but it must be a list of objects with role "
            "and content, the last from the assistant."
        )
    checked = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ValueError(f"{where}: message {number} must be an object with role and content.")
        role = message["role"]
        if role not in ROLES:
            raise ValueError(
                f"{where}: the role of message {number} is {role!r}, but it must be one of "
                f"{', '.join(ROLES)}."
            )
        name = f"the content of message {number}"
        content = _check_content(message["content"], role, root, name, where)
        checked.append({"role": role, "content": content})
    check_last(checked, where)
    return checked


def _check_content(value: Any, role: str, root: Path, name: str, where: str) -> Any:
    """A string, or a list of parts in which there is a picture."""
    content = read_parts(value, root, name, where) if value and isinstance(value, list) else value
    if not isinstance(content, list) or not content:
        return check_text(content, name, where, may_be_empty=role == "system")
    if role != "user":
        raise ValueError(
            f"{where}: {name}, which is from the {role}, has a picture, but only the user shows "
            "pictures: move it to a message from the user."
        )
    return content

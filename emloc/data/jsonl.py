"""Rows to train on, from a JSON Lines file: one JSON object a line.

Two forms, which may be mixed:

- `{"prompt": "...", "answer": "..."}`
- `{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}`
  with roles system, user and assistant; a line that has `messages` is read so, whatever else it has

Other keys are dropped. Every error names the file and the line.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""`{"prompt": str, "answer": str}` or `{"messages": [{"role": str, "content": str}, ...]}`."""

ROLES = ("system", "user", "assistant")


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """Read every row of a JSON Lines file (UTF-8, with or without a byte order mark).

    Blank lines are skipped. Line numbers in errors start at 1 and count blank lines.

    Raises:
        ValueError: no such file; nothing in it; or a line that is not UTF-8, not JSON, of neither
            form, with a value of the wrong type, an empty text, an unknown role, or a last turn
            that is not the assistant's. The message starts with `file:line`.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file: give the path of a JSON Lines file.")
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    rows = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            rows.append(_parse_line(line, f"{path}:{number}"))
    if not rows:
        raise ValueError(f"{path} is empty: write at least one row of prompt and answer into it.")
    return rows


def _parse_line(line: bytes, where: str) -> Row:
    """One line as a checked row; `where` (file:line) starts every error."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: byte {error.start + 1} of the line is not UTF-8: save the file as UTF-8."
        ) from error
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}): each line must be one object.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: the line is {_kind(value)}, but it must be a JSON object.")
    if value.get("messages") is not None:
        return {"messages": _check_messages(value["messages"], where)}
    if "prompt" in value and "answer" in value:
        return {name: _check_text(value[name], name, where) for name in ("prompt", "answer")}
    raise ValueError(
        f"{where}: the keys are {', '.join(sorted(value)) or 'none at all'}, but a row needs "
        "prompt and answer, or messages."
    )


def _check_messages(messages: Any, where: str) -> list[dict[str, str]]:
    """The messages with their role and content only, once they make up a conversation."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f"{where}: messages is {_kind(messages)}, but it must be a list of objects with role "
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
        may_be_empty = role == "system"
        content = _check_text(message["content"], name, where, may_be_empty=may_be_empty)
        checked.append({"role": role, "content": content})
    if checked[-1]["role"] != "assistant":
        raise ValueError(
            f"{where}: the last message is from the {checked[-1]['role']}, but it must be the "
            "assistant's: it is what the model learns to say."
        )
    if not any(message["role"] == "user" for message in checked):
        raise ValueError(f"{where}: no message is from the user, but the assistant answers one.")
    return checked


def _check_text(value: Any, name: str, where: str, *, may_be_empty: bool = False) -> str:
    """`value`, once it is a text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} is {_kind(value)}, but it must be a string.")
    if not may_be_empty and not value.strip():
        raise ValueError(f"{where}: {name} is empty: write a text there or remove the line.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {name} holds half of a character ({value[error.start]!a}): remove it."
        ) from error
    return value


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None or value in ("", [], {}):
        return "null" if value is None else "empty"
    if isinstance(value, bool):
        return "true or false"
    names = {int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")

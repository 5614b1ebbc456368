"""What a row is, and the checks of a file with one JSON object a line.

- `Row`, and the roles that a message can have
- `json_lines`: the objects of a file, each with its `file:line`
- `check_text`, `check_answers`, `check_last`: single values; `kind` names one in words
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""To say: `{"prompt": str, "answer": str}` or `{"messages": [{"role": str, "content": ...}, ...]}`.
To draw: `{"image": path, "caption": str}`, with `"prior": true` for a picture that only shows what
the class looks like; the caption may be missing until `with_caption` gives one.

A content is a str or, where pictures are, a list of parts `{"type": "text", "text": str}` and
`{"type": "image", "image": path}`. Optional: `answers`, a list of all answers that metrics accept;
`repeat`, how often the row stands in the training split (`split_rows` uses it up).
"""

ROLES = ("system", "user", "assistant")


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield `file:line` and the object of each line that is not blank.

    UTF-8, with or without a byte order mark. Line numbers start at 1 and count blank lines.

    Raises:
        ValueError: no such file, or a line that is not UTF-8, not JSON or no object.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file: give the path of a JSON Lines file.")
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            yield where, _parse(line, where)


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: byte {error.start + 1} of the line is not UTF-8: save the file as UTF-8."
        ) from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}): each line must be one object.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: the line is {kind(value)}, but it must be a JSON object.")
    return value


def check_text(value: Any, name: str, where: str, *, may_be_empty: bool = False) -> str:
    """`value`, once it is a text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} is {kind(value)}, but it must be a string.")
    if not may_be_empty and not value.strip():
        raise ValueError(f"{where}: {name} is empty: write a text there or remove the line.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {name} holds half of a character ({value[error.start]!a}): remove it."
        ) from error
    return value


def check_answers(line: dict[str, Any], where: str) -> dict[str, list[str]]:
    """`{"answers": [...]}` as the line has it, or nothing; repeated answers are kept."""
    answers = line.get("answers")
    if answers is None:
        return {}
    if not isinstance(answers, list) or not answers:
        raise ValueError(
            f"{where}: answers is {kind(answers)}, but it must be a list of one string or more, "
            "or be left out."
        )
    numbered = enumerate(answers, start=1)
    return {"answers": [check_text(text, f"answer {n} of answers", where) for n, text in numbered]}


def check_last(messages: list[dict[str, Any]], where: str) -> None:
    """Make sure that a user speaks and that the assistant has the last word."""
    if messages[-1]["role"] != "assistant":
        raise ValueError(
            f"{where}: the last message is from the {messages[-1]['role']}, but it must be the "
            "assistant's: it is what the model learns to say."
        )
    if not any(message["role"] == "user" for message in messages):
        raise ValueError(f"{where}: no message is from the user, but the assistant answers one.")


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None or value in ("", [], {}):
        return "null" if value is None else "empty"
    if isinstance(value, bool):
        return "true or false"
    names = {int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")

"""Messages with pictures: a content as a list of parts, and `<image>` marks in a text.

A part that comes in is `{"type": "text", "text": ...}` or `{"type": "image", ...}` with the file
under `image`, `path` or `url`, or with none: then the line names the pictures. A part that goes
out is `{"type": "text", "text": str}` or `{"type": "image", "image": absolute path}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emloc.data.rows import check_text, kind
from emloc.pictures import below

MARK = "<image>"
Part = dict[str, str]

_FILE_KEYS = ("image", "path", "url")
_UNNAMED = ""


def text_part(text: str) -> Part:
    """A part that is a text."""
    return {"type": "text", "text": text}


def image_part(path: str) -> Part:
    """A part that is a picture."""
    return {"type": "image", "image": path}


def place(text: str, paths: Sequence[str]) -> list[Part]:
    """A text with as many marks as there are paths, as parts: each mark is the next picture.

    One newline right after a mark is dropped: what stands between a picture and a text is up to
    the chat template. All other white space is kept, an empty text is no part.
    """
    first, *others = text.split(MARK)
    parts = [text_part(first)]
    for path, following in zip(paths, others, strict=True):
        parts += [image_part(path), text_part(following.removeprefix("\n"))]
    return [part for part in parts if part.get("text") != ""]


def line_pictures(
    line: dict[str, Any], root: Path, where: str, *, keys: Sequence[str] = ("image", "images")
) -> list[str]:
    """The absolute paths of the pictures that a line names under one of `keys`.

    Raises:
        ValueError: two keys are used, a name is no text, or `below` refuses it.
    """
    given = [key for key in keys if line.get(key) not in (None, "", [])]
    if len(given) > 1:
        raise ValueError(
            f"{where}: the line has {' and '.join(given)}: name all of its pictures under one key."
        )
    if not given:
        return []
    names = line[given[0]]
    if not isinstance(names, str | list):
        raise ValueError(
            f"{where}: {given[0]} is {kind(names)}, but it must be the path of a file or a list "
            "of paths."
        )
    names = [names] if isinstance(names, str) else names
    numbered = enumerate(names, start=1)
    checked = [check_text(name, f"picture {n} of {given[0]}", where) for n, name in numbered]
    return [below(root, name, where) for name in checked]


def read_parts(content: list[Any], root: Path, name: str, where: str) -> str | list[Part]:
    """The checked parts of a content; without a picture, its texts as one string (may be empty).

    A picture that the line is to name has an empty path; `name_pictures` fills it in.

    Args:
        content: what the message holds.
        root: the folder that the files lie below.
        name: what to call the content in errors.
        where: what errors start with.

    Raises:
        ValueError: a part is of another kind, or holds no usable text or file.
    """
    parts = []
    for number, part in enumerate(content, start=1):
        type_ = part.get("type") if isinstance(part, dict) else None
        called = f"part {number} of {name}"
        if type_ == "text":
            text = check_text(part.get("text"), f"the text of {called}", where, may_be_empty=True)
            parts.append(text_part(text))
        elif type_ == "image":
            parts.append(image_part(_path(part, root, called, where)))
        else:
            found = f"has the type {type_!r}" if isinstance(part, dict) else f"is {kind(part)}"
            raise ValueError(
                f"{where}: {name} is a list in which part {number} {found}, but each part must be "
                "an object with the type text or image."
            )
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return [part for part in parts if part.get("text") != ""]


def _path(part: dict[str, Any], root: Path, called: str, where: str) -> str:
    """The path of a part's picture; empty when the part names none."""
    given = [key for key in (*_FILE_KEYS, "base64") if part.get(key) is not None]
    if not given:
        return _UNNAMED
    if len(given) > 1 or given[0] == "base64":
        raise ValueError(
            f"{where}: {called} has {' and '.join(given)}, but it must name one file under image: "
            "save the picture as a file."
        )
    return below(root, check_text(part[given[0]], f"the {given[0]} of {called}", where), where)


def name_pictures(messages: list[dict[str, Any]], paths: Sequence[str], where: str) -> None:
    """Fill the line's own pictures into the image parts that name no file, in order.

    Raises:
        ValueError: there are more or fewer of them than such parts.
    """
    contents = (message["content"] for message in messages)
    parts = [part for content in contents if isinstance(content, list) for part in content]
    unnamed = [part for part in parts if part.get("image") == _UNNAMED]
    if len(unnamed) != len(paths):
        raise ValueError(
            f"{where}: the line names {len(paths)} pictures of its own, but its messages have "
            f"{len(unnamed)} image parts without a file: make the two numbers equal."
        )
    for part, path in zip(unnamed, paths, strict=True):
        part["image"] = path

"""DreamBooth: a folder with a few pictures of one subject, with captions or one prompt for all.

Captions stand in `metadata.jsonl` in the same folder, as the imagefolder builder of datasets has
them, one line a picture; other keys are dropped:

    {"file_name": "1.jpg", "text": "a photo of sks dog on a beach"}

Without that file, `with_caption` gives all pictures the instance prompt.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from emloc.data.rows import Row, check_text, json_lines
from emloc.pictures import below

METADATA = "metadata.jsonl"

_UNREAD = (".arw", ".avif", ".cr2", ".dng", ".heic", ".heif", ".jxl", ".nef", ".svg")
"""How pictures end that PIL does not read, at least not everywhere."""


def dreambooth_rows(folder: str | os.PathLike[str]) -> list[Row]:
    """One row for each picture that lies in a folder, sorted by name.

    A file is a picture if its name ends as one of a format that PIL reads. Hidden files, files of
    other kinds and subfolders are passed over. Pictures are not opened.

    Returns:
        `{"image": absolute path, "caption": str}`; without caption if there is no `metadata.jsonl`.

    Raises:
        ValueError: no such folder, no picture in it, one that PIL does not read by its name or that
            is a link to elsewhere; or a `metadata.jsonl` that does not have one line with
            `file_name` and `text` for each picture and no others (line named).
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(
            f"{folder} is {'a file' if path.exists() else 'not there'}: give a folder with the "
            "pictures of one subject."
        )
    pictures = _pictures(path)
    if not pictures:
        raise ValueError(
            f"{folder} has no picture: put 3 to 5 pictures of the subject there, as PNG or JPEG "
            "(subfolders are not searched)."
        )
    if (path / "metadata.csv").exists() and not (path / METADATA).exists():
        raise ValueError(
            f"{folder} has its captions in metadata.csv: write them as {METADATA}, a line such as "
            f'{{"file_name": "{os.path.basename(pictures[0])}", "text": "..."}} for each picture.'
        )
    if not (path / METADATA).exists():
        return [{"image": picture} for picture in pictures]
    captions = _captions(path / METADATA, pictures)
    return [{"image": picture, "caption": captions[picture]} for picture in pictures]


def with_caption(rows: Sequence[Row], prompt: str | None) -> list[Row]:
    """The rows with `prompt` as the caption of all; None keeps the captions that they have.

    A prompt replaces the captions of `metadata.jsonl`, too. The given rows stay as they are.

    Raises:
        ValueError: the prompt is empty, or there is none for a row without caption.
    """
    if prompt is not None:
        caption = check_text(prompt, "the prompt", "the caption of all pictures")
        return [{**row, "caption": caption} for row in rows]
    for row in rows:
        if "caption" not in row:
            raise ValueError(
                f"the picture {row['image']} has no caption: set a prompt for all pictures, such "
                f"as 'a photo of sks dog', or write {METADATA} beside them."
            )
    return list(rows)


def _pictures(folder: Path) -> list[str]:
    """The absolute paths of the pictures in a folder."""
    known = {
        suffix
        for suffix, name in Image.registered_extensions().items()
        if name in Image.OPEN and Image.MIME.get(name, "").startswith("image/")
    }
    pictures = []
    for file in sorted(folder.iterdir()):
        suffix = file.suffix.lower()
        if file.name.startswith(".") or file.is_dir() or suffix not in {*known, *_UNREAD}:
            continue
        if suffix not in known:
            raise ValueError(
                f"{file} is of a format that PIL does not read: save it as PNG or JPEG, or take it "
                "out of the folder."
            )
        pictures.append(below(folder, file.name, str(folder)))
    return pictures


def _captions(metadata: Path, pictures: Sequence[str]) -> dict[str, str]:
    """The caption of each picture."""
    captions: dict[str, str] = {}
    for where, line in json_lines(metadata):
        picture, caption = _read_line(line, metadata.parent, where)
        if picture not in pictures:
            raise ValueError(
                f"{where}: {line['file_name']!r} is no picture in {metadata.parent}: correct the "
                "name or remove the line."
            )
        if picture in captions:
            raise ValueError(
                f"{where}: {line['file_name']!r} has a caption already: remove one of its lines."
            )
        captions[picture] = caption
    for picture in pictures:
        if picture not in captions:
            raise ValueError(
                f"{metadata} has no caption of {os.path.basename(picture)!r}: add a line with "
                "file_name and text, or take the picture out of the folder."
            )
    return captions


def _read_line(line: dict[str, Any], folder: Path, where: str) -> tuple[str, str]:
    """The picture that a line names, as an absolute path, and its caption."""
    if "file_name" not in line or "text" not in line:
        raise ValueError(
            f"{where}: the keys are {', '.join(sorted(line)) or 'none at all'}, but a line needs "
            "file_name and text."
        )
    name = check_text(line["file_name"], "file_name", where)
    return below(folder, name, where), check_text(line["text"], "text", where)

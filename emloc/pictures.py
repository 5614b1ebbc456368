"""Pictures: from a name in a data file to pixels, and to a folder of their own.

- `below`: the path of a file that really lies below a folder
- `check_picture`: its size, from the header alone; `load_picture`: its pixels, upright
- `pictures_of`, `with_pictures`: the paths in a row, and the row with others in their place
- `store_pictures`: copies named by their content, so that equal pictures have equal names
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from PIL import ExifTags, Image, ImageOps

from emloc.files import writing

if TYPE_CHECKING:
    from emloc.data.rows import Row

_TURNED = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""


def below(root: str | os.PathLike[str], name: str, where: str) -> str:
    """The absolute path of the file `name` below the folder `root`; it need not exist.

    Raises:
        ValueError: the name is an address, absolute, holds `..` or is a link to elsewhere; `where`
            starts the sentence.
    """
    folder = os.path.abspath(root)
    shown = repr(name if len(name) <= 80 else f"{name[:77]}...")
    if "://" in name or name.startswith("data:") or "\0" in name:
        raise ValueError(
            f"{where}: the picture {shown} is no local file: save it below {folder} and give its "
            "path from there."
        )
    if os.path.isabs(name) or ".." in PurePosixPath(name).parts:
        raise ValueError(
            f"{where}: the picture {shown} may lie outside of {folder}: give its path from that "
            "folder on, without '..'."
        )
    path = os.path.normpath(os.path.join(folder, name))
    inside = os.path.join(os.path.realpath(folder), "")
    if not os.path.realpath(path).startswith(inside):
        raise ValueError(
            f"{where}: the picture {shown} is a link to a place outside of {folder}: put a copy of "
            "the file there."
        )
    return path


def check_picture(path: str, where: str) -> tuple[int, int]:
    """Width and height of a picture as `load_picture` gives it, without decoding the pixels.

    Raises:
        ValueError: there is no such picture, or it has more pixels than PIL's limit against
            decompression bombs; `where` starts the sentence.
    """
    with _opened(path, where) as image:
        width, height = image.size
        turned = _orientation(image) in _TURNED and image.format != "TIFF"  # that one is upright
        return (height, width) if turned else (width, height)


def load_picture(path: str, where: str) -> Image.Image:
    """The picture in RGB, turned as its EXIF orientation says.

    Raises:
        ValueError: as in `check_picture`, or the file is cut short or corrupt.
    """
    with _opened(path, where) as image:
        upright = image if _orientation(image) == 1 else ImageOps.exif_transpose(image)
        return upright.convert("RGB")


@contextlib.contextmanager
def _opened(path: str, where: str) -> Iterator[Image.Image]:
    """An opened picture of a bearable size; whatever fails inside becomes one ValueError."""
    if not os.path.isfile(path):
        raise ValueError(f"{where}: there is no picture {path}: put it there or remove the row.")
    try:
        with Image.open(path) as image:
            pixels = image.width * image.height
            if Image.MAX_IMAGE_PIXELS and pixels > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(pixels)
            yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{where}: the picture {path} has more than {Image.MAX_IMAGE_PIXELS} pixels, the limit "
            "of PIL: make it smaller or remove the row."
        ) from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(
            f"{where}: {path} is not a picture that PIL can read: save it as PNG or JPEG, or "
            "remove the row."
        ) from error
    except Exception as error:  # PIL's decoders raise many kinds for a broken file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(
            f"{where}: the picture {path} is cut short or corrupt ({reason}): save it again or "
            "remove the row."
        ) from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation that stands before the pixels; 1 is upright."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # getexif would decode the pixels to look behind them
    orientation: int = image.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation


def pictures_of(row: Row) -> list[str]:
    """The paths of a row's pictures: the one with a caption, or those of the conversation."""
    if "image" in row:
        return [row["image"]]
    parts = (part for message in row.get("messages", ()) for part in _parts(message["content"]))
    return [part["image"] for part in parts if part["type"] == "image"]


def with_pictures(row: Row, mapping: Callable[[str], str]) -> Row:
    """The row with `mapping` applied to the path of each picture; the given one stays as it is."""
    if "image" in row:
        return {**row, "image": mapping(row["image"])}
    if not pictures_of(row):
        return row
    messages = []
    for message in row["messages"]:
        parts = [
            {**part, "image": mapping(part["image"])} if part["type"] == "image" else part
            for part in _parts(message["content"])
        ]
        messages.append({**message, "content": parts} if parts else message)
    return {**row, "messages": messages}


def _parts(content: str | list[dict[str, str]]) -> list[dict[str, str]]:
    return [] if isinstance(content, str) else content


def store_pictures(rows: Sequence[Row], folder: Path) -> list[Row]:
    """Copy every picture of the rows into `folder`; return rows that name the copies.

    A copy is called by 32 hex digits of its SHA-256 and the suffix in lower case; its path in the
    rows starts at the parent of `folder`. What lies in the folder already is left there.

    Raises:
        ValueError: a picture cannot be read; the message names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copies: dict[str, str] = {}

    def copied(path: str) -> str:
        if path not in copies:
            copies[path] = f"{folder.name}/{_copy(path, folder)}"
        return copies[path]

    return [with_pictures(row, copied) for row in rows]


def _copy(path: str, folder: Path) -> str:
    """Write the copy of one picture and return its name."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(
            f"the picture {path} cannot be copied ({error.strerror}): put it there or remove its "
            "rows."
        ) from error
    name = hashlib.sha256(content).hexdigest()[:32] + Path(path).suffix.lower()
    if not (folder / name).is_file():
        with writing(folder / name) as partial:
            partial.write_bytes(content)
    return name

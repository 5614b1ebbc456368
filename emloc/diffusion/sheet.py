"""Pictures side by side.

- `contact_sheet`: a labelled grid of pictures as one picture
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

# sizes in pixels
_LARGEST = 256  # larger pictures are shrunk to this
_ENLARGED = 192  # smaller ones grow by a whole factor, up to this
_MARGIN, _GUTTER, _LABEL_WIDTH = 24, 12, 220
_FONT_SIZE, _LINE_HEIGHT = 16, 22
_HEAD_LINES = 3
_INK, _FRAME, _PAPER = "#1f2328", "#d0d7de", "#ffffff"


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str]
) -> Image.Image:
    """A labelled grid of pictures on white, in RGB.

    Args:
        rows: label and pictures of each row; a long label is wrapped, and ends in an ellipsis where
            even that leaves too little room.
        columns: a head for each column.

    Raises:
        ValueError: no row or no column, or a row without exactly one picture a column.
    """
    _check(rows, columns)
    grid = [[_thumbnail(picture) for picture in pictures] for _, pictures in rows]
    width = max(picture.width for line in grid for picture in line)
    height = max(picture.height for line in grid for picture in line)
    font = _font()
    heads = [_wrapped(text, font, width, _HEAD_LINES) for text in columns]
    room = max(1, height // _LINE_HEIGHT)
    labels = [_wrapped(label, font, _LABEL_WIDTH, room) for label, _ in rows]
    widest = max(font.getlength(line) for text in labels for line in text)
    left = _MARGIN + (math.ceil(widest) + 2 * _GUTTER if widest else 0)
    top = _MARGIN + _LINE_HEIGHT * max(map(len, heads)) + _GUTTER
    xs = [left + column * (width + _GUTTER) for column in range(len(columns))]
    ys = [top + row * (height + _GUTTER) for row in range(len(rows))]
    sheet = Image.new("RGB", (xs[-1] + width + _MARGIN, ys[-1] + height + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for x, text in zip(xs, heads, strict=True):
        _write(pen, font, text, (x + width / 2, top - _GUTTER - _LINE_HEIGHT * len(text)), "ma")
    for y, text in zip(ys, labels, strict=True):
        _write(pen, font, text, (_MARGIN, y + (height - _LINE_HEIGHT * len(text)) / 2), "la")
    for y, line in zip(ys, grid, strict=True):
        for x, picture in zip(xs, line, strict=True):
            corner = x + (width - picture.width) // 2, y + (height - picture.height) // 2
            _paste(sheet, pen, picture, corner)
    return sheet


def _check(rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str]) -> None:
    if not rows or not columns:
        raise ValueError(
            f"the contact sheet has {len(rows)} rows and {len(columns)} columns, but it must have "
            "at least one of each."
        )
    for label, pictures in rows:
        if len(pictures) != len(columns):
            raise ValueError(
                f"the row {label!r} of the contact sheet has {len(pictures)} pictures, but there "
                f"are {len(columns)} columns: give one picture a column."
            )


def _thumbnail(picture: Image.Image) -> Image.Image:
    """The picture in RGB, neither large nor tiny; a small one keeps its hard pixels."""
    factor = _ENLARGED // max(picture.size)
    if factor > 1:
        size = picture.width * factor, picture.height * factor
        return picture.convert("RGB").resize(size, Image.Resampling.NEAREST)
    small = picture.convert("RGB")
    small.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    return small


def _font() -> ImageFont.FreeTypeFont:
    """Matplotlib's own font, which has far more letters than PIL's."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(folder / "DejaVuSans.ttf", _FONT_SIZE)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: float, most: int) -> list[str]:
    """The text in at most `most` lines, none wider than `width`; what is cut ends in an ellipsis.

    A word too long for a line is broken.
    """
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and font.getlength(last + "…") > width:
        last = last[:-1]
    return [*lines[: most - 1], last.rstrip() + "…"]


def _write(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont,
    lines: Sequence[str],
    place: tuple[float, float],
    anchor: str,
) -> None:
    x, y = place
    for number, line in enumerate(lines):
        pen.text((x, y + number * _LINE_HEIGHT), line, fill=_INK, font=font, anchor=anchor)


def _paste(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, picture: Image.Image, corner: tuple[int, int]
) -> None:
    """Put a picture at its place, in a thin frame that light pictures need on white."""
    sheet.paste(picture, corner)
    (x, y), (width, height) = corner, picture.size
    pen.rectangle((x - 1, y - 1, x + width, y + height), outline=_FRAME)

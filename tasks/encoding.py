"""The prepared rows as a model's inputs, for the stages after `prepare`."""

from __future__ import annotations

from pathlib import Path

from emloc.families import Codec, load_codec
from emloc.families.text import Example
from emloc.files import read_jsonl
from tasks import layout
from tasks.params import Params


def codec_of(path: Path, params: Params, *, root: Path = layout.DATA) -> Codec:
    """The codec of the checkpoint at `path`; pictures lie below `root`."""
    data = params.data
    return load_codec(path, chat_template=data.chat_template, root=root, pictures=data.pictures)


def encode(split: str, codec: Codec, params: Params) -> list[Example]:
    """All rows of a split; `prepare` has left none that is too long."""
    rows = layout.rows(split)
    return codec.encode(read_jsonl(rows), max_length=params.data.max_length, source=str(rows))

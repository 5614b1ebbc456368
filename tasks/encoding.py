"""The prepared rows as token ids, for the stages after `prepare`."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from emloc.families.text import Example, encode_rows
from emloc.files import read_jsonl
from tasks import layout
from tasks.params import Params


def encode(split: str, tokenizer: PreTrainedTokenizerBase, params: Params) -> list[Example]:
    """All rows of a split; `prepare` has left none that is too long."""
    return encode_rows(
        read_jsonl(layout.rows(split)),
        tokenizer,
        chat_template=params.data.chat_template,
        max_length=params.data.max_length,
        source=str(layout.rows(split)),
    )

"""What a model family needs to turn rows into inputs; the rest of the library knows no family.

- `load_codec`: the codec of a checkpoint, by its config
- `calibration_batches`: examples as arguments of a model's forward
- `labelled_batches`: the same, with their labels
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from emloc.families.text import TextCodec, load_tokenizer
from emloc.families.vision import VisionCodec, load_processor
from emloc.models import sees_pictures

Codec = TextCodec
"""`TextCodec`, or `VisionCodec`, which is one."""


def load_codec(
    path: str | os.PathLike[str],
    *,
    chat_template: bool | None = None,
    root: str | os.PathLike[str] = ".",
    pictures: Mapping[str, Any] | None = None,
) -> Codec:
    """The codec for a checkpoint's folder.

    Args:
        chat_template: whether to use the checkpoint's; None means if it has one.
        root: the folder that relative paths of pictures start from.
        pictures: settings of the image processor that replace its own.

    Raises:
        ValueError: the folder lacks a tokenizer or a processor, or has no use for a setting.
    """
    if sees_pictures(path):
        processor = load_processor(path)
        return VisionCodec(processor, chat_template=chat_template, root=root, pictures=pictures)
    for name, value in (pictures or {}).items():
        raise ValueError(
            f"data.pictures sets {name} to {value!r}, but a language model sees none: leave it out."
        )
    return TextCodec(load_tokenizer(path), chat_template=chat_template)


def calibration_batches(
    codec: Codec, examples: Sequence[Mapping[str, Any]], batch_size: int
) -> list[dict[str, Any]]:
    """What `labelled_batches` gives, without the labels."""
    return [batch for batch, _ in labelled_batches(codec, examples, batch_size)]


def labelled_batches(
    codec: Codec, examples: Sequence[Mapping[str, Any]], batch_size: int
) -> list[tuple[dict[str, Any], Tensor]]:
    """Keyword arguments of a model's forward for consecutive groups of examples, without a cache,
    and the labels (B, T) int64 of each group.

    The arguments are `input_ids` and `attention_mask` (B, T) int64, and what else the codec's
    `collate` gives.
    """
    batches = []
    for start in range(0, len(examples), batch_size):
        batch = codec.collate(examples[start : start + batch_size], side="right")
        labels = batch.pop("labels")
        batches.append(({**batch, "use_cache": False}, labels))
    return batches

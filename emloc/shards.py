"""Write a safetensors checkpoint of any size, one shard in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from emloc.checkpoint import WEIGHTS, index_of
from emloc.files import write_json


@dataclass(frozen=True)
class Piece:
    """One tensor to write: a stand-in on meta with its shape and dtype, and how to get it."""

    like: Tensor
    read: Callable[[], Tensor]


def write_shards(
    folder: Path,
    pieces: Mapping[str, Piece],
    *,
    max_shard_size: int | str,
    progress: str | None = None,
    weights: str = WEIGHTS,
) -> None:
    """Write the pieces as transformers names its files: one, or several with an index.

    Args:
        folder: of the checkpoint, which exists.
        pieces: key in the checkpoint → tensor; each is read once, just before its shard is written.
        max_shard_size: bytes or a text such as "2GB"; about as much memory is needed.
        progress: what a progress bar over the tensors is called; None for none.
        weights: name of the one file, from which those of shards and index follow; diffusers has
            another.
    """
    likes = {key: piece.like for key, piece in pieces.items()}
    pattern = weights.replace(".safetensors", "{suffix}.safetensors")
    shards = split_torch_state_dict_into_shards(
        likes, max_shard_size=max_shard_size, filename_pattern=pattern
    )
    with tqdm(total=len(pieces), desc=progress, disable=progress is None) as bar:
        for file, keys in shards.filename_to_tensors.items():
            # No name for the tensors: it would keep them while the next shard's are read.
            save_file(
                {key: pieces[key].read() for key in keys}, folder / file, metadata={"format": "pt"}
            )
            bar.update(len(keys))
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_json(folder / index_of(weights), index)

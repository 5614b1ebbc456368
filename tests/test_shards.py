"""A checkpoint is written shard by shard, with one shard in memory."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from emloc.checkpoint import INDEX
from emloc.shards import Piece, write_shards

SHARD = 3 * 4 * 100  # three tensors of 100 floats


def test_no_more_than_one_shard_is_in_memory(tmp_path: Path) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def read(number: int) -> Tensor:
        nonlocal most
        tensor = torch.full((100,), float(number))
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    like = torch.empty(100, device="meta")
    pieces = {f"t{n}": Piece(like, lambda n=n: read(n)) for n in range(9)}
    write_shards(tmp_path, pieces, max_shard_size=SHARD)
    assert most == 3
    weights = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    assert weights.keys() == pieces.keys() and len(set(weights.values())) == 3
    for key, file in weights.items():
        assert load_file(tmp_path / file)[key].eq(float(key[1:])).all()


def test_a_small_checkpoint_is_one_file_without_an_index(tmp_path: Path) -> None:
    piece = Piece(torch.empty(100, device="meta"), lambda: torch.ones(100))
    write_shards(tmp_path, {"t": piece}, max_shard_size=SHARD)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]

"""Models on disk, opened for streaming: tiny ones of transformers, and hand-made modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from emloc.models import open_model
from emloc.weights import Location, OpenedModel, WeightStore
from tests.tiny import VOCAB_SIZE, save_tiny


def open_tiny(
    name: str, folder: Path, dtype: torch.dtype = torch.float32, **overrides: Any
) -> OpenedModel:
    """Save a tiny model in `folder` and open it."""
    return open_model(save_tiny(name, folder, dtype=dtype, **overrides), dtype=dtype)


def open_module(module: nn.Module, folder: Path) -> OpenedModel:
    """Save any module's weights in `folder`, move it to the meta device, and open it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "model.safetensors"
    names = [name for name, _ in module.named_parameters()]
    save_file({name: module.get_parameter(name).detach().clone() for name in names}, file)
    store = WeightStore({name: Location(file, name) for name in names})
    return OpenedModel(cast(Any, module.to("meta").eval()), store)


def unequal_batches(
    *,
    side: str = "right",
    seed: int = 0,
    lengths: tuple[tuple[int, ...], ...] = ((5, 9), (7, 3, 4)),
) -> list[dict[str, Tensor]]:
    """Padded batches; the pads are random tokens, so that reading them would show."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for rows in lengths:
        longest = max(rows)
        ids = torch.randint(3, VOCAB_SIZE, (len(rows), longest), generator=generator)
        place = torch.arange(longest).expand(len(rows), longest)
        length = torch.tensor(rows)[:, None]
        mask = place < length if side == "right" else place >= longest - length
        batches.append({"input_ids": ids, "attention_mask": mask.long()})
    return batches

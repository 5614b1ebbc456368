"""Distillation of an emulator towards what its original said, and how far apart they are.

- `HealTrainer`: the loss of a training step
- `mean_divergence`: the same over rows, without training
- `with_targets`, `collate`: rows with what the original said to them

Letters: B rows of a batch, T tokens of the longest, n taught positions, m kept tokens of each,
h hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from emloc.families import Codec
from emloc.loss import LossInChunks
from emloc.models import evaluating
from emloc.teach import Targets, divergence, taught_labels
from emloc.trainer import LoraTrainer

CHUNK = 2**24  # logits at once, 64 MiB in float32, and some times that for their gradient


class HealTrainer(LoraTrainer):
    """Trains towards what the original said; batches are those of `collate`."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sum of the divergences over the taught positions of a step, by their number."""
        total, count = batch_divergence(model, self.chunks, inputs)
        return total / (count if num_items_in_batch is None else num_items_in_batch)


def batch_divergence(
    model: nn.Module, chunks: LossInChunks, batch: Mapping[str, Any]
) -> tuple[Tensor, int]:
    """Sum of `teach.divergence` over a batch's taught positions, and their number.

    Where the output head allows, it is applied chunk by chunk, so that logits are never there as a
    whole.
    """
    inputs = dict(batch)
    mask = inputs.pop("labels")[:, 1:] != -100  # (B, T-1)
    ids, logprobs = inputs.pop("taught_ids"), inputs.pop("taught_logprobs")
    if not chunks.possible:
        logits = model(**inputs, use_cache=False).logits[:, :-1][mask]
        return divergence(logits, ids, logprobs).sum(), len(ids)
    with chunks.head_is(lambda hidden: hidden):
        hidden = model(**inputs, use_cache=False).logits[:, :-1][mask]  # (n, h)
    return sum_of_divergences(chunks.head, hidden, ids, logprobs), len(ids)


def sum_of_divergences(head: nn.Module, hidden: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    """Sum of `teach.divergence` of `head(hidden)`, with the logits of a chunk of positions at once,
    on the way back as well.

    Args:
        head: of a vocabulary of V.
        hidden: (n, h).
        ids, logprobs: of the original, (n, m).
    """
    vocabulary = cast(Tensor, head.weight).shape[0]
    size = max(1, CHUNK // vocabulary)

    def part(hidden: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
        return divergence(head(hidden), ids, logprobs).sum()

    if len(hidden) <= size:
        return part(hidden, ids, logprobs)
    total = hidden.new_zeros((), dtype=torch.float32)
    for one in zip(hidden.split(size), ids.split(size), logprobs.split(size), strict=True):
        total = total + checkpoint(part, *one, use_reentrant=False)
    return total


def mean_divergence(
    model: Any, *, rows: Sequence[Mapping[str, Any]], collate: Any, size: int
) -> float:
    """Mean divergence from the original at the taught positions of some rows, in nats."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    chunks = LossInChunks(base)
    total, count = 0.0, 0
    with evaluating(model):
        for start in range(0, len(rows), size):
            batch = {k: v.to(base.device) for k, v in collate(rows[start : start + size]).items()}
            found, positions = batch_divergence(model, chunks, batch)
            total, count = total + float(found), count + positions
    return total / count


def with_targets(
    config: Any, examples: Sequence[Mapping[str, Any]], targets: Targets
) -> list[dict[str, Any]]:
    """Examples labelled where the original taught, with their place in the targets."""
    labels = [taught_labels(config, example) for example in examples]
    if [sum(label != -100 for label in row) for row in labels] != targets.counts:
        raise ValueError(
            f"{targets.folder} holds what the original said to other rows than these: run teach "
            "again."
        )
    rows = zip(examples, labels, strict=True)
    found = [{**e, "labels": row, "taught": place} for place, (e, row) in enumerate(rows)]
    return [row for row in found if targets.counts[row["taught"]]]


def collate(
    codec: Codec, targets: Targets, rows: Sequence[Mapping[str, Any]], **_: Any
) -> dict[str, Tensor]:
    """A batch with the targets of its taught positions, (n, m) each, row by row."""
    ids, logprobs = zip(*(targets.row(row["taught"]) for row in rows), strict=True)
    batch = codec.collate(rows, side="right")
    return {**batch, "taught_ids": torch.cat(ids), "taught_logprobs": torch.cat(logprobs)}

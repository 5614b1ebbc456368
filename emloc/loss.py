"""The loss of a language model whose logits would not fit: chunk by chunk, by torch.

A vocabulary of 150,000 makes the logits of 4,000 labels 2.4 GB in float32, and their gradient as
much again. `LossInChunks` lets a model's own forward stop before its output head, and computes head
and cross entropy with `torch.nn.functional.linear_cross_entropy`, which holds a chunk at a time.

Letters: n labels, h hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from emloc.models import evaluating

LARGE = 2**26  # logits, 256 MiB in float32: fewer are computed at once, which is quicker
_IGNORED = -100
_FACTOR = 2.0**12  # a power of two, which rounds nothing
_TOLERANCE = 1e-2


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross entropies of `hidden @ weight.T`, whose logits are never there as a whole.

    Args:
        hidden: (n, h).
        weight: of the output head, (V, h), which gets no gradient.
        labels: (n,) int64; -100 does not count.

    Returns:
        A scalar in float32.
    """
    options = torch.nn.LinearCrossEntropyOptions()
    device = hidden.device.type
    with torch.autocast(device, enabled=False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*linear_cross_entropy.*")
        losses = nn.functional.linear_cross_entropy(
            hidden.to(weight.dtype),
            weight,
            labels,
            reduction="none",  # in bfloat16 their sum would be rounded to 0.4 % as well
            ignore_index=_IGNORED,
            options=options,
        )
    return losses.float().sum()


class LossInChunks:
    """Computes a causal language model's loss without all of its logits, if the model allows it.

    Args:
        model: of transformers, without wrappers; its output head has no bias and no LoRA, and
            nothing but the loss is computed from the logits.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.head = model, model.get_output_embeddings()

    def wanted(self, labels: int) -> bool:
        """Whether the logits of so many labels are too many to be there at once, and the model's
        loss can be computed otherwise."""
        if labels * getattr(self.head, "out_features", 0) <= LARGE:
            return False
        return self.possible

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model's forward computes its loss in chunks, and has hidden states
        where it has logits else."""
        model, head = self.model, self.head
        own = vars(model).get("_loss_function")
        model.loss_function = partial(_loss, head)
        try:
            with self.head_is(lambda hidden: hidden):
                yield
        finally:
            model._loss_function = own
            if own is None:
                del model._loss_function

    @contextlib.contextmanager
    def head_is(self, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Within the block the output head computes something else."""
        self.head.forward = function
        try:
            yield
        finally:
            del self.head.forward

    @functools.cached_property
    def possible(self) -> bool:
        """Whether the loss is the usual one and what follows the head is linear, so that it may as
        well come before: a model may cap its logits."""
        head = self.head
        if type(head) is not nn.Linear or head.bias is not None or head.weight.requires_grad:
            return False
        if self.model.loss_function is not ForCausalLMLoss:
            return False
        ids = torch.ones(1, 2, dtype=torch.int64, device=self.model.device)
        seen = []
        with evaluating(self.model):
            for factor in (1.0, _FACTOR):
                with self.head_is(lambda hidden, factor=factor: hidden * factor):
                    seen.append(self.model(input_ids=ids, use_cache=False).logits.float() / factor)
        return bool((seen[0] - seen[1]).abs().max() <= _TOLERANCE * seen[0].abs().max())


def _loss(
    head: nn.Linear,
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int | None = None,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """As transformers' `ForCausalLMLoss`, of hidden states (…, h) that stand for the logits."""
    if shift_labels is None:
        assert labels is not None
        shift_labels = nn.functional.pad(labels[..., 1:], (0, 1), value=_IGNORED)
    targets, weight = shift_labels.flatten(), head.weight  # whole in a forward pass
    total = chunked_cross_entropy(logits.reshape(-1, weight.shape[1]), weight, targets)
    count = (targets != _IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return total / count

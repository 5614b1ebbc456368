"""How much an error in each layer's output matters to a language model's loss.

To second order, at a model that has learnt its rows, an error δy in a layer's output raises the
loss by ½ δyᵀ F δy, where F = E[g gᵀ] is the Fisher information and g = ∂L/∂y; so ΔL ≈ ½ E[(gᵀδy)²].
Taking F to be the same in all directions, and errors of layers and tokens to be independent of each
other, leaves ½ E‖g‖²/o · ‖δy‖². Summed over the calibration tokens, ‖δy‖² is what the eigenvalues
of the factors predict, and the mean of ‖g‖²/o is the weight that `allocate` gives it.

One backward pass finds all weights. No parameter gets a gradient, and blocks are computed anew in
it, so that it takes the model, the hidden states between its blocks, and one block's insides.

Letters: o out features, B rows of a batch, T tokens of the longest, n tokens.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from emloc.families import Codec
from emloc.loss import LossInChunks
from emloc.moments import text_modules, unpadded

_IGNORED = -100


def sensitivities(
    model: PreTrainedModel,
    examples: Sequence[Mapping[str, Any]],
    *,
    codec: Codec,
    names: Collection[str],
    batch_size: int = 1,
    checkpointing: bool = True,
    progress: bool = False,
) -> dict[str, float]:
    """The mean of ‖∂L/∂y‖² / o over the tokens that a layer sees, padding left out.

    L is the sum of the cross entropies of all labels, so that neither the batches nor the number
    of labels of other rows change a row's part.

    Args:
        model: a language or vision-language model, an emulator as a rule, with its weights on one
            device; it is left as it was.
        examples: as the codec gives them; those without a label are left out.
        codec: makes batches of the examples.
        names: of the linear layers.
        batch_size: rows to run at once.
        checkpointing: compute blocks anew in the backward pass, for less memory.
        progress: show a bar over the batches.

    Returns:
        Layer name → weight, in the order of `names`; 0 where the loss does not depend on a layer.

    Raises:
        ValueError: no row has a label, a layer never ran, or a gradient is not finite.
    """
    labelled = [row for row in examples if any(label != _IGNORED for label in row["labels"][1:])]
    if not labelled:
        raise ValueError(
            f"none of {len(examples)} rows has a label, but sensitivity needs the loss of some: "
            "raise calibrate.samples, or take another compress.allocation."
        )
    starts = range(0, len(labelled), batch_size)
    with _frozen(model), _recomputed(model) if checkpointing else contextlib.nullcontext():
        chunks = LossInChunks(model)
        norms = _Norms(model, names)
        for start in tqdm(starts, desc="sensitivity", unit="batch", disable=not progress):
            batch = codec.collate(labelled[start : start + batch_size], side="right")
            norms.add(chunks, {name: value.to(model.device) for name, value in batch.items()})
    return norms.means()


class _Norms:
    """Sums of ‖∂L/∂y‖² / o of some layers, batch by batch."""

    def __init__(self, model: PreTrainedModel, names: Collection[str]) -> None:
        modules = dict(model.named_modules())
        self._layers = {name: modules[name] for name in names}
        self._of_text = text_modules(model)
        self._sums = dict.fromkeys(names, 0.0)
        self._tokens = dict.fromkeys(names, 0)
        self._ran: set[str] = set()

    def add(self, chunks: LossInChunks, batch: Mapping[str, Tensor]) -> None:
        """Run a batch forward and backward."""
        model = chunks.model
        # What the gradient flows back to, added to those outputs that no other layer reaches: the
        # first ones of the text, and of the pictures.
        anchor = torch.zeros((), device=model.device, requires_grad=True)
        found: dict[str, Tensor] = {}
        in_chunks = chunks.wanted(batch["labels"].numel())
        labels = (batch["labels"][:, 1:] != _IGNORED).sum()
        with self._hooked(anchor, batch.get("attention_mask"), found):
            with chunks.applied() if in_chunks else contextlib.nullcontext():
                loss = model(**batch, use_cache=False).loss * labels
            torch.autograd.grad(loss, anchor, allow_unused=True)
        for name, value in found.items():
            self._sums[name] += float(value)

    def means(self) -> dict[str, float]:
        """Layer name → mean over its tokens."""
        for name, total in self._sums.items():
            if name not in self._ran:
                raise ValueError(
                    f"{name} was not used by any row, so it cannot be told how much it matters: "
                    "leave it out of the targets or add rows that use it."
                )
            if not math.isfinite(total):
                raise ValueError(
                    f"the gradient at {name} is not finite (NaN or infinite): check the checkpoint."
                )
        return {name: total / max(1, self._tokens[name]) for name, total in self._sums.items()}

    @contextlib.contextmanager
    def _hooked(
        self, anchor: Tensor, mask: Tensor | None, found: dict[str, Tensor]
    ) -> Iterator[None]:
        handles = [
            layer.register_forward_hook(
                partial(self._watch, name, anchor, mask if layer in self._of_text else None, found)
            )
            for name, layer in self._layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch(
        self,
        name: str,
        anchor: Tensor,
        mask: Tensor | None,
        found: dict[str, Tensor],
        module: nn.Module,
        inputs: Any,
        output: Tensor,
    ) -> Tensor:
        def take(gradient: Tensor) -> None:
            rows = unpadded(gradient, mask)  # (n, o)
            squares = torch.linalg.vector_norm(rows, dtype=torch.float32).square() / rows.shape[-1]
            found[name] = found[name] + squares if name in found else squares
            self._tokens[name] += rows.shape[0]

        self._ran.add(name)
        if not output.requires_grad:
            output = output + anchor.to(output.dtype)
        output.register_hook(take)
        return output


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, with parameters that get no gradient, for the length of the block."""
    modes = {module: module.training for module in model.modules()}
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in learnt:
            parameter.requires_grad = True
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def _recomputed(model: nn.Module) -> Iterator[None]:
    """Blocks keep nothing for the backward pass but their inputs, in evaluation mode as well."""
    blocks: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    own = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward

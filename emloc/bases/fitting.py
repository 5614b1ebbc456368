"""Training from scratch: Muon for the matrices, AdamW for all else, one cosine of learning rates.

- `fit`: train a module's parameters on endless batches
- `batches_of`: numbers of rows without end, in a new order each time round
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

EVERY = 50  # steps between two looks at the held-out pictures, and last losses that are averaged
_WARMUP = 0.05  # share of the steps
_ADAMW = 0.1  # its learning rate as a share of Muon's
_DECAY = 0.05  # of the matrices

Batch = TypeVar("Batch")


def fit(
    part: nn.Module,
    loss_of: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    *,
    steps: int,
    learning_rate: float,
    is_matrix: Callable[[str, nn.Parameter], bool],
    title: str,
    progress: bool,
    look: Callable[[], str] | None = None,
) -> float:
    """Train the parameters of `part` that need gradients; return the mean of the last losses.

    Args:
        part: what to train; left in training mode.
        loss_of: a batch → its loss, a scalar.
        batches: at least `steps` of them.
        steps: how many.
        learning_rate: the highest one, of Muon; AdamW takes a tenth.
        is_matrix: which parameters, of two dimensions or more, Muon trains; the kernel of a
            convolution is (out, in × height × width) to it.
        title: what the bar says.
        progress: show the bar.
        look: what to say beside the loss, asked for every 50 steps.

    Raises:
        ValueError: the loss became NaN or infinite.
    """
    named = [(name, p) for name, p in part.named_parameters() if p.requires_grad]
    kernels = [p for name, p in named if is_matrix(name, p)]
    matrices = [p if p.ndim == 2 else nn.Parameter(p.data.view(len(p), -1)) for p in kernels]
    kept = {id(parameter) for parameter in kernels}
    rest = [parameter for _, parameter in named if id(parameter) not in kept]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=_DECAY),
        torch.optim.AdamW(rest, lr=_ADAMW * learning_rate, betas=(0.9, 0.99), weight_decay=0.0),
    ]
    warmup = math.ceil(_WARMUP * steps)
    schedules = [get_cosine_schedule_with_warmup(o, warmup, steps) for o in optimizers]
    losses: list[float] = []
    said = ""
    part.train()
    with tqdm(total=steps, desc=title, unit="step", disable=not progress) as bar:
        for step, batch in zip(range(1, steps + 1), batches, strict=False):
            loss = loss_of(batch)
            losses.append(_finite(loss.item(), step, title, learning_rate))
            loss.backward()
            nn.utils.clip_grad_norm_([*kernels, *rest], 1.0)
            for kernel, matrix in zip(kernels, matrices, strict=True):
                if kernel.grad is not None:
                    matrix.grad = kernel.grad.view(matrix.shape)
            for each in (*optimizers, *schedules):
                each.step()
            part.zero_grad()
            if look is not None and step % EVERY == 0:
                said = f", {look()}"
            bar.set_postfix_str(f"loss={losses[-1]:.4f}{said}", refresh=False)
            bar.update()
    last = losses[-EVERY:]
    return sum(last) / len(last)


def _finite(loss: float, step: int, title: str, learning_rate: float) -> float:
    if not math.isfinite(loss):
        raise ValueError(
            f"the loss became {loss} at step {step} of {title!r}: try a lower learning_rate than "
            f"{learning_rate:g}."
        )
    return loss


def batches_of(rows: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless (size,) int64 of row numbers, each row once a round; all rows if there are fewer."""
    size = min(size, rows)
    while True:
        order = torch.randperm(rows, generator=generator)
        yield from (order[start : start + size] for start in range(0, rows - size + 1, size))

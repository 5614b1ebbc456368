"""What a trained adapter's directions see: QᵀC of each layer, to weight a correction by activation.

A second pass over the calibration rows, streamed like the first (see `emloc.calibrate`): Q is known
only once the adapter is trained, and QᵀC (r×i) is small where C (i×i) is not.

Letters: i in features, r LoRA rank, n tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from emloc.factors import full_float32
from emloc.moments import text_modules, unpadded
from emloc.streaming import Stream
from emloc.weights import OpenedModel


def project(
    opened: OpenedModel,
    batches: Sequence[Mapping[str, Any]],
    bases: Mapping[str, Tensor],
    *,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> dict[str, Tensor]:
    """Σ (Qᵀx) xᵀ = QᵀC of the inputs x of some linears, over all tokens but padding.

    Peak memory: as streaming's, and the sums of all layers.

    Args:
        opened: the original.
        batches: keyword arguments of its forward, as `calibrate` takes them.
        bases: layer name → Q (i×r), with orthonormal columns.
        device: where to compute.
        progress: show a bar over the units.

    Returns:
        Layer name → QᵀC (r×i), float32, on the CPU; zeros for a layer that no row used.

    Raises:
        ValueError: a layer saw values that are not finite.
    """
    stream = Stream(opened, device)
    on_device = [send_to_device(dict(batch), stream.device) for batch in batches]
    of_text = text_modules(opened.model)
    placed = {name: basis.to(stream.device, torch.float32) for name, basis in bases.items()}
    sums = {name: torch.zeros_like(basis.T).contiguous() for name, basis in placed.items()}

    def add(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        mask = on_device[stream.current].get("attention_mask") if module in of_text else None
        x = unpadded(args[0] if args else kwargs["input"], mask).float()  # (n, i)
        sums[name].addmm_((x @ placed[name]).T, x)

    with ExitStack() as stack, full_float32():
        for name in bases:
            linear = opened.model.get_submodule(name)
            hook = linear.register_forward_pre_hook(partial(add, name), with_kwargs=True)
            stack.callback(hook.remove)
        units = {stream.unit_of(name) for name in bases}
        stream.run(on_device, until=units, progress="correct" if progress else None)
    for name, total in sums.items():
        if not total.isfinite().all():
            raise ValueError(
                f"the activations into {name} are not finite (NaN or infinite): check the "
                "checkpoint, and use bfloat16 or float32 instead of float16."
            )
    return {name: total.cpu() for name, total in sums.items()}

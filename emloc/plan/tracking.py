"""Bytes of the tensors that come to life in a `with` block, at their peak, and the FLOPs.

Works on real tensors and on fake ones, which have no data: torch's `FakeTensorMode` says which.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import (
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop,
    sdpa_flop,
)

_BLOCK = 512  # bytes that an accelerator's allocator rounds up to
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
for _operation, _formula in ((_ATTENTION, sdpa_flop), (_ATTENTION_BACKWARD, sdpa_backward_flop)):
    if _operation not in flop_registry:  # torch counts an accelerator's attention only
        register_flop_formula(_operation, get_raw=True)(_formula)


class AllocationTracker(TorchDispatchMode):
    """Counts the storages of all tensors that operations return while it is active.

    Args:
        known: tensors that are there already and do not count.
        vocabulary: tensors that are so wide count as logits, too; None for none.
        block: on accelerators torch rounds each allocation up to so many bytes.

    Attributes:
        live_bytes: of the storages that are alive now.
        peak_bytes: the most that were alive at once.
        logits_bytes: how much of the peak was logits.
        flops: of matrix products and attention, as torch counts them.
    """

    def __init__(
        self, known: Iterable[Tensor] = (), *, vocabulary: int | None = None, block: int = 1
    ) -> None:
        super().__init__()
        self._vocabulary, self._block = vocabulary, block
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet(
            tensor.untyped_storage() for tensor in known
        )
        self.live_bytes = self.peak_bytes = self.logits_bytes = self._live_logits = 0
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and count what it made."""
        result = func(*args, **(kwargs := kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._count(value)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen or tensor.device.type == "meta":
            return
        self._seen.add(storage)
        size = -(-storage.nbytes() // self._block) * self._block
        of_logits = size if tensor.ndim and tensor.shape[-1] == self._vocabulary else 0
        weakref.finalize(storage, self._forget, size, of_logits)
        self.live_bytes += size
        self._live_logits += of_logits
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes, self.logits_bytes = self.live_bytes, self._live_logits

    def _forget(self, size: int, of_logits: int) -> None:
        self.live_bytes -= size
        self._live_logits -= of_logits


@contextmanager
def without_data(model: nn.Module, device: torch.device) -> Iterator[None]:
    """For the length of a `with` block, new tensors have no data, and a model on the meta device
    is as if on `device`; afterwards it must not be used any more.

    Integers made by `torch.tensor` keep their values; an operation whose result's shape depends on
    data raises.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    value = torch.empty_like(parameter, device=device)
                    fake = nn.Parameter(value, requires_grad=parameter.requires_grad)
                    module._parameters[key] = fake
            for key, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    module._buffers[key] = torch.empty_like(buffer, device=device)
        yield


def bytes_of(model: nn.Module, *, trained: bool | None = None) -> int:
    """Bytes of parameters and buffers, those that two modules share once.

    Args:
        trained: True counts the parameters with a gradient alone, False all but those.
    """
    tensors = [p for p in model.parameters() if trained is None or p.requires_grad == trained]
    buffers = [] if trained else list(model.buffers())
    return sum(tensor.nbytes for tensor in (*tensors, *buffers))


@contextmanager
def tracked(model: Any, device: torch.device) -> Iterator[AllocationTracker]:
    """Track what a model computes on a device, its own weights and gradients left out."""
    text = getattr(getattr(model, "config", None), "get_text_config", lambda: None)()
    vocabulary = getattr(text, "vocab_size", None)
    block = 1 if device.type == "cpu" else _BLOCK
    known = [*model.parameters(), *model.buffers()]
    known += [parameter.grad for parameter in known if parameter.grad is not None]
    with AllocationTracker(known, vocabulary=vocabulary, block=block) as tracker:
        yield tracker

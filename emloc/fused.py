"""LoRA on a low-rank layer in the layer's own two matrix products, for training.

    y = W_out W_in x + s B A x + b = [W_out  sB] [W_in; A] x + b

peft computes the two terms apart: ten products forward and backward, six of them only r wide, and
passes over whole activations to scale and add them; in bfloat16 it casts x to float32 and back.
With A below W_in and sB beside W_out in common buffers, four products are left, and two for the
gradients of A and B.

The rank of the buffers is filled up with zeros to a multiple of 8, since accelerators multiply
matrices with odd strides slowly. The result is peft's up to rounding.

Letters: o out features, i in features, k rank, r LoRA rank, n tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from emloc.lowrank import LowRankLinear
from emloc.memory import trim_freed_memory

_MULTIPLE = 8


@contextlib.contextmanager
def fused_lora(model: nn.Module) -> Iterator[int]:
    """For the length of a `with` block, compute LoRA on low-rank layers in common products.

    Layers with dropout, or of another kind, stay with peft. Gives the number of fused layers.

    Args:
        model: a model with peft's LoRA, where it will be trained; parameters stay what they are.
    """
    fused = []
    for layer in model.modules():
        if _fits(layer):
            fused.append(_Fused(cast(LoraLinear, layer)))
            trim_freed_memory()
    try:
        yield len(fused)
    finally:
        while fused:  # a layer's buffers go before the next one's weights are copied
            fused.pop().release()
            trim_freed_memory()


def _fits(module: nn.Module) -> bool:
    if type(module) is not LoraLinear or type(module.base_layer) is not LowRankLinear:
        return False
    base, names = module.base_layer, module.active_adapters
    return (
        len(names) == 1
        and names[0] in module.lora_A
        and not module.lora_variant
        and isinstance(module.lora_dropout[names[0]], nn.Identity)
        and module.lora_B[names[0]].bias is None
        and not any(p.requires_grad or p.is_meta for p in base.parameters())
        and not any(isinstance(p, DTensor) for p in base.parameters())  # a piece of it
    )


class _Fused:
    """The buffers of one layer, and the forward that stands in for peft's.

    Attributes:
        down: [W_in; A; 0] (K×i), K the next multiple of 8 from k + r.
        up: [W_out  sB  0] (o×K).
        lora: where the LoRA is in K.
    """

    def __init__(self, layer: LoraLinear) -> None:
        self.layer, base = layer, cast(LowRankLinear, layer.base_layer)
        (name,) = layer.active_adapters
        self.a = cast(nn.Parameter, layer.lora_A[name].weight)  # (r, i)
        self.b = cast(nn.Parameter, layer.lora_B[name].weight)  # (o, r)
        self.scaling = layer.scaling[name]
        end = base.rank + self.a.shape[0]
        self.lora = slice(base.rank, end)
        size = -(-end // _MULTIPLE) * _MULTIPLE
        self.down = base.weight_in.new_zeros(size, base.in_features)
        self.up = base.weight.new_zeros(base.out_features, size)
        self.down[: base.rank], self.up[:, : base.rank] = base.weight_in.data, base.weight.data
        base.weight_in.data, base.weight.data = self.down[: base.rank], self.up[:, : base.rank]
        self.bias = base.bias
        layer.forward = self.forward  # type: ignore[method-assign]

    def release(self) -> None:
        """Give peft its forward and the layer its own weights back."""
        del self.layer.forward
        base = cast(LowRankLinear, self.layer.base_layer)
        base.weight_in.data = base.weight_in.data.clone()
        base.weight.data = base.weight.data.contiguous()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map (..., i) to (..., o); what is not plain training is left to peft."""
        layer = self.layer
        if args or kwargs or layer.disable_adapters or layer.merged or not self._computes_in(x):
            return type(layer).forward(layer, x, *args, **kwargs)
        with torch.no_grad():
            self.down[self.lora] = self.a
            self.up[:, self.lora] = self.b * self.scaling
        y: Tensor = _Products.apply(x.reshape(-1, x.shape[-1]), self.a, self.b, self)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _computes_in(self, x: Tensor) -> bool:
        """Whether peft, too, would multiply in the dtype of the factors."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return x.dtype == dtype == self.down.dtype


class _Products(torch.autograd.Function):
    """y = up (down x) + b with gradients for x, A and B.

    The buffers are not saved: they are the same on the way back, as an optimizer steps only then.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, fused: _Fused) -> Tensor:
        h = nn.functional.linear(x, fused.down)  # (n, K)
        ctx.fused = fused
        ctx.save_for_backward(x, h[:, fused.lora].clone())
        return nn.functional.linear(h, fused.up, fused.bias)  # (n, o)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:  # type: ignore[override]
        fused: _Fused = ctx.fused
        x, h = ctx.saved_tensors  # (n, i), (n, r)
        gh = g @ fused.up  # (n, K)
        gx = gh @ fused.down if ctx.needs_input_grad[0] else None
        ga = gh[:, fused.lora].T @ x
        gb = (h.T @ g).mul_(fused.scaling).T  # g.T @ h is several times slower on a CPU
        return gx, ga.to(fused.a.dtype), gb.to(fused.b.dtype), None

"""The low-rank linear layer, and the "emloc" loader that lets transformers build models of it.

- `LowRankLinear`: y = W_out (W_in x) + b, a drop-in for `nn.Linear`
- `ranks_of`: the ranks of a model's low-rank layers
- `EmlocConfig`: the `quantization_config` of an emulator's config.json
- `register`: called on `import emloc`

Letters: o out features, i in features, k rank.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import (
    HfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "emloc"


class _Method(StrEnum):
    """diffusers wants the name of a method as a member of an enumeration."""

    EMLOC = METHOD


class LowRankLinear(nn.Linear):
    """A linear layer of rank k that keeps the product of two factors in place of its weight.

    It is an `nn.Linear`, so LoRA and device maps apply as usual. Its parameters are `weight` (o×k),
    `weight_in` (k×i) and `bias` (o) or None. A loader that does not know this class fails on the
    shape of `weight` instead of silently starting from random numbers.

    Args:
        in_features: i.
        out_features: o.
        rank: k, from 1 to min(o, i).
        bias: whether there is a bias.
    """

    weight_in: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(
                f"rank is {rank}, but a {out_features}×{in_features} layer takes a rank from 1 to "
                f"{min(in_features, out_features)}: choose a rank in that range."
            )
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_features, rank, **options))
        self.weight_in = nn.Parameter(torch.empty(rank, in_features, **options))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, **options))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both factors so that their product has the variance of `nn.Linear`'s own weight."""
        nn.init.normal_(self.weight, std=self.rank**-0.5)
        nn.init.uniform_(self.weight_in, -(self.in_features**-0.5), self.in_features**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., i) to (..., o), at a cost of k (i + o) instead of i · o a token."""
        return nn.functional.linear(
            nn.functional.linear(input, self.weight_in), self.weight, self.bias
        )

    def extra_repr(self) -> str:
        """Shapes and rank, as printed by `print(model)`."""
        return f"{super().extra_repr()}, rank={self.rank}"


def replace_linears(model: nn.Module, ranks: dict[str, int]) -> None:
    """Put a `LowRankLinear` (on the linear's own device, uninitialised) in place of each linear.

    Args:
        model: any module; changed in place.
        ranks: module name → rank k.

    Raises:
        ValueError: a name is no `nn.Linear` of this model, or a rank does not fit its layer.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, rank in ranks.items():
        if name not in linears:
            raise ValueError(
                f"{name!r} is in the emulator's ranks but is no linear layer of "
                f"{type(model).__name__}: the emulator was made for another model; rebuild it."
            )
        old = linears[name]
        parent, _, child = name.rpartition(".")
        with torch.no_grad(), torch.device("meta"):
            new = LowRankLinear(
                old.in_features,
                old.out_features,
                rank,
                bias=old.bias is not None,
                dtype=old.weight.dtype,
            )
        device = old.weight.device
        model.get_submodule(parent).register_module(child, new.to_empty(device=device))


def ranks_of(model: nn.Module) -> dict[str, int]:
    """Module name → rank of each low-rank layer."""
    return {name: m.rank for name, m in model.named_modules() if isinstance(m, LowRankLinear)}


class EmlocConfig(QuantizationConfigMixin):
    """What an emulator's config.json says of its low-rank layers.

    Args:
        ranks: module name → rank.
        base_model: name of the original: a hub id, or a name with its fingerprint.
    """

    def __init__(
        self, ranks: dict[str, int] | None = None, base_model: str | None = None, **_: Any
    ) -> None:
        self.quant_method = _Method.EMLOC  # type: ignore[assignment]  # not in their enum
        self.ranks = ranks or {}
        self.base_model = base_model


class EmlocQuantizer(HfQuantizer):
    """Swaps in the low-rank layers before transformers loads the weights."""

    requires_calibration = True
    quantization_config: EmlocConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        replace_linears(model, self.quantization_config.ranks)

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def register() -> None:
    """Make transformers know the "emloc" method; calling it again does nothing."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(EmlocConfig)
        register_quantizer(METHOD)(EmlocQuantizer)

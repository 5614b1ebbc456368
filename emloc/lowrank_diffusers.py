"""The "emloc" loader that lets diffusers build denoisers with low-rank layers.

- `register`: called on `import emloc`
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)
from diffusers.quantizers.base import DiffusersQuantizer
from torch import nn

from emloc.lowrank import METHOD, EmlocConfig, LowRankLinear, replace_linears


class EmlocDenoiserQuantizer(DiffusersQuantizer):
    """Swaps in the low-rank layers before diffusers loads the weights."""

    requires_calibration = True
    use_keep_in_fp32_modules = True
    quantization_config: EmlocConfig  # type: ignore[assignment]  # transformers' kind of config

    def _process_model_before_weight_loading(self, model: ModelMixin, **_: Any) -> None:
        _teach_shapes()
        replace_linears(model, self.quantization_config.ranks)

    def _process_model_after_weight_loading(self, model: ModelMixin, **_: Any) -> ModelMixin:
        # The factors are plain parameters, so `.to(dtype)` is allowed.
        model.is_quantized = False  # type: ignore[assignment]
        return model

    def get_cuda_warm_up_factor(self) -> int:
        return 2  # 16-bit weights, as in a model that is not quantised

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def register() -> None:
    """Make diffusers know the "emloc" method; calling it again does nothing."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, EmlocConfig)
    AUTO_QUANTIZER_MAPPING.setdefault(METHOD, EmlocDenoiserQuantizer)


def _teach_shapes() -> None:
    """Let Flux's `load_lora_weights` know the shape that a low-rank layer stands for.

    It compares an adapter with the shape of each linear's `weight`, and replaces a linear whose
    weight seems too small by a larger one.
    """
    from diffusers.loaders import FluxLoraLoaderMixin

    original: Any = FluxLoraLoaderMixin._calculate_module_shape
    if getattr(original, "knows_emloc", False):
        return

    def shape(
        model: nn.Module,
        base_module: nn.Module | None = None,
        base_weight_param_name: str | None = None,
    ) -> torch.Size:
        module = base_module
        if module is None and base_weight_param_name is not None:
            module = model.get_submodule(base_weight_param_name.removesuffix(".weight"))
        if isinstance(module, LowRankLinear):
            return torch.Size([module.out_features, module.in_features])
        return original(model, base_module, base_weight_param_name)

    shape.knows_emloc = True  # type: ignore[attr-defined]
    FluxLoraLoaderMixin._calculate_module_shape = staticmethod(shape)  # type: ignore[method-assign]

"""Published models by their shapes: configs without weights, and weights drawn at random.

Weights change neither memory nor speed, so a model of random ones stands for the published one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    InternVLConfig,
    InternVLVisionConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from emloc.lowrank import replace_linears
from emloc.plan.subject import Subject
from emloc.targets import SWEPT
from emloc.weights import Location, OpenedModel, WeightStore

TILE_TOKENS = 256  # of InternVL2.5, for a tile of 448 × 448 pixels
_SPREAD = 0.02
_VIT_300M = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                 num_attention_heads=16, norm_type="layer_norm", attention_bias=True)  # fmt: skip
_VIT_6B = dict(hidden_size=3200, intermediate_size=12800, num_hidden_layers=45,
               num_attention_heads=25, norm_type="rms_norm", use_qk_norm=True)  # fmt: skip


def _llama(hidden: int, wide: int, layers: int, heads: int, groups: int, **more: Any) -> Any:
    fields = dict(hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers)
    fields |= dict(num_attention_heads=heads, num_key_value_heads=groups)
    return more.pop("kind", LlamaConfig)(**fields, **{"tie_word_embeddings": False, **more})


def _internvl(vision: dict[str, Any], text: PreTrainedConfig) -> InternVLConfig:
    eyes = InternVLVisionConfig(image_size=[448, 448], patch_size=[14, 14], **vision)
    return InternVLConfig(
        vision_config=eyes, text_config=text, image_token_id=5, tie_word_embeddings=False
    )


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "tiny": partial(_llama, 64, 128, 2, 2, 1, vocab_size=1024),
    "smollm2-135m": partial(
        _llama, 576, 1536, 30, 9, 3, vocab_size=49152, tie_word_embeddings=True
    ),
    "llama-1b": partial(_llama, 2048, 8192, 16, 32, 8, vocab_size=128256, tie_word_embeddings=True),
    "internvl2_5-8b": lambda: _internvl(
        _VIT_300M, _llama(4096, 14336, 32, 32, 8, vocab_size=92553)
    ),
    "internvl2_5-26b": lambda: _internvl(_VIT_6B, _llama(6144, 16384, 48, 48, 8, vocab_size=92553)),
    "internvl2_5-38b": lambda: _internvl(
        _VIT_6B, _llama(5120, 27648, 64, 40, 8, vocab_size=151674, kind=Qwen2Config)
    ),
}
FLUX = "flux-dev"
NAMES = (*CONFIGS, FLUX)


def subject_of(name: str) -> Subject:
    """The original of a published shape, its blocks' linears swept; its buffers are real."""
    return Subject(
        partial(_empty, name),
        [r".*transformer_blocks.*" if name == FLUX else r".*layers?\.\d+\..*"],
        {".*": SWEPT},
    )


def _empty(name: str, dtype: torch.dtype) -> Any:
    with init_empty_weights(include_buffers=False):
        if name == FLUX:
            model: Any = FluxTransformer2DModel(guidance_embeds=True)
        else:
            config = CONFIGS[name]()
            sees = isinstance(config, InternVLConfig)
            kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
            model = kind.from_config(config)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = nn.Parameter(parameter.to(dtype), requires_grad=False)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.eval()


def random_model(model: Any, device: torch.device) -> Any:
    """Give a model on the meta device random weights on a device, one tensor after the other."""
    drawn: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in drawn:
                value = _random(parameter.shape, parameter.dtype, device)
                drawn[id(parameter)] = nn.Parameter(value, requires_grad=False)
            if parameter is not None:
                module._parameters[key] = drawn[id(parameter)]
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)
    return model


class RandomStore(WeightStore):
    """Draws each parameter when it is read: a checkpoint of any size that is on no disk."""

    def __init__(self, model: nn.Module) -> None:
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        super().__init__({name: Location(Path(), name) for name in names})
        self._like = dict(model.named_parameters(remove_duplicate=False))

    def read(self, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """As `WeightStore.read`, with random numbers."""
        tensors = {}
        for name in names:
            like = self._like[name]
            tensors[name] = _random(like.shape, like.dtype, torch.device(device))
            self.reads[name] += 1
        return tensors


def random_opened(model: Any) -> OpenedModel:
    """A model on the meta device, opened on random weights."""
    return OpenedModel(model, RandomStore(model))


def emulator_of(subject: Subject, ratio: float, dtype: torch.dtype) -> Any:
    """The emulator of a ratio on the meta device, as `Subject.emulator`, its buffers real."""
    model = subject.build(dtype)
    replace_linears(model, subject.ranks(ratio, model))
    return model.requires_grad_(False)


def _random(shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device).normal_(std=_SPREAD)

"""An InternVL of a few million parameters, before any training.

- `build_tokenizer`: whole words of the given texts, bytes for all else
- `build_model`: random weights of a size that suits training from scratch
- `image_processor`: pictures to pixels, one tile a picture
- `save_checkpoint`: all files of a native checkpoint, in one go
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoImageProcessor,
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from emloc.files import writing
from emloc.internvl.processor import CONTEXT, SPECIAL, TEMPLATE, write_settings

SIDE, PATCH = 64, 8  # pixels
TILE_TOKENS = (SIDE // PATCH // 2) ** 2  # a token stands for 2 × 2 patches
PAD, END = "<|pad|>", "<|im_end|>"
_MARKS = [PAD, "<|im_start|>", END, *SPECIAL.values()]
_SIZE: dict[str, Any] = dict(
    hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6
)
_SETTINGS: dict[str, Any] = {
    "force_image_size": SIDE,
    "vision_config": {"image_size": SIDE, "patch_size": PATCH},
    "downsample_ratio": 0.5,
    "dynamic_image_size": False,
}


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that has a token for each word of the texts, and falls back to bytes.

    A word has the same token at the start of a text and after a space. No letter is ever lost.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=_MARKS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(["user\n", "assistant\n", *texts], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=SPECIAL,
        chat_template=TEMPLATE,
    )


def number_of(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """The id of one token."""
    return tokenizer.get_vocab()[token]


def build_model(
    tokenizer: PreTrainedTokenizerFast, *, seed: int
) -> InternVLForConditionalGeneration:
    """The model with random weights on the CPU, in float32; the same for the same seed."""
    numbers = {token: number_of(tokenizer, token) for token in (PAD, END, CONTEXT)}
    text = Qwen2Config(
        **_SIZE,
        vocab_size=len(tokenizer),
        num_key_value_heads=_SIZE["num_attention_heads"],
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        pad_token_id=numbers[PAD],
        eos_token_id=numbers[END],
    )
    vision = InternVLVisionConfig(
        **_SIZE,
        image_size=SIDE,
        patch_size=PATCH,
        attention_bias=True,
        layer_scale_init_value=1.0,
    )
    config = InternVLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=numbers[CONTEXT],
        image_seq_length=TILE_TOKENS,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InternVLForConditionalGeneration(config)
        _draw_weights(model)
    model.generation_config = GenerationConfig(
        pad_token_id=numbers[PAD], eos_token_id=numbers[END], bos_token_id=None
    )
    return model


@torch.no_grad()
def _draw_weights(model: InternVLForConditionalGeneration) -> None:
    """Weights that keep activations near unit size, where the library's own would shrink them."""
    into_residual = ("o_proj.weight", "down_proj.weight", "projection_layer.weight", "fc2.weight")
    depth = math.sqrt(2 * _SIZE["num_hidden_layers"])
    for name, parameter in model.named_parameters():
        if name.endswith("position_embeddings"):
            parameter.normal_(0, 0.1)
        elif name.endswith("embed_tokens.weight"):
            parameter.normal_(0, 0.05)
        elif name.endswith("weight") and parameter.ndim > 1:
            spread = parameter[0].numel() ** -0.5
            parameter.normal_(0, spread / depth if name.endswith(into_residual) else spread)


def image_processor() -> Any:
    """What turns pictures into pixels for this model, without torchvision."""
    with tempfile.TemporaryDirectory() as folder:
        write_settings(Path(folder), _SETTINGS)
        return AutoImageProcessor.from_pretrained(folder, backend="pil")


def save_checkpoint(
    model: InternVLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    out: str | os.PathLike[str],
) -> None:
    """Write the checkpoint's folder; what was there is replaced when all is written."""
    with writing(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_settings(folder, _SETTINGS)

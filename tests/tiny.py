"""Tiny real tokenizers and language models, built from configs: no download, no network.

- `tiny_tokenizer`: byte-level, so every text is encoded without loss, with a ChatML-like template
- `tiny_config`, `tiny_model`: one small model of every architecture in `NAMES`
- `save_tiny`: both of them in a folder, as a user's checkpoint would be
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

PAD, BOS, EOS = "<|pad|>", "<|im_start|>", "<|im_end|>"
VOCAB_SIZE = 3 + 256  # pad, begin and end of a turn, then one token for each byte
NAMES = (
    "llama",
    "llama-tied",
    "qwen2",
    "qwen3",
    "gemma3",
    "phi3",
    "gpt-neox",
    "gpt2",
    "mixtral",
)
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer(
    *, chat_template: str | None = CHATML, add_bos: bool = False, pad: bool = True
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of `VOCAB_SIZE` tokens: one token a byte, so a length is easy to tell.

    Args:
        chat_template: Jinja template; None for a tokenizer without one.
        add_bos: put the begin token before every text (as Llama's tokenizers do).
        pad: have a pad token (many real tokenizers have none).
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([PAD, BOS, EOS, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.add_special_tokens([AddedToken(token, special=True) for token in (PAD, BOS, EOS)])
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if add_bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocabulary[BOS])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, eos_token=EOS, pad_token=PAD if pad else None
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_config(name: str, **overrides: Any) -> PreTrainedConfig:
    """The config of a tiny causal language model; `overrides` replace its fields."""
    shared: dict[str, Any] = dict(
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=name in ("llama-tied", "gemma3", "gpt2"),
    )
    wide: dict[str, Any] = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    grouped = {**shared, **wide, "num_key_value_heads": 2}
    gpt2 = {**shared, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64}
    del gpt2["max_position_embeddings"]
    kinds: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
        "llama": (LlamaConfig, grouped),
        "llama-tied": (LlamaConfig, grouped),
        "qwen2": (Qwen2Config, grouped),
        "qwen3": (Qwen3Config, {**grouped, "head_dim": 8}),
        "gemma3": (Gemma3TextConfig, {**grouped, "head_dim": 8, "query_pre_attn_scalar": 8}),
        "phi3": (Phi3Config, grouped),
        "gpt-neox": (GPTNeoXConfig, {**shared, **wide}),
        "gpt2": (GPT2Config, {**gpt2, "n_positions": 256}),
        "mixtral": (MixtralConfig, {**grouped, "num_local_experts": 4}),
    }
    if name not in kinds:
        raise ValueError(f"no tiny model is named {name!r}; there are {', '.join(kinds)}.")
    kind, fields = kinds[name]
    return kind(**{**fields, **overrides})


def draw_weights(model: nn.Module, seed: int, spread: float = 0.1) -> None:
    """Draw weights that keep activations near unit size.

    The library's own initialisation (0.02) would make a narrow model almost linear and its biases
    zero. Here matrices have a spread of 1/sqrt(last dim), and biases and norms are not at rest, but
    `spread` away from it.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(spread * noise)


def tiny_model(
    name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A tiny model in eval mode, with weights that keep activations near unit size."""
    model = AutoModelForCausalLM.from_config(tiny_config(name, **overrides), dtype=torch.float32)
    draw_weights(model, seed)
    return model.to(dtype).eval()


def save_tiny(
    name: str,
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    tokenizer: PreTrainedTokenizerFast | None = None,
    **overrides: Any,
) -> Path:
    """Save a tiny model and its tokenizer as a checkpoint (safetensors) and return its folder.

    Args:
        max_shard_size: for example "20KB" for several shards and an index.
        tokenizer: another one than `tiny_tokenizer()`.
        overrides: fields of the config, as for `tiny_config`.
    """
    tiny_model(name, seed, dtype, **overrides).save_pretrained(
        folder, max_shard_size=max_shard_size
    )
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return Path(folder)

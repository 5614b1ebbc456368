"""The components of a Flux of a few million parameters, before any training.

- `build_encoders`: word-level tokenizers and frozen, random text encoders
- `build_vae`, `build_transformer`: random weights of a size that suits training from scratch
- `save_pipeline`: the folder of a FluxPipeline, in one go
"""

from __future__ import annotations

import os
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from tokenizers import models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from emloc.files import writing
from emloc.quiet import quiet_diffusers, quiet_libraries

SIDE = 64  # pixels
FACTOR = 8  # pixels to a latent
CHANNELS = 16  # of a latent
SHIFT = 3.0  # of the schedule towards noise, where a picture's one shape is decided
_WIDTH = 64  # of the text encoders
_START, _END = "<|startoftext|>", "<|endoftext|>"
_CLIP_TOKENS, _T5_TOKENS = 77, 512


@dataclass(frozen=True)
class Encoders:
    """The two tokenizers and the two text encoders of a Flux, in evaluation mode."""

    tokenizer: CLIPTokenizer
    tokenizer_2: T5Tokenizer
    text_encoder: CLIPTextModel
    text_encoder_2: T5EncoderModel


def build_encoders(words: Sequence[str], *, seed: int) -> Encoders:
    """Encoders that keep random weights, the same for the same words and seed.

    Telling a few words apart takes no learning. The T5 has no blocks: its states are the vectors of
    the words, in no order, so that a padding token has the same state wherever it stands.

    Args:
        words: each becomes one token of either tokenizer; all else is spelt.
        seed: of the weights.
    """
    first, second = _clip_tokenizer(words), _t5_tokenizer(words)
    clip = CLIPTextConfig(
        vocab_size=len(first),
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        projection_dim=_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=_CLIP_TOKENS,
        bos_token_id=first.bos_token_id,
        eos_token_id=first.eos_token_id,
        pad_token_id=first.pad_token_id,
    )
    t5 = T5Config(
        vocab_size=len(second),
        d_model=_WIDTH,
        d_ff=2 * _WIDTH,
        d_kv=_WIDTH // 4,
        num_heads=4,
        num_layers=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoders = Encoders(first, second, CLIPTextModel(clip).eval(), T5EncoderModel(t5).eval())
        _draw_weights(encoders.text_encoder)
    return encoders


@torch.no_grad()
def _draw_weights(clip: CLIPTextModel) -> None:
    """Weights with which the words decide; with the library's own, texts come out nearly alike.

    The marks of start and end are zero, or the end's own vector would outweigh what it has read.
    """
    for name, parameter in clip.named_parameters():
        if name.endswith("token_embedding.weight"):
            parameter.normal_(0, 1)
            parameter[[clip.config.bos_token_id, clip.config.eos_token_id]] = 0
        elif name.endswith("position_embedding.weight"):
            parameter.normal_(0, 0.03)
        elif parameter.ndim == 2:
            parameter.normal_(0, parameter.shape[1] ** -0.5)


def _clip_tokenizer(words: Iterable[str]) -> CLIPTokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in words:
        core = models.BPE(
            {token: n for n, token in enumerate(vocabulary)}, merges, end_of_word_suffix="</w>"
        )
        first, *others = (token.value for token in core.tokenize(word))
        for other in others:  # later than all other merges, so that earlier words stay whole
            merges.append((first, other))
            first += other
            vocabulary.append(first)
        vocabulary = list(dict.fromkeys(vocabulary))
    return CLIPTokenizer(
        vocab={token: n for n, token in enumerate([*vocabulary, _START, _END])},
        merges=merges,  # type: ignore[arg-type]
        model_max_length=_CLIP_TOKENS,
    )


def _t5_tokenizer(words: Iterable[str]) -> T5Tokenizer:
    pieces = dict.fromkeys(["<pad>", "</s>", "<unk>"], 0.0)
    pieces |= {f"▁{word}": -1.0 for word in words}
    pieces |= dict.fromkeys(["▁", *string.printable.strip()], -10.0)
    return T5Tokenizer(vocab=list(pieces.items()), extra_ids=0, model_max_length=_T5_TOKENS)


def build_vae(*, seed: int) -> Any:
    """The VAE with random weights on the CPU; 8 pixels to a latent of 16 channels, as in Flux."""
    widths = (16, 32, 64, 64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            block_out_channels=widths,
            layers_per_block=1,
            latent_channels=CHANNELS,
            norm_num_groups=8,
            sample_size=SIDE,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )


@torch.no_grad()
def build_transformer(*, seed: int) -> Any:
    """The transformer on the CPU: random, but each block starts as if it were not there."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer: Any = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * CHANNELS,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=_WIDTH,
            pooled_projection_dim=_WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(8, 12, 12),
        )
    for name, parameter in transformer.named_parameters():
        if is_modulation(name) or name.startswith("proj_out"):
            parameter.zero_()
    return transformer


def is_modulation(name: str) -> bool:
    """Whether a parameter of the transformer makes the scales and shifts of a norm."""
    return "norm" in name and ".linear." in name


def save_pipeline(
    encoders: Encoders,
    vae: Any,
    transformer: Any,
    out: str | os.PathLike[str],
) -> Any:
    """Write the pipeline's folder; what was there is replaced when all is written.

    Returns:
        The pipeline, its progress bar off.
    """
    parts: dict[str, Any] = {**vars(encoders), "vae": vae, "transformer": transformer}
    pipeline: Any = FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT), **parts)
    pipeline.set_progress_bar_config(disable=True)
    with writing(out) as folder, quiet_diffusers(), quiet_libraries():
        pipeline.save_pretrained(folder)
    return pipeline

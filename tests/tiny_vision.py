"""Tiny vision-language models with their processors, built from configs: no download.

- `FAMILIES`: one of each kind that the library must work with
- `save_tiny_vision`: model, tokenizer, chat template and processor settings as a checkpoint
- `save_picture`: a picture of given size on disk
- `conversation`: a row with pictures, a question and its answer
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    Gemma3Config,
    InternVLConfig,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
    SmolVLMConfig,
)

from tests.tiny import VOCAB_SIZE, draw_weights, tiny_tokenizer

TEXT: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1,
    eos_token_id=2, tie_word_embeddings=False,
)  # fmt: skip
CLIP: dict[str, Any] = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, patch_size=7,
    image_size=28,
)  # fmt: skip
QWEN: dict[str, Any] = dict(
    depth=2, hidden_size=24, num_heads=2, patch_size=7, spatial_merge_size=2,
    temporal_patch_size=2, out_hidden_size=32, intermediate_size=40,
)  # fmt: skip
MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}


def chatml(picture: str) -> str:
    """A template in ChatML that takes contents as lists of parts."""
    return (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for part in m.content %}"
        "{% if part.type == 'image' %}{{ '" + picture + "' }}{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def _internvl(text: str) -> Callable[[int], PreTrainedConfig]:
    def config(first: int) -> PreTrainedConfig:
        return InternVLConfig(
            text_config={"model_type": text, "vocab_size": first + 4, **TEXT},
            vision_config={**CLIP, "image_size": [28, 28], "patch_size": [7, 7],
                           "use_absolute_position_embeddings": True},
            image_token_id=first, image_seq_length=4, downsample_ratio=0.5,
        )  # fmt: skip

    return config


def _qwen2_5_vl(first: int) -> PreTrainedConfig:
    return Qwen2_5_VLConfig(
        text_config={**TEXT, "vocab_size": first + 4, "rope_parameters": MROPE},
        vision_config={**QWEN, "window_size": 28, "fullatt_block_indexes": [1]},
        image_token_id=first, vision_start_token_id=first + 1, vision_end_token_id=first + 2,
        video_token_id=first + 3,
    )  # fmt: skip


def _qwen3_vl(first: int) -> PreTrainedConfig:
    return Qwen3VLConfig(
        text_config={**TEXT, "vocab_size": first + 4, "head_dim": 8, "rope_parameters": MROPE},
        vision_config={**QWEN, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        image_token_id=first, vision_start_token_id=first + 1, vision_end_token_id=first + 2,
        video_token_id=first + 3, tie_word_embeddings=False,
    )  # fmt: skip


def _llava(first: int) -> PreTrainedConfig:
    return LlavaConfig(
        text_config={"model_type": "llama", "vocab_size": first + 4, **TEXT},
        vision_config={"model_type": "clip_vision_model", "projection_dim": 16, **CLIP},
        image_token_index=first, image_seq_length=16,
    )  # fmt: skip


def _smolvlm(first: int) -> PreTrainedConfig:
    return SmolVLMConfig(
        text_config={"model_type": "llama", "vocab_size": first + 16, **TEXT},
        vision_config=CLIP, image_token_id=first, scale_factor=2, tie_word_embeddings=False,
        pad_token_id=0,
    )  # fmt: skip


def _gemma3(first: int) -> PreTrainedConfig:
    return Gemma3Config(
        text_config={**TEXT, "vocab_size": first + 4, "head_dim": 8, "query_pre_attn_scalar": 8,
                     "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"],
                     "tie_word_embeddings": True},
        vision_config={**CLIP, "vision_use_head": False},
        mm_tokens_per_image=4, image_token_id=first, boi_token_index=first + 1,
        eoi_token_index=first + 2, tie_word_embeddings=True,
    )  # fmt: skip


# Each kind's config from the id of its first special token, its special tokens (in order of their
# ids, with the tokenizer's attribute if it has one), what stands for a picture, its image processor
# with settings, its processor's own settings.
SQUARE = {"height": 28, "width": 28}
TILES = {"image_processor_type": "GotOcr2ImageProcessor", "size": SQUARE, "crop_to_patches": True,
         "min_patches": 1, "max_patches": 3}  # fmt: skip
PIXELS = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 7, "merge_size": 2,
          "size": {"shortest_edge": 196, "longest_edge": 28 * 28 * 4}}  # fmt: skip
INTERNVL_TOKENS = {"<IMG_CONTEXT>": "context_image_token", "<img>": "start_image_token",
                   "</img>": "end_image_token", "<video>": "video_token"}  # fmt: skip
QWEN_TOKENS = {"<|image_pad|>": "image_token", "<|vision_start|>": "", "<|vision_end|>": "",
               "<|video_pad|>": "video_token"}  # fmt: skip
QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
SMOL_TOKENS = dict.fromkeys(
    ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    + [f"<row_{row}_col_{col}>" for row in (1, 2, 3) for col in (1, 2, 3)], "",
)  # fmt: skip
GEMMA_TOKENS = {"<image_soft_token>": "image_token", "<start_of_image>": "boi_token",
                "<end_of_image>": "eoi_token"}  # fmt: skip
FAMILIES: dict[str, tuple[Any, ...]] = {
    "internvl-llama": (_internvl("llama"), INTERNVL_TOKENS, "<IMG_CONTEXT>\n", TILES,
                       {"image_seq_length": 4}),
    "internvl-qwen2": (_internvl("qwen2"), INTERNVL_TOKENS, "<IMG_CONTEXT>\n", TILES,
                       {"image_seq_length": 4}),
    "qwen2_5_vl": (_qwen2_5_vl, QWEN_TOKENS, QWEN_PICTURE, PIXELS, {}),
    "qwen3_vl": (_qwen3_vl, QWEN_TOKENS, QWEN_PICTURE, PIXELS, {}),
    "llava": (_llava, {"<image>": "image_token"}, "<image>\n",
              {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 28},
               "crop_size": SQUARE},
              {"patch_size": 7, "vision_feature_select_strategy": "default",
               "num_additional_image_tokens": 1}),
    "smolvlm": (_smolvlm, SMOL_TOKENS, "<image>",
                {"image_processor_type": "SmolVLMImageProcessor", "size": {"longest_edge": 56},
                 "max_image_size": {"longest_edge": 28}, "do_image_splitting": True},
                {"image_seq_len": 4}),
    "gemma3": (_gemma3, GEMMA_TOKENS, "<start_of_image>",
               {"image_processor_type": "Gemma3ImageProcessor", "size": SQUARE},
               {"image_seq_length": 4}),
}  # fmt: skip


def save_tiny_vision(
    family: str, folder: str | os.PathLike[str], *, seed: int = 0, max_shard_size: str = "5GB"
) -> Path:
    """Save a tiny model of a family, with all that its processor needs, and return its folder."""
    folder = Path(folder)
    make_config, special, picture, images, settings = FAMILIES[family]
    tokenizer = tiny_tokenizer(chat_template=chatml(picture))
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    assert tokenizer.convert_tokens_to_ids(next(iter(special))) == VOCAB_SIZE
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text())
    content["extra_special_tokens"] = {name: token for token, name in special.items() if name}
    content["model_specific_special_tokens"] = content["extra_special_tokens"]
    file.write_text(json.dumps(content))
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    AutoImageProcessor.from_pretrained(folder, backend="pil").save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(settings))
    tiny_vision(make_config(VOCAB_SIZE), seed).save_pretrained(
        folder, max_shard_size=max_shard_size
    )
    return folder


def tiny_vision(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model of a config in eval mode, with weights that keep activations near unit size."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    draw_weights(model, seed)
    return model.eval()


def save_picture(path: str | os.PathLike[str], width: int, height: int, *, seed: int = 0) -> str:
    """Write a picture of coarse random colours and return its path."""
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return str(path)


def conversation(*pictures: str, question: str = "What?", answer: str = "it") -> dict[str, Any]:
    """A row whose pictures stand before the question."""
    parts = [{"type": "image", "image": name} for name in pictures]
    return {
        "messages": [
            {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
            {"role": "assistant", "content": answer},
        ]
    }

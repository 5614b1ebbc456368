"""Tiny tokenizers in the files that InternVL's authors publish: Qwen2's, and InternLM2's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from transformers.convert_slow_tokenizer import import_protobuf

ADDED = ["<unk>", "<s>", "</s>", "<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>"]
PIECES = ["▁", "a", "b", "c", "d", "▁a", "ab", "cd", "abcd", "\n", "u", "s", "e", "r"]


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def token(text: str) -> dict[str, Any]:
    return dict(
        content=text, lstrip=False, rstrip=False, normalized=False, single_word=False, special=True
    )


def save_sentencepiece(folder: Path) -> None:
    """InternLM2's kind: chat tokens that take the place of unused pieces, pictures' at the end."""
    proto = import_protobuf().ModelProto()
    proto.trainer_spec.model_type = 2
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.add_dummy_prefix = False
    kinds = [("<unk>", 2), ("<s>", 3), ("</s>", 3)]
    kinds += [(f"<0x{number:02X}>", 6) for number in range(256)]
    kinds += [(piece, 1) for piece in PIECES]
    kinds += [(f"[UNUSED_TOKEN_{number}]", 4) for number in range(3)]
    for number, (text, kind) in enumerate(kinds):
        proto.pieces.add(piece=text, score=-float(number), type=kind)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    last = len(kinds)
    numbers = [0, 1, 2, last - 2, last - 1, last, last + 1, last + 2]
    added = {str(number): token(text) for number, text in zip(numbers, ADDED, strict=True)}
    tokenizer = {
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "tokenizer_class": "InternLM2Tokenizer",
        "added_tokens_decoder": added,
        "model_max_length": 8192,
        **dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"),
    }
    write(folder / "tokenizer_config.json", tokenizer)


def save_qwen2_files(folder: Path) -> None:
    """Qwen2's kind: bytes and merges, and all other tokens added."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate([*alphabet, "ab"])}
    write(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    added = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *ADDED[5:]]
    tokenizer = {
        "tokenizer_class": "Qwen2Tokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "added_tokens_decoder": {
            str(number): token(text) for number, text in enumerate(added, len(vocabulary))
        },
        "additional_special_tokens": added[1:],
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 8192,
    }
    write(folder / "tokenizer_config.json", tokenizer)

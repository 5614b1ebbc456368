"""An InternVL as published becomes one that plain transformers loads, and computes the same."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.internvl import InternVLProcessor
from typer.testing import CliRunner

from emloc.__main__ import app
from emloc.internvl import convert, weights
from tests.internvl_original import LARGE, SMALL, config, save_original
from tests.internvl_tokenizers import write

INTERNLM2, QWEN2, LLAMA = "InternLM2ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM"
PICTURE = "<IMG_CONTEXT>"


def logits(model: Any, tokens: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, pixel_values=pixels).logits


def inputs(picture_token: int, tiles: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """A row with the tokens of `tiles` tiles of 4 features between words."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(3, 200, (9,), generator=generator)
    row = torch.cat([words[:3], torch.full((4 * tiles,), picture_token), words[3:]])
    return row[None], torch.randn(tiles, 3, 56, 56, generator=generator)


CASES = {
    "internlm2, small vision": config(INTERNLM2, SMALL),
    "internlm2, large vision": config(INTERNLM2, LARGE),
    "internlm2, biases, one key head": config(INTERNLM2, SMALL, bias=True, num_key_value_heads=1),
    "internlm2, a key head a query head": config(INTERNLM2, SMALL, num_key_value_heads=4),
    "qwen2, small vision": config(QWEN2, SMALL),
    "qwen2, large vision, tied": config(QWEN2, LARGE, tie_word_embeddings=True),
    "qwen2, an inner layer of the tower": {**config(QWEN2, SMALL), "select_layer": -2},
    "llama, small vision": config(LLAMA, SMALL),
}


@pytest.mark.parametrize("case", CASES)
def test_the_converted_model_computes_the_same(case: str, tmp_path: Path) -> None:
    original = save_original(tmp_path / "original", CASES[case])
    convert(tmp_path / "original", out=tmp_path / "new", max_shard_size="40KB")
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 1
    model, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "new", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens, pixels = inputs(model.config.image_token_id)
    with torch.no_grad():
        expected = original(tokens, pixels, model.config.image_token_id)
        other = original(tokens, pixels.flip(-1), model.config.image_token_id)
    assert (expected - other).abs().max() > 0.01  # the picture matters
    torch.testing.assert_close(logits(model.eval(), tokens, pixels), expected, rtol=1e-4, atol=1e-4)


def test_dtype_and_bits_are_kept(tmp_path: Path) -> None:
    content = {**config(INTERNLM2, LARGE), "torch_dtype": "bfloat16"}
    original = save_original(tmp_path / "original", content, dtype=torch.bfloat16)
    parameters = convert(tmp_path / "original", out=tmp_path / "new")
    assert parameters == sum(weight.numel() for weight in original.parameters())
    with safe_open(tmp_path / "new" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}
        kept = file.get_tensor("model.vision_tower.encoder.layer.1.attention.k_norm.weight")
    expected = original.vision_model.encoder["layers"][1].attn.k_norm.weight
    torch.testing.assert_close(kept, expected.bfloat16(), rtol=0, atol=0)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "new", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.config.architectures == ["InternVLForConditionalGeneration"]


def test_one_shard_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_original(tmp_path / "original", config(INTERNLM2, SMALL), shards=1)
    alive = {"now": 0, "peak": 0, "total": 0}
    read = weights._read

    def spy(*args: Any) -> torch.Tensor:
        tensor = read(*args)
        size = tensor.untyped_storage().nbytes()
        assert size == tensor.nbytes  # no view that keeps a fused tensor
        alive["now"] += size
        alive["total"] += size
        alive["peak"] = max(alive["peak"], alive["now"])
        weakref.finalize(tensor, lambda: alive.update(now=alive["now"] - size))
        return tensor

    monkeypatch.setattr(weights, "_read", spy)
    convert(tmp_path / "original", out=tmp_path / "new", max_shard_size=80_000)
    assert alive["peak"] <= 80_000 < alive["total"] / 2
    assert alive["now"] == 0


def test_the_side_files_work_without_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Even without a video processor, transformers looks for its class, which needs torchvision.
    monkeypatch.setattr(InternVLProcessor, "check_argument_for_proper_class", lambda *_: None)
    save_original(tmp_path / "original", config(INTERNLM2, SMALL))
    convert(tmp_path / "original", out=tmp_path / "new")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    images = AutoImageProcessor.from_pretrained(tmp_path / "new", backend="pil")
    processor = InternVLProcessor(images, tokenizer, image_seq_length=4)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "ab"}]}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert images.crop_to_patches and images.max_patches == 12
    assert text == ("<|im_start|>user\n<IMG_CONTEXT>\nab<|im_end|>\n<|im_start|>assistant\n")
    picture = Image.fromarray(np.zeros((56, 112, 3), np.uint8))  # two tiles and a thumbnail
    batch = processor(images=[picture], text=text, return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "new")
    assert batch["pixel_values"].shape == (3, 3, 56, 56)
    assert (batch["input_ids"] == model.config.image_token_id).sum() == 3 * 4
    assert logits(model, batch["input_ids"], batch["pixel_values"]).isfinite().all()
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("architecture", [INTERNLM2, QWEN2])
def test_texts_survive_the_tokenizer(architecture: str, tmp_path: Path) -> None:
    save_original(tmp_path / "original", config(architecture, SMALL))
    convert(tmp_path / "original", out=tmp_path / "new")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    text = "abcd  a\n é"
    numbers = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(numbers) == text
    declared = json.loads((tmp_path / "original" / "tokenizer_config.json").read_text())
    kept = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())
    assert "auto_map" in declared and "auto_map" not in kept
    for number, token in declared["added_tokens_decoder"].items():
        assert tokenizer.convert_tokens_to_ids(token["content"]) == int(number)
        assert tokenizer(token["content"], add_special_tokens=False)["input_ids"] == [int(number)]


def test_pieces_are_merged_by_score_and_bytes_stand_in(tmp_path: Path) -> None:
    save_original(tmp_path / "original", config(INTERNLM2, SMALL))
    convert(tmp_path / "original", out=tmp_path / "new")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert tokenizer.tokenize("abcd a") == ["abcd", "▁a"]
    assert tokenizer.tokenize("é") == ["<0xC3>", "<0xA9>"]
    assert tokenizer.tokenize("[UNUSED_TOKEN_0]<|im_end|>") == ["[UNUSED_TOKEN_0]", "<|im_end|>"]
    assert tokenizer("a")["input_ids"] == tokenizer.convert_tokens_to_ids(["<s>", "a"])


def broken(folder: Path, **changes: Any) -> Path:
    """An InternLM2 checkpoint with other fields in config.json; those of llm_ go inside."""
    save_original(folder, config(INTERNLM2, SMALL))
    content = json.loads((folder / "config.json").read_text())
    inner = {key[4:]: changes.pop(key) for key in list(changes) if key.startswith("llm_")}
    content["llm_config"] |= inner
    write(folder / "config.json", content | changes)
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, "no original InternVL.*Qwen2ForCausalLM"),
        ({"llm_architectures": ["Phi3ForCausalLM"]}, "Phi3ForCausalLM inside"),
        ({"ps_version": "v1"}, "ps_version 'v1'"),
        ({"llm_rope_pos_id_version": "v2pe"}, "'v2pe'"),
        ({"llm_num_hidden_layers": 3}, r"layers\.2\.input_layernorm.* is absent"),
        ({"llm_intermediate_size": 40}, r"down_proj.*\(32, 40\) and is \(32, 48\)"),
        ({"llm_num_key_value_heads": 3, "llm_num_attention_heads": 8}, "64 rows"),
        ({"llm_num_attention_heads": 5}, "config.json .* cannot be used .*multiple"),
    ],
)
def test_what_does_not_fit_is_refused(changes: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        convert(broken(tmp_path / "original", **changes), out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_missing_and_pickled_weights_and_tokenizers_are_refused(tmp_path: Path) -> None:
    folder, out = broken(tmp_path / "original"), tmp_path / "new"
    (folder / "tokenizer.model").rename(tmp_path / "kept")
    with pytest.raises(ValueError, match="has no tokenizer"):
        convert(folder, out=out)
    (folder / "tokenizer.model").write_bytes(b"\xff\xff")
    with pytest.raises(ValueError, match="no SentencePiece model"):
        convert(folder, out=out)
    shutil.copy(tmp_path / "kept", folder / "tokenizer.model")
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    moved = {str(int(number) + 5 * (text["content"] == PICTURE)): text
             for number, text in tokenizer["added_tokens_decoder"].items()}  # fmt: skip
    write(folder / "tokenizer_config.json", {**tokenizer, "added_tokens_decoder": moved})
    with pytest.raises(ValueError, match="<IMG_CONTEXT>.* should be number"):
        convert(folder, out=out)
    del moved[max(moved, key=int)]
    write(folder / "tokenizer_config.json", {**tokenizer, "added_tokens_decoder": moved})
    with pytest.raises(ValueError, match="no token <IMG_CONTEXT>"):
        convert(folder, out=out)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors is missing"):
        convert(folder, out=out)
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="only in a pickle"):
        convert(folder, out=out)
    assert not out.exists()


def test_the_command_converts(tmp_path: Path) -> None:
    save_original(tmp_path / "original", config(QWEN2, SMALL))
    line = ["convert", str(tmp_path / "original"), "--out", str(tmp_path / "new")]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    assert "new: " in result.output and "parameters" in result.output
    assert (tmp_path / "new" / "model.safetensors").is_file()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    save_original(tmp_path / "original", config(QWEN2, SMALL))
    with pytest.raises(ValueError, match="exists already"):
        convert(tmp_path / "original", out=tmp_path / "original")

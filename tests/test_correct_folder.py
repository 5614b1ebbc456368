"""A whole adapter folder is corrected, layer by layer, or refused with nothing written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

from emloc.correct import correct_adapter
from emloc.files import read_json, sha256, write_json
from emloc.models import load_model, open_model
from emloc.weights import OpenedModel
from tests.built import BLOCKED, Built, build, python
from tests.opened import unequal_batches

WEIGHTS = "adapter_model.safetensors"
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"q_proj": 2, "down_proj": 6},
    "alpha_pattern": {"down_proj": 5, "layers.1.self_attn.v_proj": 1},
}
HALF: dict[str, float | str] = {r".*\.0\..*": "ratio"}  # the second block stays whole


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """With biases, and with its second block left whole."""
    return build("qwen2", tmp_path_factory.mktemp("qwen2"), targets=HALF)


def train_raw(
    built: Built, folder: Path, dtype: torch.dtype = torch.float64, **options: Any
) -> Path:
    """A raw adapter as if trained: random A and B on the emulator, saved by peft."""
    torch.manual_seed(1)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", **options}
    emulator = load_model(built.emulator, dtype=dtype, device="cpu")
    emulator.name_or_path = "org/original"
    model = get_peft_model(emulator, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key or "modules_to_save" in key:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    model.save_pretrained(folder)
    return folder


def opened(built: Built) -> tuple[OpenedModel, OpenedModel]:
    return (
        open_model(built.original, dtype=torch.float32),
        open_model(built.emulator, dtype=torch.float32),
    )


def with_adapter(base: Path, adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(load_model(base, dtype=torch.float64, device="cpu"), adapter)


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def outputs_on_row_space(
    built: Built, raw: Path, corrected: Path
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Per layer: emulator + raw, original + corrected, original + raw, on A's row space."""
    models = [
        with_adapter(built.emulator, raw),
        with_adapter(built.original, corrected),
        with_adapter(built.original, raw),
    ]
    layers = [lora_layers(model) for model in models]
    outputs = {}
    for name, layer in layers[0].items():
        a = layer.lora_A["default"].weight
        x = torch.randn(20, a.shape[0], dtype=torch.float64) @ a
        with torch.no_grad():
            emulated, done, undone = (some[name](x) for some in layers)  # type: ignore[operator]
        outputs[name] = (emulated, done, undone)
    return outputs


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, PATTERNS], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_every_layer_of_a_model_is_corrected(
    name: str, options: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    built: Built = request.getfixturevalue(name)
    raw = train_raw(built, tmp_path / "raw", **options)
    original, emulator = opened(built)
    report = correct_adapter(raw, original, emulator, limit=None, out=tmp_path / "corrected")
    outputs = outputs_on_row_space(built, raw, tmp_path / "corrected")
    corrected = {f"base_model.model.{layer.name}" for layer in report}
    assert len(corrected) == (14 if name == "llama" else 7)
    for key, (emulated, done, undone) in outputs.items():
        scale = float(emulated.abs().max())
        assert float((done - emulated).abs().max()) < 1e-12 * scale, key  # measured: 3e-15
        if key in corrected:
            assert float((undone - emulated).abs().max()) > 1e-2 * scale, key
    assert all(layer.size > 0 and layer.clamped == 0 for layer in report)


def test_float32_adapters_are_corrected_to_rounding(llama: Built, tmp_path: Path) -> None:
    raw = train_raw(llama, tmp_path / "raw", torch.float32)
    correct_adapter(raw, *opened(llama), limit=None, out=tmp_path / "corrected")
    for emulated, done, _ in outputs_on_row_space(llama, raw, tmp_path / "corrected").values():
        # measured: 1e-7
        assert float((done - emulated).abs().max()) < 3e-6 * float(emulated.abs().max())


def test_layers_that_stayed_whole_keep_their_adapter(qwen2: Built, tmp_path: Path) -> None:
    raw = train_raw(qwen2, tmp_path / "raw")
    correct_adapter(raw, *opened(qwen2), out=tmp_path / "corrected")
    before, after = (load_file(tmp_path / one / WEIGHTS) for one in ("raw", "corrected"))
    assert set(before) == set(after)
    for key in before:
        assert torch.equal(before[key], after[key]) == (".layers.1." in key), key


def test_modules_to_save_pass_through(llama: Built, tmp_path: Path) -> None:
    raw = train_raw(llama, tmp_path / "raw", modules_to_save=["lm_head"])
    correct_adapter(raw, *opened(llama), out=tmp_path / "corrected")
    before, after = (load_file(tmp_path / one / WEIGHTS) for one in ("raw", "corrected"))
    key = "base_model.model.lm_head.weight"
    assert torch.equal(before[key], after[key])
    model = with_adapter(llama.original, tmp_path / "corrected")
    used = model.base_model.model.lm_head.modules_to_save["default"].weight
    torch.testing.assert_close(used.detach(), before[key].to(used.dtype), rtol=0, atol=0)


def test_the_raw_folder_and_the_opened_models_stay_as_they_were(
    llama: Built, tmp_path: Path
) -> None:
    raw = train_raw(llama, tmp_path / "raw")
    before = {path.name: sha256(path) for path in raw.iterdir()}
    original, emulator = opened(llama)
    names = [name for name, _ in original.model.named_modules()]
    correct_adapter(raw, original, emulator, out=tmp_path / "one")
    assert {path.name: sha256(path) for path in raw.iterdir()} == before
    assert [name for name, _ in original.model.named_modules()] == names
    other = train_raw(llama, tmp_path / "other", r=2)
    correct_adapter(other, original, emulator, out=tmp_path / "two")  # the same opened models
    hashes = {sha256(tmp_path / "one" / WEIGHTS)}
    for _ in range(8):  # some things are random one time in two
        correct_adapter(raw, original, emulator, out=tmp_path / "again")
        hashes.add(sha256(tmp_path / "again" / WEIGHTS))
    assert len(hashes) == 1
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(before)
    config = read_json(tmp_path / "one" / "adapter_config.json")
    assert config["base_model_name_or_path"] == "org/original"


@pytest.mark.parametrize("limit", [0, -1, 0.0, float("nan")])
def test_limit_must_be_positive(limit: float, llama: Built, tmp_path: Path) -> None:
    raw = train_raw(llama, tmp_path / "raw")
    with pytest.raises(ValueError, match="limit is .* but must be a positive number"):
        correct_adapter(raw, *opened(llama), limit=limit, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_correcting_twice_is_refused(llama: Built, tmp_path: Path) -> None:
    raw = train_raw(llama, tmp_path / "raw")
    correct_adapter(raw, *opened(llama), out=tmp_path / "corrected")
    with pytest.raises(ValueError, match="corrected already.*name the raw adapter"):
        correct_adapter(tmp_path / "corrected", *opened(llama), out=tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def spoil(raw: Path, how: str) -> None:
    weights, config = raw / WEIGHTS, raw / "adapter_config.json"
    if how == "folder":
        shutil.rmtree(raw)
    elif how == "weights":
        weights.unlink()
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "config":
        config.unlink()
    elif how == "config text":
        config.write_text("{")
    elif how in ("tensor", "nan", "shape"):
        tensors = load_file(weights)
        key = min(tensors)
        if how == "tensor":
            del tensors[key]
        elif how == "nan":
            tensors[key][0, 0] = float("nan")
        else:
            tensors[key] = tensors[key][:, 1:].contiguous()
        save_file(tensors, weights, metadata={"format": "pt"})
    elif how == "adalora":
        AdaLoraConfig(total_step=10, target_modules="all-linear").save_pretrained(raw)
    else:
        write_json(config, {**read_json(config), **{how: True}})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("folder", "is no adapter folder"),
        ("weights", "is no adapter folder: adapter_model.safetensors is missing"),
        ("truncated", "adapter_model.safetensors cannot be read .*train the adapter again"),
        ("config", "adapter_config.json"),
        ("config text", "adapter_config.json"),
        ("tensor", "holds no weights for model.layers.0"),
        ("nan", "not finite"),
        ("shape", "does not fit"),
        ("adalora", "ADALORA adapter with settings other than plain LoRA"),
        ("use_dora", "settings other than plain LoRA"),
        ("lora_bias", "settings other than plain LoRA"),
    ],
)
def test_adapter_that_cannot_be_corrected_is_refused(
    how: str, message: str, llama: Built, tmp_path: Path
) -> None:
    raw = train_raw(llama, tmp_path / "raw")
    spoil(raw, how)
    with pytest.raises(ValueError, match=message) as caught:
        correct_adapter(raw, *opened(llama), out=tmp_path / "out")
    assert str(raw) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_targets_that_the_original_lacks_are_refused(llama: Built, tmp_path: Path) -> None:
    raw = train_raw(llama, tmp_path / "raw")
    config = read_json(raw / "adapter_config.json")
    write_json(raw / "adapter_config.json", {**config, "target_modules": ["nothing"]})
    with pytest.raises(ValueError, match="does not fit the original"):
        correct_adapter(raw, *opened(llama), out=tmp_path / "out")


def test_original_in_place_of_the_emulator_is_refused(llama: Built, tmp_path: Path) -> None:
    raw = train_raw(llama, tmp_path / "raw")
    original, _ = opened(llama)
    with pytest.raises(ValueError, match="has no low-rank layers"):
        correct_adapter(raw, original, original, out=tmp_path / "out")


PLUG_IN = (
    BLOCKED
    + """
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
original, adapter, out = sys.argv[1:]
batch = load_file(f"{out}/batch.safetensors")
model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
model = PeftModel.from_pretrained(model, adapter).eval()
with torch.no_grad():
    logits = model(**batch).logits
    words = model.generate(**batch, max_new_tokens=8, do_sample=False)
model.merge_and_unload().save_pretrained(f"{out}/merged")
merged = AutoModelForCausalLM.from_pretrained(f"{out}/merged", dtype=torch.float32).eval()
with torch.no_grad():
    again = merged(**batch).logits
    words_again = merged.generate(**batch, max_new_tokens=8, do_sample=False)
assert not any(name.partition(".")[0] == "emloc" for name in sys.modules)
results = dict(logits=logits, again=again, words=words, words_again=words_again)
save_file(results, f"{out}/o.safetensors")
"""
)


def test_plug_in_needs_none_of_our_code(qwen2: Built, tmp_path: Path) -> None:
    raw = train_raw(qwen2, tmp_path / "raw", torch.float32, **PATTERNS)
    correct_adapter(raw, *opened(qwen2), out=tmp_path / "corrected")
    batch = {k: v for k, v in unequal_batches(side="left")[1].items()}
    save_file(batch, tmp_path / "batch.safetensors")
    done = python(PLUG_IN, str(qwen2.original), str(tmp_path / "corrected"), str(tmp_path))
    assert done.returncode == 0, done.stderr
    there = load_file(tmp_path / "o.safetensors")
    scale = float(there["logits"].abs().max())
    # merging adds the product to the weights: float32 rounding
    assert float((there["again"] - there["logits"]).abs().max()) < 2e-5 * scale
    assert torch.equal(there["words"], there["words_again"])
    here = with_adapter(qwen2.original, tmp_path / "corrected")
    with torch.no_grad():
        torch.testing.assert_close(
            there["logits"].double(), here(**batch).logits, rtol=0, atol=2e-5 * scale
        )
    config = read_json(tmp_path / "merged" / "config.json")
    assert "quantization_config" not in config
    with torch.no_grad(), here.disable_adapter():
        alone = here(**batch).logits
    assert float((there["logits"] - alone).abs().max()) > 0.1 * scale  # the adapter does something

"""A pipeline's adapter is corrected for the original, loads by diffusers alone, and merges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from emloc.correct import correct_adapter
from emloc.diffusion.pipelines import denoiser_of, load_pipeline
from emloc.files import sha256
from emloc.merge import merge_adapter
from emloc.models import load_model, open_model
from emloc.weights import OpenedModel
from tests.built import BLOCKED, python
from tests.tiny_diffusion import (
    PIPELINES,
    build_pipeline,
    denoiser_inputs,
    save_raw_adapter,
)

WEIGHTS = "pytorch_lora_weights.safetensors"
SCALED: dict[str, dict[str, Any]] = {
    "alpha": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 5, "to_k": 1}},
}
Built = dict[str, tuple[Path, Path]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return {name: build_pipeline(name, tmp_path_factory.mktemp(name)) for name in PIPELINES}


def opened(folders: tuple[Path, Path]) -> tuple[OpenedModel, OpenedModel]:
    return open_model(folders[0], dtype=torch.float32), open_model(folders[1], dtype=torch.float32)


def adapted(original: Path, adapter: Path, denoiser: Any = None) -> Any:
    """The denoiser of a pipeline that diffusers has put the adapter on."""
    pipeline = load_pipeline(
        original, dtype=torch.float32, device="cpu", denoiser=denoiser, adapter=adapter
    )
    return denoiser_of(pipeline)


def whole_weights(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Adapted layer → its weight with the adapter added, and A."""
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            base: Any = module.base_layer
            weight = base.weight @ base.weight_in if hasattr(base, "weight_in") else base.weight
            (adapter,) = module.lora_A
            lora_a, lora_b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            delta = module.scaling[adapter] * (lora_b @ lora_a)
            weights[name] = ((weight + delta).detach().double(), lora_a.detach().double())
    return weights


@pytest.mark.parametrize(
    ("name", "options"),
    [("flux", "alpha"), ("flux", "patterns"), ("sd3", "rslora"), ("sdxl", "patterns")],
)
def test_unclamped_the_original_equals_the_emulator_where_the_adapter_looks(
    built: Built, name: str, options: str, tmp_path: Path
) -> None:
    original, emulator = built[name]
    raw = save_raw_adapter(original, emulator, tmp_path / "raw", **SCALED[options])
    correct_adapter(raw, *opened(built[name]), limit=None, out=tmp_path / "corrected")
    small = load_model(emulator, dtype=torch.float32, device="cpu")
    on_emulator = whole_weights(adapted(original, raw, small))
    on_original = whole_weights(adapted(original, tmp_path / "corrected"))
    uncorrected = whole_weights(adapted(original, raw))
    assert on_original.keys() == on_emulator.keys() and len(on_original) > 5
    for layer, (weight, lora_a) in on_emulator.items():
        basis = torch.linalg.qr(lora_a.T)[0]  # (i, r)
        # float32 adapters: 1e-6
        torch.testing.assert_close(on_original[layer][0] @ basis, weight @ basis, rtol=0, atol=2e-5)
        assert float(((uncorrected[layer][0] - weight) @ basis).abs().max()) > 0.01, layer


def test_the_mark_and_the_scaling_stay_in_the_header(built: Built, tmp_path: Path) -> None:
    raw = save_raw_adapter(*built["flux"], tmp_path / "raw")
    correct_adapter(raw, *opened(built["flux"]), out=tmp_path / "corrected")
    headers = []
    for folder in (raw, tmp_path / "corrected"):
        with safe_open(folder / WEIGHTS, framework="pt") as handle:
            headers.append(handle.metadata())
    assert headers[1] == {**headers[0], "emloc": "corrected"}
    settings = json.loads(headers[1]["lora_adapter_metadata"])
    assert (settings["transformer.r"], settings["transformer.lora_alpha"]) == (4, 12)
    with pytest.raises(ValueError, match="was corrected already"):
        correct_adapter(tmp_path / "corrected", *opened(built["flux"]), out=tmp_path / "twice")
    hashes = {sha256(tmp_path / "corrected" / WEIGHTS)}
    for _ in range(3):
        correct_adapter(raw, *opened(built["flux"]), out=tmp_path / "corrected")
        hashes.add(sha256(tmp_path / "corrected" / WEIGHTS))
    assert len(hashes) == 1


def test_an_adapter_that_cannot_be_corrected_is_refused(built: Built, tmp_path: Path) -> None:
    both = opened(built["flux"])
    raw = save_raw_adapter(*built["flux"], tmp_path / "raw")
    tensors = load_file(raw / WEIGHTS)
    (tmp_path / "bare").mkdir()
    save_file(tensors, tmp_path / "bare" / WEIGHTS)
    with pytest.raises(ValueError, match="does not say in its header .* how the adapter is scaled"):
        correct_adapter(tmp_path / "bare", *both, out=tmp_path / "out")
    renamed = {key.replace("transformer.", "text_encoder.", 1): v for key, v in tensors.items()}
    save_file(renamed, tmp_path / "bare" / WEIGHTS)
    with pytest.raises(ValueError, match="holds nothing for a denoiser"):
        correct_adapter(tmp_path / "bare", *both, out=tmp_path / "out")
    dora = save_raw_adapter(*built["sd3"], tmp_path / "sd3")
    with pytest.raises(ValueError, match="does not fit the original|holds no weights for"):
        correct_adapter(dora, *both, out=tmp_path / "out")
    with pytest.raises(ValueError, match="has no low-rank layers"):
        correct_adapter(raw, both[0], both[0], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_a_merged_pipeline_equals_the_adapted_one(built: Built, name: str, tmp_path: Path) -> None:
    original, emulator = built[name]
    raw = save_raw_adapter(original, emulator, tmp_path / "raw")
    correct_adapter(raw, *opened(built[name]), out=tmp_path / "corrected")
    merge_adapter(original, tmp_path / "corrected", out=tmp_path / "merged", dtype=torch.float32)
    pipeline = load_pipeline(tmp_path / "merged", dtype=torch.float32, device="cpu")
    model = adapted(original, tmp_path / "corrected")
    alone = load_model(original, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        outputs = [one(**denoiser_inputs(name))[0] for one in (denoiser_of(pipeline), model, alone)]
    # float32 rounding of the merged weights: 2e-6
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=3e-5)
    assert float((outputs[1] - outputs[2]).abs().max()) > 0.05
    for file in (tmp_path / "merged").rglob("*.json"):
        assert str(tmp_path) not in file.read_text() and str(original) not in file.read_text()
    with pytest.raises(ValueError, match="could not be loaded"):
        merge_adapter(original, tmp_path / "nothing", out=tmp_path / "merged2")


PLUG_IN = (
    BLOCKED
    + """
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file
original, adapter, out = sys.argv[1:]
inputs = load_file(f"{out}/inputs.safetensors")
pipeline = FluxPipeline.from_pretrained(original)
def run():
    with torch.no_grad():
        return pipeline.transformer(**inputs, return_dict=False)[0]
results = {"alone": run()}
pipeline.load_lora_weights(adapter)
results["adapted"] = run()
pipeline.fuse_lora(components=["transformer"])
pipeline.unload_lora_weights()
results["fused"] = run()
assert not any(name.partition(".")[0] == "emloc" for name in sys.modules)
save_file(results, f"{out}/outputs.safetensors")
"""
)

BARE = (
    BLOCKED
    + """
from diffusers import FluxTransformer2DModel
FluxTransformer2DModel.from_pretrained(sys.argv[1])
"""
)


@pytest.mark.slow
def test_a_corrected_adapter_needs_none_of_our_code_and_an_emulator_does(
    built: Built, tmp_path: Path
) -> None:
    original, emulator = built["flux"]
    raw = save_raw_adapter(original, emulator, tmp_path / "raw")
    correct_adapter(raw, *opened(built["flux"]), limit=None, out=tmp_path / "corrected")
    inputs = {k: v for k, v in denoiser_inputs("flux").items() if isinstance(v, Tensor)}
    save_file(inputs, tmp_path / "inputs.safetensors")
    done = python(PLUG_IN, str(original), str(tmp_path / "corrected"), str(tmp_path))
    assert done.returncode == 0, done.stderr
    there = load_file(tmp_path / "outputs.safetensors")
    here = adapted(original, tmp_path / "corrected")
    with torch.no_grad():
        expected = here(**denoiser_inputs("flux"))[0]
    torch.testing.assert_close(there["adapted"], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(there["fused"], there["adapted"], rtol=0, atol=3e-5)
    assert float((there["adapted"] - there["alone"]).abs().max()) > 0.05
    done = python(BARE, str(emulator))
    assert done.returncode != 0 and "Unknown quantization type, got emloc" in done.stderr

"""Pipelines and their emulators: recognised, loaded by diffusers itself, described, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig
from torch import Tensor

from emloc.checkpoint import deciding_files
from emloc.diffusion.pipelines import denoiser_folder, load_pipeline, pipeline_class
from emloc.files import read_json, write_json
from emloc.lowrank import LowRankLinear
from emloc.models import load_model, open_model
from emloc.source import check, describe, resolve_model
from emloc.streaming import Stream
from tests.tiny_diffusion import (
    ATTENTION,
    PIPELINES,
    build_pipeline,
    denoiser_inputs,
    save_raw_adapter,
    save_tiny_pipeline,
)

Built = dict[str, tuple[Path, Path]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Pipeline → folders of the original and of a sharded emulator."""
    return {
        name: build_pipeline(name, tmp_path_factory.mktemp(name), max_shard_size="100KB")
        for name in PIPELINES
    }


def run(model: Any, name: str) -> Tensor:
    with torch.no_grad():
        return model(**denoiser_inputs(name))[0]


def low_rank(model: torch.nn.Module) -> dict[str, LowRankLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LowRankLinear)}


@pytest.mark.parametrize("name", PIPELINES)
def test_an_emulator_computes_with_the_products_of_its_factors(built: Built, name: str) -> None:
    original, emulator = built[name]
    kind = getattr(diffusers, read_json(emulator / "config.json")["_class_name"])
    loaded = kind.from_pretrained(emulator, dtype=torch.float32)
    assert len(low_rank(loaded)) > 20
    plain = load_model(original, dtype=torch.float32, device="cpu")
    untouched = run(plain, name)
    with torch.no_grad():
        for layer, module in low_rank(loaded).items():
            plain.get_submodule(layer).weight.copy_(module.weight @ module.weight_in)
    torch.testing.assert_close(run(loaded, name), run(plain, name), rtol=0, atol=2e-5)
    assert float((run(plain, name) - untouched).abs().max()) > 0.05


@pytest.mark.parametrize("name", PIPELINES)
def test_every_way_to_an_emulator_gives_the_same_output(
    built: Built, name: str, tmp_path: Path
) -> None:
    _, emulator = built[name]
    assert len(list(emulator.glob("diffusion_pytorch_model-*.safetensors"))) > 1
    ours = load_model(emulator, dtype=torch.float32, device="cpu")
    expected = run(ours, name)
    placed = type(ours).from_pretrained(emulator, device_map={"": "cpu"})
    close = {"rtol": 0, "atol": 1e-5}  # a tensor's place in memory may change the last bit
    torch.testing.assert_close(run(placed, name), expected, **close)
    ours.save_pretrained(tmp_path / "again")
    again = type(ours).from_pretrained(tmp_path / "again")
    assert len(low_rank(again)) == len(low_rank(ours)) > 20
    torch.testing.assert_close(run(again, name), expected, **close)
    outputs: list[Tensor] = []
    opened = open_model(emulator, dtype=torch.float32)
    stream = Stream(opened, "cpu")
    stream.run([denoiser_inputs(name)], on_output=lambda _, out: outputs.append(out[0]))
    torch.testing.assert_close(outputs[0], expected, **close)
    assert ours.to(torch.bfloat16).dtype == torch.bfloat16


def test_a_higher_ratio_is_nearer_to_the_original(tmp_path: Path) -> None:
    errors = []
    for ratio in (0.3, 0.95):
        original, emulator = build_pipeline("sd3", tmp_path / str(ratio), ratio=ratio)
        whole = run(load_model(original, dtype=torch.float32, device="cpu"), "sd3")
        small = run(load_model(emulator, dtype=torch.float32, device="cpu"), "sd3")
        errors.append(float((whole - small).norm() / whole.norm()))
    assert errors[1] < 0.15 and errors[0] > 2 * errors[1]  # 0.05 at 0.95


def test_parts_that_diffusers_keeps_in_float32_stay_so(
    built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, emulator = built["flux"]
    monkeypatch.setattr(FluxTransformer2DModel, "_keep_in_fp32_modules", ["norm_out"])
    loaded = FluxTransformer2DModel.from_pretrained(emulator, dtype=torch.bfloat16)
    opened = open_model(emulator, dtype=torch.bfloat16).model
    for model in (loaded, opened):
        kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
        assert kinds["norm_out.linear.weight"] == torch.float32
        assert kinds["x_embedder.weight"] == torch.bfloat16


def test_an_emulator_stands_in_a_pipeline_of_diffusers(built: Built) -> None:
    original, emulator = built["flux"]
    small = FluxTransformer2DModel.from_pretrained(emulator)
    pipeline = FluxPipeline.from_pretrained(original, transformer=small)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    settings: dict[str, Any] = dict(height=16, width=16, num_inference_steps=2, output_type="pt")
    picture = pipeline("a dog", generator=generator, **settings).images
    with torch.no_grad():
        prompt, pooled, _ = pipeline.encode_prompt("a dog", "a dog")
    ours = load_pipeline(
        original, dtype=torch.float32, device="cpu", denoiser=small, encoders=False, offload=True
    )
    assert ours.text_encoder is None and ours.text_encoder_2 is None
    generator.manual_seed(0)
    embeds = {"prompt_embeds": prompt, "pooled_prompt_embeds": pooled}
    again = ours(**embeds, generator=generator, **settings).images
    torch.testing.assert_close(again, picture, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", PIPELINES)
def test_an_emulator_trains_lora_with_gradient_checkpointing(built: Built, name: str) -> None:
    small = load_model(built[name][1], dtype=torch.float32, device="cpu")
    small.requires_grad_(False)
    small.add_adapter(LoraConfig(r=2, target_modules=ATTENTION, init_lora_weights=False))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            small.enable_gradient_checkpointing()
        small.train().zero_grad()
        small(**denoiser_inputs(name))[0].square().mean().backward()
        gradients.append(
            {n: p.grad.clone() for n, p in small.named_parameters() if p.requires_grad}
        )
    assert all("lora_" in key for key in gradients[0]) and len(gradients[0]) > 10
    for key, gradient in gradients[0].items():
        assert float(gradient.norm()) > 0, key
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", PIPELINES)
def test_an_adapter_loads_on_an_emulator_and_leaves_its_layers_low_rank(
    built: Built, name: str, tmp_path: Path
) -> None:
    original, emulator = built[name]
    raw = save_raw_adapter(original, emulator, tmp_path / "raw")
    small = load_model(emulator, dtype=torch.float32, device="cpu")
    layers, alone = list(low_rank(small)), run(small, name)
    load_pipeline(original, dtype=torch.float32, device="cpu", denoiser=small, adapter=raw)
    assert len(low_rank(small)) == len(layers)
    adapted = run(small, name)
    assert float((adapted - alone).abs().max()) > 0.01
    expected = load_model(emulator, dtype=torch.float32, device="cpu")
    part = "unet" if name == "sdxl" else "transformer"
    expected.load_lora_adapter(raw, prefix=part, use_safetensors=True)
    torch.testing.assert_close(adapted, run(expected, name), rtol=0, atol=1e-5)


def test_a_pipeline_is_described_by_content_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMLOC_CACHE", str(tmp_path / "cache"))
    folder = save_tiny_pipeline("flux", tmp_path / "p", max_shard_size="200KB")
    assert resolve_model(str(folder)) == folder
    pointer = describe(str(folder), folder)
    assert pointer["name"].startswith("FluxPipeline@") and pointer["model_type"] == "FluxPipeline"
    every = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(pointer["files"]) == every
    shutil.copytree(folder, tmp_path / "copy")
    assert describe("copy", tmp_path / "copy")["fingerprint"] == pointer["fingerprint"]
    check(pointer, tmp_path / "copy")
    (tmp_path / "copy" / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ValueError, match="scheduler_config.json is missing since"):
        check(pointer, tmp_path / "copy")


def damage(folder: Path, what: str) -> None:
    transformer, index = folder / "transformer", folder / "model_index.json"
    weights = transformer / "diffusion_pytorch_model.safetensors"
    if what == "component":
        shutil.rmtree(folder / "scheduler")
    elif what == "weights":
        (folder / "text_encoder" / "model.safetensors").unlink()
    elif what == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif what == "variant":
        weights.rename(transformer / "diffusion_pytorch_model.fp16.safetensors")
    elif what == "pickle":
        weights.rename(transformer / "diffusion_pytorch_model.bin")
    elif what == "class":
        write_json(index, {**read_json(index), "_class_name": "SanaPipeline"})
    elif what == "quantised":
        config = read_json(transformer / "config.json")
        quantization = {"quant_method": "bitsandbytes"}
        write_json(transformer / "config.json", {**config, "quantization_config": quantization})


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("component", "scheduler has no config, though model_index.json lists it"),
        ("weights", "has no safetensors weights in .*text_encoder"),
        ("cut", "is cut short or corrupt"),
        ("variant", "only the variant diffusion_pytorch_model.fp16.safetensors"),
        ("pickle", "pickle file .*DiffusionPipeline.from_pretrained"),
        ("class", "class 'SanaPipeline', and those supported are FluxPipeline, FluxKontext"),
        ("quantised", "is quantised .*give the unquantised pipeline"),
    ],
)
def test_a_pipeline_that_cannot_be_used_is_refused(what: str, message: str, tmp_path: Path) -> None:
    folder = save_tiny_pipeline("flux", tmp_path / "p")
    resolve_model(str(folder))
    damage(folder, what)
    with pytest.raises(ValueError, match=message):
        resolve_model(str(folder))


def test_other_folders_are_refused(built: Built, tmp_path: Path) -> None:
    original, emulator = built["flux"]
    assert pipeline_class(original) is FluxPipeline
    assert denoiser_folder(original) == original / "transformer"
    assert denoiser_folder(emulator) == emulator
    with pytest.raises(ValueError, match="one component of a diffusion pipeline"):
        resolve_model(str(emulator))
    with pytest.raises(ValueError, match="neither a diffusion pipeline"):
        denoiser_folder(tmp_path)
    with pytest.raises(ValueError, match="is no diffusion pipeline"):
        pipeline_class(emulator)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "NoSuchModel"}))
    with pytest.raises(ValueError, match="no model of the installed diffusers"):
        open_model(tmp_path, dtype=torch.float32)


def test_an_emulator_tells_no_paths(built: Built) -> None:
    _, emulator = built["flux"]
    config = read_json(emulator / "config.json")
    assert config["quantization_config"]["base_model"] == "org/original"
    assert str(emulator.parent) not in (emulator / "config.json").read_text()
    assert "config.json" in deciding_files(emulator, "emulator")

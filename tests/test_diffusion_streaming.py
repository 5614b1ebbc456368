"""Streaming a denoiser equals running it, and its factors are those of a plain forward's inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from emloc.calibrate import calibrate
from emloc.diffusion.pipelines import denoiser_folder
from emloc.factor_files import FactorFiles
from emloc.models import load_model, open_model
from emloc.streaming import Stream
from emloc.targets import select
from tests.tiny_diffusion import BLOCKS, PIPELINES, denoiser_inputs, save_tiny_pipeline


def streamed(folder: Path, batches: list[dict[str, Any]], dtype: torch.dtype) -> list[Tensor]:
    opened = open_model(folder, dtype=dtype)
    outputs: dict[int, Tensor] = {}
    Stream(opened, "cpu").run(batches, on_output=lambda n, out: outputs.update({n: out[0]}))
    parameters = dict(opened.model.named_parameters())
    assert {name: opened.store.reads[name] for name in parameters} == dict.fromkeys(parameters, 1)
    return [outputs[number] for number in range(len(batches))]


def cast(batch: Any, dtype: torch.dtype) -> Any:
    if isinstance(batch, dict):
        return {key: cast(value, dtype) for key, value in batch.items()}
    return batch.to(dtype) if isinstance(batch, Tensor) else batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PIPELINES)
def test_a_streamed_denoiser_equals_a_plain_one_and_reads_each_weight_once(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = save_tiny_pipeline(name, tmp_path / "p", max_shard_size="100KB")
    assert len(list(denoiser_folder(folder).glob("*.safetensors"))) > 1
    batches = [cast(denoiser_inputs(name, seed), dtype) for seed in (0, 1)]
    plain = load_model(folder, dtype=dtype, device="cpu")
    for batch, output in zip(batches, streamed(folder, batches, dtype), strict=True):
        with torch.no_grad():
            # 0 as a rule; a tensor's place in memory may change the last bit
            close = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 0.02}
            torch.testing.assert_close(output, plain(**batch)[0], **close)
        assert output.dtype == dtype and output.std() > 0.1


def inputs_of(model: nn.Module, names: list[str], batches: list[dict[str, Any]]) -> dict[str, Any]:
    """What each linear sees in plain forwards, as (n, i)."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].reshape(-1, args[0].shape[-1]))
        )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    return {name: torch.cat(parts).double() for name, parts in seen.items()}


@pytest.mark.parametrize("name", PIPELINES)
def test_factors_are_the_best_ones_for_what_a_plain_forward_sees(name: str, tmp_path: Path) -> None:
    folder = save_tiny_pipeline(name, tmp_path / "p")
    batches = [denoiser_inputs(name, seed) for seed in (0, 1, 2)]
    opened = open_model(folder, dtype=torch.float32)
    linears = select(opened.model, [BLOCKS], where="targets")
    assert len(linears) > 20
    out = tmp_path / "factors"
    calibrate(opened, batches, linears=linears, max_ratio=0.5, out=out, dtype=torch.float32)
    assert max(opened.store.reads.values()) == 1
    factors, plain = FactorFiles(out), load_model(folder, dtype=torch.float32, device="cpu")
    seen = inputs_of(plain, list(linears), batches)
    for layer, x in seen.items():
        weight = plain.get_submodule(layer).weight.detach().double()
        y = x @ weight.T
        best = torch.linalg.svdvals(y) ** 2
        outer, inner = (part.double() for part in factors.cut(layer, 4))
        loss = float((y - x @ (outer @ inner).T).square().sum())
        optimum = float(best[4:].sum())
        # float32 moments: 3e-6 of what the layer gives out
        assert loss - optimum < 2e-5 * float(best.sum()), layer
        assert factors.modules[layer]["tokens"] == x.shape[0], layer


def test_a_stored_buffer_is_read_and_not_computed_again(tmp_path: Path) -> None:
    folder = save_tiny_pipeline("sd3", tmp_path / "p")
    file = denoiser_folder(folder) / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    computed = tensors["pos_embed.pos_embed"]
    tensors["pos_embed.pos_embed"] = torch.randn(computed.shape)
    save_file(tensors, file, metadata={"format": "pt"})
    opened = open_model(folder, dtype=torch.float32)
    read = opened.model.get_buffer("pos_embed.pos_embed")
    assert torch.equal(read, tensors["pos_embed.pos_embed"])
    assert all(parameter.is_meta for parameter in opened.model.parameters())


def test_an_incomplete_denoiser_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_pipeline("flux", tmp_path / "p")
    file = denoiser_folder(folder) / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["x_embedder.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"holds no weights for x_embedder.weight \(1 param"):
        open_model(folder, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"holds no weights for x_embedder.weight \(1 param"):
        load_model(folder, dtype=torch.float32, device="cpu")
    file.write_bytes(b"short")
    with pytest.raises(ValueError, match="missing, cut short or corrupt"):
        open_model(folder, dtype=torch.float32)
    file.unlink()
    with pytest.raises(ValueError, match="has no safetensors weights"):
        open_model(folder, dtype=torch.float32)

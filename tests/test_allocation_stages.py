"""The allocation through the stages of a tiny project and on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from emloc.allocate import allocate
from emloc.factor_files import FactorFiles
from emloc.files import read_json, sha256
from emloc.models import load_model
from tasks import layout
from tasks.params import load_params
from tasks.tables import read_csv
from tests.project import (
    make_diffusion_project,
    make_project,
    make_vision_project,
    run_stage,
    write_params,
)
from tests.test_cli import emloc

RATIO = 0.5


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A fresh, calibrated project to compress in; settings given update its section `compress`."""

    def make(kind: Callable[[Path], dict[str, Any]] = make_project, **compress: Any) -> Path:
        folder = tmp_path / "project"
        params = kind(folder)
        params["compress"] |= compress
        write_params(folder, params)
        monkeypatch.chdir(folder)
        monkeypatch.setenv("EMLOC_CACHE", str(tmp_path / "cache"))
        return folder

    return make


def compress(allocation: str, folder: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Run the stage; compress.json and layers.csv."""
    params = load_params().model_dump(mode="json")
    params["compress"]["allocation"] = allocation
    write_params(folder, params)
    run_stage("compress", RATIO)
    results = layout.results(RATIO)
    return read_json(results / "compress.json"), read_csv(results / "layers.csv")


@pytest.mark.parametrize("kind", [make_project, make_vision_project])
def test_every_allocation_spends_the_same_and_is_trained_like_any_other(
    kind: Callable[[Path], dict[str, Any]], project: Callable[..., Path]
) -> None:
    folder = project(kind)
    for name in ("prepare", "calibrate"):
        run_stage(name)
    sizes, layers = compress("uniform", folder)
    assert "weighted_loss" not in sizes and "weight" not in layers[0]
    uniform = {row["name"]: row["rank"] for row in layers}
    ranks = {}
    for allocation in ("relative", "sensitivity"):
        own, layers = compress(allocation, folder)
        costs = [int(row["kept"]) // int(row["rank"]) for row in layers]
        assert 0 <= sizes["emulator_parameters"] - own["emulator_parameters"] < max(costs)
        assert own["weighted_loss"] < own["weighted_loss_uniform"]
        assert {row["name"]: row["uniform_rank"] for row in layers} == uniform
        assert all(float(row["weight"]) > 0 for row in layers)
        ranks[allocation] = {row["name"]: int(row["rank"]) for row in layers}
        config = read_json(layout.emulator(RATIO) / "config.json")
        assert config["quantization_config"]["ranks"] == ranks[allocation]
        assert {path.name for path in layout.ARTIFACTS.iterdir()} == {
            "data", "emulators", "factors", "model.json", "quantized.json",
        }  # fmt: skip
    assert ranks["relative"] != ranks["sensitivity"]
    first = sha256(layout.emulator(RATIO) / "model.safetensors")
    compress("sensitivity", folder)
    assert sha256(layout.emulator(RATIO) / "model.safetensors") == first
    params = load_params().model_dump(mode="json")
    write_params(folder, {**params, "memory": {"budget": "16GiB"}})
    for name in ("heal", "train", "correct"):
        run_stage(name, RATIO)
    assert read_json(layout.results(RATIO) / "train.cost.json")["planned_bytes"] > 0


def test_a_ratio_of_its_own_is_kept(project: Callable[..., Path]) -> None:
    own = r".*\.down_proj"
    folder = project(targets={own: 0.3, ".*": "ratio"})
    for name in ("prepare", "calibrate"):
        run_stage(name)
    _, layers = compress("relative", folder)
    for row in layers:
        kept = row["name"].endswith("down_proj")
        assert float(row["ratio"]) == (0.3 if kept else RATIO)
        assert not kept or row["rank"] == row["uniform_rank"]
    assert any(row["rank"] != row["uniform_rank"] for row in layers)


def test_sensitivity_needs_a_language_model_and_its_rows(project: Callable[..., Path]) -> None:
    folder = project(allocation="sensitivity")
    params = load_params().model_dump(mode="json")
    params["calibrate"]["samples"] = 0
    write_params(folder, params)
    with pytest.raises(ValueError, match="takes the loss of calibration rows, but .* is 0"):
        load_params()
    params["calibrate"]["samples"], params["compress"]["allocation"] = 8, "even"
    write_params(folder, params)
    with pytest.raises(ValueError, match="compress.allocation is 'even', but"):
        load_params()


def test_sensitivity_is_refused_for_a_pipeline(project: Callable[..., Path]) -> None:
    project(make_diffusion_project, allocation="sensitivity")
    with pytest.raises(ValueError, match="'sensitivity', which is for language and vision"):
        load_params()


def test_a_denoiser_s_ranks_can_be_shared_out_by_relative_errors(
    project: Callable[..., Path],
) -> None:
    folder = project(make_diffusion_project)
    for name in ("prepare", "calibrate"):
        run_stage(name)
    sizes, _ = compress("uniform", folder)
    own, layers = compress("relative", folder)
    assert own["weighted_loss"] < own["weighted_loss_uniform"]
    costs = [int(row["kept"]) // int(row["rank"]) for row in layers]
    assert 0 <= sizes["emulator_parameters"] - own["emulator_parameters"] < max(costs)
    assert any(row["rank"] != row["uniform_rank"] for row in layers)


def test_the_command_line_allocates_by_relative_errors(project: Callable[..., Path]) -> None:
    folder = project()
    at, model = folder / "cli", load_params().model.source
    data = f"--data {load_params().data.source}"
    emloc(f"calibrate {model} {data} --samples 8 --dtype float32 --out {at}/factors")
    line = f"compress {model} --factors {at}/factors --ratio 0.5"
    emloc(f"{line} --allocation relative --out {at}/emulator")
    factors = FactorFiles(at / "factors")
    ranks = read_json(at / "emulator/config.json")["quantization_config"]["ranks"]
    assert ranks == allocate(factors, dict.fromkeys(factors.modules, 0.5))
    emulator = load_model(at / "emulator", dtype=torch.float32, device="cpu")
    for name, rank in ranks.items():
        assert emulator.get_submodule(name).rank == rank

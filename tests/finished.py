"""The project's pipeline with made-up results, as dvc sees them: no stage has to run."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from dvc.repo import Repo
from PIL import Image

from tests.project import ROOT, copy_code

WAYS = ("emulator-raw", "original-raw", "original-corrected")
SCORED = {"evaluate": WAYS, "baseline": ("original", "direct")}
MACHINE = {"cpu": "a processor", "accelerator": None}
SIZES = {"train": 30, "validation": 4, "test": 1, "calibration": 8}
ROW = {"prompt": "2a", "answer": "aa"}


def write_out(path: Path, kind: str, seed: int) -> None:
    """An out of a stage as the stage would write it; figures tell one `seed` from another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(_figures(path, kind, seed)))
    elif path.name == "train.csv":
        path.write_text(f"step,loss,eval_loss\n10,{seed}.5,\n20,{seed}.25,0.125\n")
    elif path.suffix == ".csv":
        path.write_text("name,loss\nlayer,1\n")
    else:
        path.mkdir()
        _fill(path, kind, seed)


def _figures(path: Path, kind: str, seed: int) -> dict[str, Any]:
    """The content of a JSON file."""
    if path.name.endswith(".cost.json"):
        cost = {"seconds": seed + 0.5, "peak_bytes": 2**30, "planned_bytes": None}
        return cost | {"device": "cpu", "machine": MACHINE}
    if path.name == "model.json":
        return {"name": "pypi:tiny==1/tiny.gguf", "fingerprint": "0123456789abcdef"}
    if path.name == "quantized.json":
        return {}
    if kind == "prepare":
        return {"rows": SIZES, "too_long": 0}
    if kind == "compress":
        sizes = {"emulator_bytes": seed * 2**20, "original_bytes": 10 * 2**20}
        return sizes | {"emulator_parameters": seed, "original_parameters": 10}
    if kind in SCORED:
        scores = {name: seed / 10 for name in _params()["evaluate"]["metrics"]}
        return {way: scores | {"loss": 1.0} for way in SCORED[kind]}
    return {"steps": 4, "validation_loss": None, "trainable_parameters": 1000}


def _fill(folder: Path, kind: str, seed: int) -> None:
    """Write the content of a folder."""
    if kind in SCORED:
        for way in SCORED[kind]:
            line = json.dumps(ROW | {"prediction": f"{way}{seed}"})
            (folder / f"{way}.jsonl").write_text(line + "\n")
    elif kind == "report":
        (folder / "report.md").write_text(f"# EMLoC report {seed}\n\n|table|\n\n## Pictures\n")
        (folder / "quality.png").write_bytes(b"\x89PNG")
        (folder / "predictions.html").write_text("<!doctype html>")
    elif kind == "prepare":
        (folder / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
        Image.new("RGB", (4, 4)).save(folder / "black.png")
    else:
        (folder / "adapter_model.safetensors").write_bytes(bytes([seed]) * 9)


def finish(folder: Path) -> None:
    """Write all outs that are not there, and have dvc take them as results."""
    with contextlib.chdir(folder), Repo() as repo:
        stages = list(repo.index.stages)
        for stage in stages:
            for out in stage.outs:
                if not Path(out.fs_path).exists():
                    kind, _, ratio = stage.addressing.partition("@")
                    write_out(Path(out.fs_path), kind, round(10 * float(ratio or 0.9)))
        repo.commit(force=True)


def make_finished(folder: Path) -> None:
    """Copy the project to `folder` and finish it, with the ratios of its params.yaml."""
    copy_code(folder)
    shutil.copyfile(ROOT / "params.yaml", folder / "params.yaml")
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    finish(folder)


def change_params(change: Callable[[dict[str, Any]], None]) -> None:
    """Change the params.yaml of the current directory."""
    params = _params()
    change(params)
    Path("params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def _params() -> dict[str, Any]:
    return yaml.safe_load(Path("params.yaml").read_text())

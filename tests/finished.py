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

from tests.project import COPIED, ROOT

WAYS = ("emulator-raw", "original-raw", "original-corrected")
MACHINE = {"cpu": "a processor", "accelerator": None}


def write_out(path: Path, kind: str, seed: int) -> None:
    """An out of a stage as the stage would write it; figures tell one `seed` from another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {"prompt": "2a", "answer": "aa"}
    if path.name.endswith(".cost.json"):
        cost = {"seconds": seed + 0.5, "peak_bytes": 2**30, "device": "cpu", "machine": MACHINE}
        path.write_text(json.dumps(cost))
    elif path.name == "model.json":
        path.write_text(json.dumps({"name": "pypi:tiny==1/tiny.gguf"}))
    elif path.suffix == ".json":
        figures = {way: {"exact_match": seed / 10, "loss": 1.0} for way in WAYS}
        path.write_text(json.dumps(figures | {"steps": 4, "validation_loss": None}))
    elif path.name == "train.csv":
        path.write_text(f"step,loss,eval_loss\n10,{seed}.5,\n20,{seed}.25,0.125\n")
    elif path.suffix == ".csv":
        path.write_text("name,loss\nlayer,1\n")
    elif path.suffix == ".jsonl":
        path.write_text(json.dumps(row) + "\n")
    elif kind in ("evaluate", "baseline"):
        path.mkdir()
        for way in WAYS:
            (path / f"{way}.jsonl").write_text(json.dumps(row | {"prediction": f"{way}{seed}"}))
    elif kind == "report":
        path.mkdir()
        (path / "report.md").write_text(f"# EMLoC report {seed}\n\n|table|\n\n## Pictures\n")
        (path / "quality.png").write_bytes(b"\x89PNG")
    else:
        path.mkdir()
        (path / "adapter_model.safetensors").write_bytes(bytes([seed]) * 9)


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
    for name in (*COPIED, "params.yaml"):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, target)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    finish(folder)


def change_params(change: Callable[[dict[str, Any]], None]) -> None:
    """Change the params.yaml of the current directory."""
    params = yaml.safe_load(Path("params.yaml").read_text())
    change(params)
    Path("params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))

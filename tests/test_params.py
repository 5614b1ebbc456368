"""params.yaml and dvc.yaml: parsed, checked, and in step with the code."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.params import load_params

ROOT = Path(__file__).parent.parent
PRESETS = sorted((ROOT / "presets").glob("*.yaml"))
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]

IMPORTED = """
import importlib, json, os, pathlib, sys
import diffusers, peft, transformers
root = pathlib.Path.cwd()
for stage in sys.argv[1:]:
    if os.fork():
        assert os.wait()[1] == 0
        continue
    importlib.import_module(f"tasks.{stage}")
    names = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    files = [pathlib.Path(name) for name in names if name]
    mine = [f.relative_to(root).as_posix() for f in files if f.is_relative_to(root)]
    print(json.dumps({stage: mine}), flush=True)
    os._exit(0)
"""
"""Prints the repository's modules that each stage imports, in a process of its own."""


def changed(tmp_path: Path, path: str, value: Any) -> Path:
    """params.yaml with one key set to another value, or removed (`value` is ...)."""
    content = copy.deepcopy(yaml.safe_load((ROOT / "params.yaml").read_text()))
    *parents, last = path.split(".")
    section = content
    for key in parents:
        section = section[key]
    if value is ...:
        del section[last]
    else:
        section[last] = value
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "train.learning_rat",
            1,
            "train.learning_rat is no known key; did you mean learning_rate?",
        ),
        ("train.lora.rank", 4, "train.lora.rank is no known key"),
        ("modle", {}, "modle is no known key; did you mean model?"),
        ("ratios", [1.5], "ratios.0 is 1.5, but it should be less than 1"),
        ("ratios", [0], "ratios.0 is 0, but it should be greater than 0"),
        ("ratios", [0.95], "ratios holds 0.95, but calibrate.max_ratio is 0.9"),
        ("ratios", [0.5, 0.5], "names a ratio twice"),
        ("ratios", [], "ratios is"),
        ("ratios", 0.5, "ratios is 0.5, but it should be a valid list"),
        ("data.format", "csv", "data.format is 'csv'"),
        ("data", ..., "data is missing"),
        ("data.train", ..., "data.train is missing"),
        ("train.steps", -1, "steps is -1"),
        ("train.epochs", 3, "exactly one of them must be set"),
        ("train.schedule", "cosin", "schedule is 'cosin', but it must be one of cosine"),
        ("train.lora.r", 0, "r is 0"),
        ("correct.limit", -1, "correct.limit is -1"),
        ("train.quantization", "int4", "quantization is 'int4', but it must be empty or one of"),
        ("evaluate.model", 4, "evaluate.model is 4, but it should be a valid string"),
        ("model.dtype", "float16", "model.dtype is 'float16'"),
    ],
)
def test_bad_params_are_refused_in_one_sentence(
    tmp_path: Path, path: str, value: Any, message: str
) -> None:
    with pytest.raises(ValueError) as raised:
        load_params(changed(tmp_path, path, value))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_params_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="copy a preset"):
        load_params(tmp_path / "params.yaml")


@pytest.fixture(scope="module")
def imports() -> dict[str, list[str]]:
    """Stage → files of the repository that it imports."""
    command = [sys.executable, "-c", IMPORTED, *STAGES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        found |= json.loads(line)
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_just_the_modules_that_it_imports(
    stage: str, imports: dict[str, list[str]]
) -> None:
    imported = {file for file in imports[stage] if file.startswith(("emloc/", "tasks/"))}
    declared = {dep for dep in STAGES[stage]["deps"] if dep.endswith(".py")}
    assert declared == imported


@pytest.mark.parametrize("file", ["params.yaml", *(f"presets/{p.name}" for p in PRESETS)])
def test_params_of_stages_exist(file: str) -> None:
    content = yaml.safe_load((ROOT / file).read_text())
    for stage in STAGES.values():
        for path in stage["params"]:
            value = content
            for key in path.split("."):
                value = value[key]

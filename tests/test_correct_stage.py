"""The correct stage: each method, and the best of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from emloc.adapters import find_adapter
from emloc.files import read_json
from tests.project import make_diffusion_project, make_project, run_stage, write_params
from tests.shell import read_params

KINDS = {"text": make_project, "pictures": make_diffusion_project}


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a raw adapter."""
    folder = tmp_path_factory.mktemp(request.param) / "project"
    KINDS[request.param](folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("EMLOC_CACHE", str(folder / "cache"))
        for name in ("prepare", "calibrate"):
            run_stage(name)
        for name in ("compress", "heal", "train"):
            run_stage(name, 0.5)
    return folder


@pytest.fixture
def correct(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs the stage with a section `correct`; what correct.json says."""

    def run(**section: Any) -> dict[str, Any]:
        write_params(trained, read_params(trained) | {"correct": section})
        shutil.rmtree(trained / "artifacts/adapters/0.5/corrected", ignore_errors=True)
        run_stage("correct", 0.5)
        return read_json(trained / "results/0.5/correct.json")

    monkeypatch.chdir(trained)
    monkeypatch.setenv("EMLOC_CACHE", str(trained / "cache"))
    return run


def tensors(kind: str) -> dict[str, Any]:
    return load_file(find_adapter(f"artifacts/adapters/0.5/{kind}").file)


def test_none_keeps_the_adapter_and_the_others_do_not(
    correct: Callable[..., dict[str, Any]],
) -> None:
    said = correct(method="none")
    assert (said["method"], said["limit"], said["validation_losses"]) == ("none", None, {})
    raw = tensors("raw")
    assert all((tensor == raw[key]).all() for key, tensor in tensors("corrected").items())
    assert find_adapter("artifacts/adapters/0.5/corrected").header()["emloc"] == "corrected"
    found = {}
    for method in ("paper", "weighted"):
        assert correct(method=method, limit=None)["method"] == method
        found[method] = tensors("corrected")
    for key, tensor in found["paper"].items():
        if "lora_B" in key:
            assert not tensor.equal(raw[key]) and not tensor.equal(found["weighted"][key])


def test_auto_takes_what_is_best_on_the_validation_rows(
    correct: Callable[..., dict[str, Any]],
) -> None:
    said = correct(method="auto", limits=[1, None])
    losses = said["validation_losses"]
    assert list(losses) == [
        "none", "paper 1.0", "paper unlimited", "weighted 1.0", "weighted unlimited"
    ]  # fmt: skip
    name = said["method"]
    if name != "none":
        name += f" {said['limit'] or 'unlimited'}"
    assert losses[name] == min(losses.values())
    assert len(set(losses.values())) > 1
    again = correct(method=said["method"], limit=said["limit"])
    assert again["method"] == said["method"]

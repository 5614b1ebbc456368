"""The working tree of a flow: parameters, clean commits, and what a deployment's clone shares."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from emloc.source import cache_dir
from flows import emulators, workspace
from flows.stages import StageError
from tests import shell
from tests.project import ROOT


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that is committed."""
    folder = tmp_path_factory.mktemp("workspace") / "project"
    shell.start(folder)
    return folder


@pytest.fixture(autouse=True)
def _inside(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EMLOC_CHECKOUT", "EMLOC_DVC_CACHE", "EMLOC_CHECKPOINTS", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.chdir(checkout)


def test_params_are_set_and_comments_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "params.yaml"
    file.write_text((ROOT / "params.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    workspace.set_params([0.7, 0.25], ["train.lora.r=16", "correct.limit=null"])
    params = yaml.safe_load(file.read_text())
    assert params["ratios"] == [0.7, 0.25]
    assert params["train"]["lora"]["r"] == 16
    assert params["correct"]["limit"] is None
    assert "# lambda of the paper; null: no limit" in file.read_text()


def test_nothing_to_set_leaves_the_file_alone(checkout: Path) -> None:
    before = (checkout / "params.yaml").read_bytes()
    workspace.set_params(None, [])
    assert (checkout / "params.yaml").read_bytes() == before


@pytest.mark.parametrize("override", ["train.lora.rr=16", "nothing=1", "train.steps"])
def test_an_override_that_fits_no_key_is_refused(checkout: Path, override: str) -> None:
    before = (checkout / "params.yaml").read_bytes()
    with pytest.raises(ValueError, match=r"write KEY=VALUE with a key of params\.yaml") as raised:
        workspace.set_params(None, [override])
    assert override in str(raised.value)
    assert "\n" not in str(raised.value)
    assert (checkout / "params.yaml").read_bytes() == before


def test_a_tree_with_changes_is_refused(checkout: Path) -> None:
    workspace.check_clean()
    text = (checkout / "params.yaml").read_text()
    (checkout / "untracked.txt").write_text("no matter")
    workspace.check_clean()
    try:
        (checkout / "params.yaml").write_text(text + "# more\n")
        with pytest.raises(StageError, match=r"params\.yaml differ from it: commit the changes"):
            workspace.check_clean()
    finally:
        (checkout / "params.yaml").write_text(text)


@pytest.mark.parametrize("name", ["commit", "repository", "checkout"])
def test_a_deployment_is_pinned(checkout: Path, name: str) -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    pinned = {"commit": head.strip(), "repository": "https://host/x.git", "checkout": str(checkout)}
    done = subprocess.run(
        [sys.executable, "-m", "flows.pin", name],
        env={**os.environ, "EMLOC_REPOSITORY": "https://host/x.git"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"{pinned[name]}\n"


def test_what_is_no_repository_is_not_deployed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows.pin", "commit"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {tmp_path} is no git repository: deploy from a clone of the project.\n"
    )


@pytest.fixture
def clone(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh clone, which is then the working directory."""
    folder = shell.clone(checkout, tmp_path / "clone")
    monkeypatch.chdir(folder)
    return folder


def cache_of(folder: Path) -> Path:
    command = [sys.executable, "-m", "dvc", "cache", "dir"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return Path(done.stdout.strip())


def test_on_one_machine_a_clone_shares_with_the_checkout(
    checkout: Path, clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMLOC_CHECKOUT", str(checkout))
    workspace.share_state(print)
    workspace.share_store()
    assert cache_of(clone) == checkout / ".dvc/cache"
    assert os.environ["EMLOC_CHECKPOINTS"] == str(checkout / ".emloc/checkpoints")
    assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{checkout}/mlflow.db"


def test_on_another_machine_a_clone_keeps_its_state_beside_the_downloads(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMLOC_CHECKOUT", "/not/on/this/machine")
    monkeypatch.setenv("EMLOC_CACHE", str(tmp_path / "state"))
    workspace.share_state(print)
    assert cache_of(clone) == tmp_path / "state/dvc"
    assert os.environ["EMLOC_CHECKPOINTS"] == str(tmp_path / "state/checkpoints")
    with pytest.raises(StageError, match="which goes when the run ends: name a server"):
        workspace.share_store()


def test_what_a_worker_says_comes_first(
    checkout: Path, clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMLOC_CHECKOUT", str(checkout))
    monkeypatch.setenv("EMLOC_DVC_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("EMLOC_CHECKPOINTS", "/scratch/checkpoints")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    workspace.share_state(print)
    workspace.share_store()
    assert cache_of(clone) == tmp_path / "own"
    assert os.environ["EMLOC_CHECKPOINTS"] == "/scratch/checkpoints"
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://server:5000"


def test_folders_that_flows_name_again_are_those_of_the_stages() -> None:
    layout = runpy.run_path(str(ROOT / "tasks/layout.py"))  # as a stage without settings sees it
    assert Path(workspace.CHECKPOINTS) == layout["CHECKPOINTS"]
    assert Path(emulators.POINTER) == layout["POINTER"]
    assert Path(emulators.ROWS) == layout["rows"]("calibration").parent
    assert Path(emulators.FACTORS) == layout["FACTORS"]
    assert Path(f"{emulators.EMULATORS}0.5") == layout["emulator"](0.5)


@pytest.mark.parametrize("place", [{}, {"XDG_CACHE_HOME": "~/x"}, {"EMLOC_CACHE": "~/e"}], ids=str)
def test_a_machines_state_lies_beside_the_stages_downloads(
    place: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_CACHE_HOME", "EMLOC_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    assert {folder.parent for folder in workspace._machine_state()} == {cache_dir()}

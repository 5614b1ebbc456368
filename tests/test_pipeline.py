"""The pipeline through dvc on a tiny model: what runs again, what is restored, what is equal."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.project import make_project, write_params

pytestmark = pytest.mark.slow


def dvc(folder: Path, *arguments: str) -> str:
    """Run a dvc command in a project; what it printed."""
    binaries = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "EMLOC_CACHE": str(folder.parent / "emloc-cache"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ran(printed: str) -> set[str]:
    """Stages whose command was run, from dvc's lines."""
    return _named(printed, "Running stage '")


def restored(printed: str) -> set[str]:
    """Stages whose outputs came from the run cache."""
    return _named(printed, "is cached - skipping run")


def _named(printed: str, mark: str) -> set[str]:
    return {line.split("'")[1] for line in printed.splitlines() if mark in line}


def hashes(folder: Path) -> dict[str, str]:
    """Out → hash, of all outs that hold no measured cost, from dvc.lock."""
    stages = yaml.safe_load((folder / "dvc.lock").read_text())["stages"]
    outs = [out for stage in stages.values() for out in stage["outs"]]
    return {out["path"]: out["md5"] for out in outs if "cost" not in out["path"]}


def git(folder: Path, *arguments: str) -> None:
    """Run a git command in a project."""
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def start(folder: Path) -> dict[str, Any]:
    """A project in a git repository of its own, all of it committed."""
    params = make_project(folder)
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "start")
    return params


def clone(folder: Path, target: Path, params: dict[str, Any]) -> Path:
    """A clean clone of a project, without its cache and its dvc.lock, with other params."""
    git(folder, "clone", "--quiet", str(folder), str(target))
    write_params(target, params)
    return target


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A project after its first `dvc repro`."""
    folder = tmp_path_factory.mktemp("pipeline") / "project"
    params = start(folder)
    stages = ran(dvc(folder, "repro"))
    assert {"prepare", "calibrate", "compress@0.8", "evaluate@0.5", "report"} <= stages
    return folder, params


def test_nothing_runs_twice_and_a_changed_ratio_reruns_its_branch_only(
    project: tuple[Path, dict[str, Any]],
) -> None:
    folder, params = project
    assert not ran(dvc(folder, "repro"))

    write_params(folder, {**params, "ratios": [0.8, 0.3]})
    branch = {f"{stage}@0.3" for stage in ("compress", "train", "correct", "evaluate")}
    assert ran(dvc(folder, "repro")) == {*branch, "report"}

    write_params(folder, params)
    shutil.rmtree(folder / "artifacts/emulators/0.5")
    printed = dvc(folder, "repro")
    assert not ran(printed) - {"report"}
    assert (folder / "artifacts/emulators/0.5/model.safetensors").exists()
    assert "0.5" in (folder / "report/report.md").read_text()
    assert not (folder / "results/0.3").exists()


def test_fewer_ratios_give_the_hashes_of_a_clean_clone(
    project: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, params = project
    shorter = {**params, "ratios": [0.8]}
    write_params(folder, shorter)
    dvc(folder, "repro", "report")
    here = {path: value for path, value in hashes(folder).items() if "0.5" not in path}
    here = {path: value for path, value in here.items() if "0.3" not in path and path != "report"}

    cloned = clone(folder, tmp_path / "clone", shorter)
    printed = dvc(cloned, "repro")
    there = {path: value for path, value in hashes(cloned).items() if path != "report"}
    assert "compress@0.8" in ran(printed)
    assert there == here
    write_params(folder, params)


def test_a_clean_clone_with_the_same_cache_runs_no_stage(
    project: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, params = project
    write_params(folder, params)
    dvc(folder, "repro")
    cloned = clone(folder, tmp_path / "clone", params)
    dvc(cloned, "cache", "dir", str(folder / ".dvc/cache"))
    printed = dvc(cloned, "repro")
    assert not ran(printed)
    assert "evaluate@0.5" in restored(printed)
    assert hashes(cloned).items() <= hashes(folder).items()
    assert not ran(dvc(cloned, "repro"))


def test_the_same_model_at_another_path_gives_the_same_emulator(
    project: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, params = project
    moved = tmp_path / "elsewhere" / "model"
    shutil.copytree(params["model"]["source"], moved)
    there = {**params, "model": {**params["model"], "source": str(moved)}}
    cloned = clone(folder, tmp_path / "clone", there)
    dvc(cloned, "repro", "compress@0.5")
    path = "artifacts/emulators/0.5"
    assert hashes(cloned)[path] == hashes(folder)[path]


def test_metrics_and_plots_are_shown_by_dvc(project: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = project
    shown = dvc(folder, "metrics", "show")
    assert "original-corrected.exact_match" in shown
    dvc(folder, "plots", "show", "--json")
    assert "report/quality.csv" in dvc(folder, "plots", "show", "--json")


def test_a_team_gets_everything_from_a_remote_without_running_a_stage(
    project: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, params = project
    first = clone(folder, tmp_path / "first", params)
    dvc(first, "cache", "dir", str(folder / ".dvc/cache"))
    dvc(first, "repro")
    dvc(first, "remote", "add", "-d", "team", str(tmp_path / "remote"))
    git(first, "add", ".")
    git(first, "commit", "--quiet", "--message", "results")
    dvc(first, "push")
    second = clone(first, tmp_path / "second", params)
    dvc(second, "config", "--local", "cache.dir", str(tmp_path / "empty-cache"))
    assert not ran(dvc(second, "repro", "--pull"))
    assert (second / "artifacts/emulators/0.5/model.safetensors").exists()
    assert "original + corrected" in (second / "report/report.md").read_text()


def test_an_experiment_sets_a_value_and_reruns_what_it_touches(
    project: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, params = project
    cloned = clone(folder, tmp_path / "clone", params)
    dvc(cloned, "cache", "dir", str(folder / ".dvc/cache"))
    dvc(cloned, "repro")
    git(cloned, "add", ".")
    git(cloned, "commit", "--quiet", "--message", "first")
    printed = dvc(cloned, "exp", "run", "-S", "correct.limit=1", "--name", "tighter")
    assert ran(printed) == {"correct@0.8", "correct@0.5", "evaluate@0.8", "evaluate@0.5", "report"}
    assert "tighter" in dvc(cloned, "exp", "show", "--csv")


def test_a_failed_stage_says_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    params = start(folder)
    params["compress"]["targets"] = {"nothing": "ratio"}
    write_params(folder, params)
    with pytest.raises(AssertionError) as raised:
        dvc(folder, "repro", "compress@0.5")
    assert "error: compress.targets: 'nothing' matches none" in str(raised.value)
    assert "Traceback" not in str(raised.value)
    assert not (folder / "artifacts/emulators").exists()

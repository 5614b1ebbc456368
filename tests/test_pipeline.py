"""The pipeline through dvc on a tiny model: what runs again, what is restored, what is equal."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.project import write_params
from tests.shell import BRANCH, clone, dvc, hashes, ran, read_params, restored, start
from tests.tiny import save_tiny

pytest_plugins = "tests.reproduced"
pytestmark = pytest.mark.slow


def test_nothing_runs_twice_and_a_changed_ratio_reruns_its_branch_only(project: Path) -> None:
    assert not ran(dvc(project, "repro"))

    params = read_params(project)
    write_params(project, {**params, "ratios": [0.8, 0.3]})
    branch = {f"{stage}@0.3" for stage in BRANCH}
    assert ran(dvc(project, "repro")) == {*branch, "report"}

    write_params(project, params)
    shutil.rmtree(project / "artifacts/emulators/0.5")
    printed = dvc(project, "repro")
    assert not ran(printed) - {"report"}
    assert (project / "artifacts/emulators/0.5/model.safetensors").exists()
    assert "0.5" in (project / "report/report.md").read_text()
    assert not (project / "results/0.3").exists()


def test_fewer_ratios_give_the_hashes_of_a_clean_clone(project: Path, tmp_path: Path) -> None:
    shorter = {**read_params(project), "ratios": [0.8]}
    write_params(project, shorter)
    dvc(project, "repro", "report")
    here = {path: value for path, value in hashes(project).items() if "0.5" not in path}

    cloned = clone(project, tmp_path / "clone", shorter)
    assert "compress@0.8" in ran(dvc(cloned, "repro"))
    there = hashes(cloned)
    assert here.pop("report") and there.pop("report")  # the page tells the seconds
    assert there == here


def test_a_clean_clone_with_the_same_cache_runs_no_stage(project: Path, tmp_path: Path) -> None:
    cloned = clone(project, tmp_path / "clone")
    dvc(cloned, "cache", "dir", str(project / ".dvc/cache"))
    printed = dvc(cloned, "repro")
    assert not ran(printed)
    assert "evaluate@0.5" in restored(printed)
    assert hashes(cloned) == hashes(project)
    assert not ran(dvc(cloned, "repro"))


def test_the_same_model_at_another_path_gives_the_same_emulator(
    project: Path, tmp_path: Path
) -> None:
    params = read_params(project)
    moved = tmp_path / "elsewhere" / "model"
    shutil.copytree(params["model"]["source"], moved)
    params["model"]["source"] = str(moved)
    cloned = clone(project, tmp_path / "clone", params)
    dvc(cloned, "repro", "compress@0.5")
    path = "artifacts/emulators/0.5"
    assert hashes(cloned)[path] == hashes(project)[path]


def test_another_model_to_answer_reruns_the_answers_only(project: Path, tmp_path: Path) -> None:
    params = read_params(project)
    params["evaluate"]["model"] = str(save_tiny("llama", tmp_path / "copy", dtype=torch.bfloat16))
    write_params(project, params)
    answers = {"baseline", *(f"evaluate@{ratio}" for ratio in params["ratios"])}
    assert ran(dvc(project, "repro")) == {"prepare", *answers, "report"}
    assert "answered a copy of it" in (project / "report/report.md").read_text()


def test_metrics_and_plots_are_shown_by_dvc(project: Path) -> None:
    assert "original-corrected.exact_match" in dvc(project, "metrics", "show")
    assert "report/quality.csv" in dvc(project, "plots", "show", "--json")


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

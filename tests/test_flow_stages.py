"""What flows read of dvc: the graph, the lock, the lines of a command, its failures."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml

from flows import stages
from flows.stages import StageError, TransientError, ancestors, forget, read_graph, run_dvc
from tests.project import make_project

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which nothing has run."""
    folder = tmp_path_factory.mktemp("flow") / "project"
    make_project(folder)
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    return folder


@pytest.fixture(autouse=True)
def _inside(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)


def test_the_graph_is_in_an_order_that_can_be_run() -> None:
    graph = read_graph()
    seen: set[str] = set()
    for name, stage in graph.items():
        assert stage.needs <= seen
        seen.add(name)
    assert graph["train@0.5"].ratio == "0.5"
    assert graph["train@0.5"].kind == "train"
    assert graph["baseline"].ratio is None


def test_a_branch_needs_no_stage_of_another_ratio() -> None:
    needed = ancestors(read_graph(), ["evaluate@0.5"])
    assert {"prepare", "calibrate", "compress@0.5", "train@0.5", "correct@0.5"} < needed
    assert not [name for name in needed if "0.8" in name]


def test_params_that_dvc_cannot_read_give_one_sentence(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (project / "params.yaml").read_text()
    try:
        (project / "params.yaml").write_text("ratios: {")
        with pytest.raises(StageError, match=r"params\.yaml") as raised:
            read_graph()
        assert "\n" not in str(raised.value)
    finally:
        (project / "params.yaml").write_text(text)


def test_forget_takes_entries_out_of_the_lock(project: Path) -> None:
    entries = {name: {"cmd": f"run {name}"} for name in ("prepare", "train@0.5")}
    stages.LOCK.write_text(yaml.safe_dump({"schema": "2.0", "stages": entries}))
    forget({"train@0.5"})
    assert stages.read_lock() == {"prepare": {"cmd": "run prepare"}}
    stages.LOCK.unlink()
    forget({"prepare"})
    assert stages.read_lock() == {}


def test_progress_is_logged_now_and_then_and_lines_always() -> None:
    bars = "".join(f"train: {n}%\r" for n in range(50))
    shown: list[str] = []
    stages._follow(io.BytesIO(f"first\n{bars}train: 100%\n\nlast\n".encode()), shown.append)
    assert shown == ["first", "train: 100%", "last"]


def test_dvcs_hints_are_left_out() -> None:
    printed = (
        "Running stage 'x':\nTo track the changes with git, run:\n\n\tgit add dvc.lock\n"
        "Use `dvc push` to send your updates to remote storage.\n"
    )
    assert stages._follow(io.BytesIO(printed.encode()), print) == ["Running stage 'x':"]


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["error: train.steps is -1, but ...", "ERROR: failed to reproduce"], "train.steps is -1"),
        (["Traceback", "ERROR: failed to reproduce 'x': exited with 1"], "failed to reproduce 'x'"),
    ],
)
def test_the_stages_own_sentence_comes_before_dvcs(lines: list[str], problem: str) -> None:
    assert str(stages._problem(lines)).startswith(problem)


@pytest.mark.parametrize(
    ("sentence", "can_pass"),
    [
        ("Unable to acquire lock. Most likely another DVC process is running", True),
        ("'results' is busy, it is being blocked by:", True),
        ("Connect timeout on endpoint URL", True),
        ("An error occurred (SlowDown)", True),
        ("train.steps is -1, but must be at least 1", False),
        ("Unable to find remote team", False),
    ],
)
def test_what_can_pass_is_told_from_what_cannot(
    sentence: str, can_pass: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = tmp_path / "fake"
    fake.write_text(
        f"#!/bin/sh\necho {sentence!r} | sed 's/^/ERROR: /'\nexit 1\n".replace("\\", "")
    )
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(StageError) as raised:
        run_dvc("repro", log=lambda _: None)
    assert isinstance(raised.value, TransientError) == can_pass


def test_a_failed_command_is_an_error() -> None:
    with pytest.raises(StageError, match="nothing-like-this"):
        run_dvc("repro", "nothing-like-this", log=lambda _: None)


def test_stop_all_ends_a_command_and_what_it_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake, marker = tmp_path / "fake", tmp_path / "pid"
    fake.write_text(f"#!/bin/sh\nsleep 100 & echo $! > {marker}; wait\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    caught: list[BaseException] = []

    def work() -> None:
        try:
            run_dvc("repro", log=lambda _: None)
        except StageError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while not (marker.exists() and marker.read_text().strip()):
        time.sleep(0.05)
    child = int(marker.read_text())
    assert psutil.pid_exists(child)
    stages.stop_all()
    thread.join(timeout=20)
    assert "stopped" in str(caught[0])
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_stages_run_with_the_interpreter_that_runs_the_flow() -> None:
    first = stages._environment()["PATH"].split(os.pathsep)[0]
    assert first == str(Path(sys.executable).parent)

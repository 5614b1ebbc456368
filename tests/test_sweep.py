"""A sweep: two workers that share nothing but a remote build two ratios, and all is collected."""

from __future__ import annotations

import shutil
import signal
import sys
from datetime import datetime
from pathlib import Path

import pytest

from tests.servers import prefect_server, stage_processes, started, wait_for
from tests.shell import check_cache, commit, dvc, git, ran, restored, run, start

pytest_plugins = "tests.reproduced"
pytestmark = pytest.mark.slow


def test_two_workers_build_two_ratios_at_once_and_a_third_clone_computes_nothing(
    tmp_path: Path,
) -> None:
    project, remote = tmp_path / "project", tmp_path / "remote"
    start(project)
    with prefect_server(project, tmp_path) as server:
        server.run(project, "deploy", "--all")
        # Not committed: the workers get it from the sweep.
        params = (project / "params.yaml").read_text()
        (project / "params.yaml").write_text(params.replace("limit: 3", "limit: 2"))
        caches = [tmp_path / "cache-1", tmp_path / "cache-2"]
        apart = [{"EMLOC_DVC_CACHE": str(cache), "EMLOC_CACHE": f"{cache}-x"} for cache in caches]
        with server.worker("first", **apart[0]), server.worker("second", **apart[1]):
            options = ["--remote", str(remote)]
            done = run(project, "flows.sweep", *options, PREFECT_API_URL=server.url)
        printed = done.stdout + done.stderr
        assert done.returncode == 0, printed
        # Before the branches the six that no ratio changes; after them the report alone.
        assert len(ran(printed)) == 7, ran(printed)
        assert "1 ran, 10 restored, 6 unchanged" in printed
        branches = server.runs("branch/emloc")
        assert {branch["parameters"]["ratio"] for branch in branches} == {0.8, 0.5}
        begun = max(datetime.fromisoformat(branch["start_time"]) for branch in branches)
        assert begun < min(datetime.fromisoformat(branch["end_time"]) for branch in branches)
        for branch in branches:
            states = server.stages(branch["id"])
            assert states["calibrate"] == "Restored"
            assert list(states.values()).count("Ran") == 5

    clone = tmp_path / "clone"
    git(project, "clone", "--quiet", str(project), str(clone))
    shutil.copyfile(project / "params.yaml", clone / "params.yaml")
    dvc(clone, "remote", "add", "--local", "-d", "team", str(remote))
    printed = dvc(clone, "repro", "--pull")
    assert not ran(printed)
    assert len(restored(printed)) == 17
    assert (clone / "artifacts/emulators/0.5/model.safetensors").exists()
    for cache in (*caches, project / ".dvc/cache", clone / ".dvc/cache", remote):
        assert check_cache(cache)


def test_a_sweep_that_cannot_begin_says_what_is_missing(project: Path, tmp_path: Path) -> None:
    def sweep(*arguments: str) -> str:
        done = run(project, "flows.sweep", *arguments, PREFECT_API_URL=server.url)
        assert done.returncode == 1
        return next(line for line in done.stderr.splitlines() if line.startswith("error: "))

    with prefect_server(project, tmp_path) as server:
        assert "error: This project has no remote: add one" in sweep()
        problem = sweep("--remote", str(tmp_path / "remote"))
        assert "error: There is no deployment branch/emloc: run prefect deploy --all" in problem
        problem = sweep("--remote", "nobody")
        assert "error: remote is 'nobody', but the remotes of this project are" in problem
        problem = sweep("--remote", "http://127.0.0.1:9/x")
        assert "keeps no record of runs, through which the machines of a sweep" in problem
        (project / "dvc.yaml").write_text((project / "dvc.yaml").read_text() + "# more\n")
        problem = sweep("--remote", str(tmp_path / "remote"))
        assert "dvc.yaml differ from it: commit the changes" in problem
        git(project, "checkout", "--quiet", "dvc.yaml")
        problem = sweep("--set", "train.lora.rr=16", "--remote", str(tmp_path / "r"))
        assert "Could not override 'train.lora.rr': write KEY=VALUE" in problem


def test_a_stopped_sweep_stops_its_branches(project: Path, tmp_path: Path) -> None:
    commit(project)
    options = ["--remote", str(tmp_path / "remote"), "--set", "train.steps=1000000"]
    command = [sys.executable, "-m", "flows.sweep", *options, "--set", "evaluate.direct=false"]
    with prefect_server(project, tmp_path) as server:
        server.run(project, "deploy", "--all")
        log = tmp_path / "sweep.log"
        with server.worker("one"), started(command, project, server.env, log) as sweep:
            wait_for("training", lambda: stage_processes(tmp_path, "train"), seconds=400)
            sweep.send_signal(signal.SIGINT)
            assert sweep.wait(timeout=30) == 130
            for branch in server.runs("branch/emloc"):
                assert server.ended(branch["id"], seconds=120)["state_type"] == "CANCELLED"
            assert len(server.runs("branch/emloc")) == 2
            assert not stage_processes(tmp_path, "train")

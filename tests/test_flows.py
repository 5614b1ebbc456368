"""The pipeline as a flow: on its own, from a schedule, cancelled, with a branch that fails."""

from __future__ import annotations

import signal
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.project import make_project
from tests.servers import Outside, Prefect, prefect_server, stage_processes, started, wait_for
from tests.shell import dvc, environment, git, lock, run

pytestmark = pytest.mark.slow

ENDLESS = 'overrides=["train.steps=1000000"]'


def flow(folder: Path, name: str, *arguments: str, **more: str) -> tuple[int, str]:
    """Run `python -m flows.NAME` in a project; exit code and what it printed."""
    done = run(folder, f"flows.{name}", *arguments, **more)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("flows")


@pytest.fixture(scope="module")
def project(folder: Path) -> Path:
    """A committed project whose schedule is due every minute."""
    project = folder / "project"
    make_project(project)
    schedule = (project / "prefect.yaml").read_text()
    assert 'cron: "0 2 * * *"' in schedule
    (project / "prefect.yaml").write_text(schedule.replace("0 2 * * *", "* * * * *"))
    git(project, "init", "--quiet")
    git(project, "add", ".")
    git(project, "commit", "--quiet", "--message", "start")
    return project


@pytest.fixture(scope="module")
def outside() -> Iterator[Outside]:
    """What any process asks of other machines."""
    with Outside() as outside:
        yield outside


@pytest.fixture(scope="module")
def server(project: Path, folder: Path, outside: Outside) -> Iterator[Prefect]:
    """A Prefect server that has the project's deployments."""
    with prefect_server(project, folder, **outside.env) as server:
        # Creating a pool makes the server look for a newer list of pool types, here in vain.
        outside.asked.clear()
        server.run(project, "deploy", "--all")
        yield server


def test_a_scheduled_run_works_at_the_deployed_commit_and_completes(
    project: Path, server: Prefect
) -> None:
    (project / "params.yaml").write_text((project / "params.yaml").read_text() + "\n# later\n")
    deployed = {d["entrypoint"].rpartition(":")[2]: d for d in server.post("/deployments/filter")}
    assert deployed.keys() == {"pipeline", "sweep", "branch"}
    assert deployed["pipeline"]["global_concurrency_limit"]["limit"] == 1
    assert deployed["branch"]["global_concurrency_limit"] is None
    try:
        with server.worker("scheduled"):
            run = wait_for(
                "a scheduled run that completed",
                lambda: server.runs("pipeline/emloc", "COMPLETED"),
                seconds=600,
            )[0]
    finally:
        git(project, "checkout", "--quiet", "params.yaml")
        server.run(project, "deployment", "schedule", "pause", "--all")
    assert run["auto_scheduled"]
    states = server.stages(run["id"])
    assert states["evaluate@0.5"] == states["report"] == "Ran"
    assert states["track@0.5"] == states["track@0.8"] == "Logged"
    # The clone is gone; cache and MLflow store of the checkout have it all.
    assert (project / "mlflow.db").exists()
    assert not (project / "dvc.lock").exists()
    shown = server.post("/artifacts/filter")
    assert any("original + corrected" in str(artifact["data"]) for artifact in shown)
    assert any(str(artifact["data"]).startswith("data:image/png") for artifact in shown)


def test_nothing_was_asked_of_other_machines(server: Prefect, outside: Outside) -> None:
    assert server.runs("pipeline/emloc", "COMPLETED")
    assert outside.asked == []
    with pytest.raises(OSError):
        urllib.request.build_opener(
            urllib.request.ProxyHandler({"http": outside.env["http_proxy"]})
        ).open("http://example.org/")
    assert outside.asked == ["GET http://example.org/ HTTP/1.1"]


def test_one_run_alone_takes_all_from_the_cache(project: Path, server: Prefect) -> None:
    code, printed = flow(project, "pipeline")
    assert code == 0, printed
    assert "17 stages: 0 ran, 17 restored, 0 unchanged." in printed
    assert (project / "report/report.md").exists()
    code, printed = flow(project, "pipeline")
    assert "0 ran, 0 restored, 17 unchanged." in printed
    assert "Logged" not in printed


@pytest.mark.parametrize(
    ("parameter", "problem"),
    [
        ("ratio=0.5", "not found on the deployment: 'ratio'"),
        ("ratios=[1.5]", "1.5 is greater than or equal to the maximum of 1"),
        ("parallel=0", "0 is less than the minimum of 1"),
    ],
)
def test_a_deployment_refuses_parameters_that_it_does_not_know(
    project: Path, server: Prefect, parameter: str, problem: str
) -> None:
    printed = server.run(project, "deployment", "run", "pipeline/emloc", "-p", parameter, ok=False)
    assert problem in " ".join(printed.split())


def test_a_changed_file_is_not_deployed(project: Path, server: Prefect) -> None:
    text = (project / "params.yaml").read_text()
    try:
        (project / "params.yaml").write_text(text.replace("seed: 0", "seed: 1"))
        printed = server.run(project, "deploy", "--all", ok=False)
        assert "params.yaml differ" in printed
        assert "commit the changes and deploy again" in printed
    finally:
        (project / "params.yaml").write_text(text)


def test_a_cancelled_run_ends_its_stage_and_the_next_goes_on(
    project: Path, server: Prefect
) -> None:
    with server.worker("cancelled"):
        run = server.start(project, "pipeline/emloc", ENDLESS, "ratios=[0.8]")
        wait_for("training", lambda: stage_processes(server.folder, "train"), seconds=300)
        saved = project / ".emloc/checkpoints"
        wait_for("a checkpoint", lambda: list(saved.glob("0.8-*/checkpoint-*")), seconds=120)
        server.run(project, "flow-run", "cancel", run)
        assert server.ended(run, seconds=120)["state_type"] == "CANCELLED"
        assert not stage_processes(server.folder, "train")
    assert list(saved.glob("0.8-*/checkpoint-*"))


def test_ctrl_c_ends_the_stage_at_once(project: Path, folder: Path, server: Prefect) -> None:
    options = ["--ratio", "0.8", "--set", "train.steps=1000000"]
    clone = folder / "interrupted"
    git(project, "clone", "--quiet", str(project), str(clone))
    command = [sys.executable, "-m", "flows.pipeline", *options]
    with started(command, clone, environment(folder), folder / "interrupted.log") as process:
        wait_for("training", lambda: stage_processes(clone, "train"), seconds=300)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=15) == 130
        assert not stage_processes(clone, "train")


def test_a_branch_that_fails_leaves_the_others_and_a_rerun_goes_on(
    project: Path, folder: Path, server: Prefect
) -> None:
    clone = folder / "failing"
    git(project, "clone", "--quiet", str(project), str(clone))
    git(clone, "config", "user.name", "test")
    dvc(clone, "cache", "dir", "--local", str(project / ".dvc/cache"))
    obstacle = clone / "artifacts/adapters/0.5"
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("a file where a folder should be")
    options = ["--set", "train.seed=1", "--parallel", "2", "--no-track"]
    code, printed = flow(clone, "pipeline", *options)
    assert code == 1
    assert (
        "train@0.5 failed" in printed and "Not begun: correct@0.5, evaluate@0.5, report" in printed
    )
    assert (clone / "results/0.8/evaluate.json").exists()
    obstacle.unlink()
    code, printed = flow(clone, "pipeline", *options)
    assert code == 0, printed
    assert lock(clone)["train@0.5"]["params"]["params.yaml"]["train"]["seed"] == 1
    running = [line for line in printed.splitlines() if "Running stage" in line]
    assert {line.split("'")[-2] for line in running} == {
        "train@0.5",
        "correct@0.5",
        "evaluate@0.5",
        "report",
    }


def test_no_server_is_one_sentence(project: Path) -> None:
    code, printed = flow(project, "sweep")
    assert code == 1
    assert printed.startswith("error: A sweep hands its branches to workers")
    code, printed = flow(project, "pipeline", PREFECT_API_URL="http://127.0.0.1:9/api")
    assert code == 1
    assert "error: No Prefect server answers at http://127.0.0.1:9/api" in printed
    assert "Traceback" not in printed


def test_a_remote_that_refuses_is_one_sentence_before_anything_runs(project: Path) -> None:
    config = project / ".dvc/config.local"
    before = config.read_text() if config.exists() else None
    access = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}
    access["AWS_ENDPOINT_URL"] = "http://127.0.0.1:9"
    code, printed = flow(project, "pipeline", "--remote", "s3://bucket/x", **access)
    assert code == 1
    assert "error: The remote (s3://bucket/x) cannot be used: " in printed
    assert "Running stage" not in printed
    assert (config.read_text() if config.exists() else None) == before

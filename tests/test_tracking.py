"""Results logged to a SQLite store of MLflow, without running a stage."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from flows.results import read_branch, read_shared
from flows.store import TrackingError, find_store
from flows.tracking import MissingResultError, log_branch, log_report, ratios_page
from tests.finished import WAYS, change_params, finish, make_finished, write_out

SWITCHES = ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "CI", "GITHUB_ACTIONS")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with results of two ratios."""
    folder = tmp_path_factory.mktemp("finished") / "project"
    make_finished(folder)
    return folder


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database that MLflow made and nothing was logged to: making one takes seconds."""
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def project(
    finished: Path, empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A copy of it, which is the current directory, with a store."""
    folder = tmp_path / "pro ject"
    shutil.copytree(finished, folder)
    shutil.copyfile(empty_store, folder / "mlflow.db")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return folder


def test_the_environment_names_the_store_before_params_yaml(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = find_store()
    assert place.uri == f"sqlite:///{project}/mlflow.db"
    assert (place.folder, place.experiment) == (project, "codespell")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:secret@team:5000")
    place = find_store()
    assert place.uri == "http://someone:secret@team:5000"
    assert (place.shown, place.folder) == ("http://team:5000", None)


@pytest.mark.parametrize("uri", ["./mlruns", "file:///mlruns", "postgresql://me:secret@team/runs"])
def test_other_stores_are_refused_without_showing_a_password(
    project: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(TrackingError, match="^MLFLOW_TRACKING_URI is .*sqlite:///mlflow.db") as no:
        log_branch("0.8")
    assert "secret" not in str(no.value)


def client() -> Any:
    from mlflow import MlflowClient

    return MlflowClient(find_store().uri)


def runs(role: str) -> list[Any]:
    """The runs of a role, finished or not, by name."""
    found = client().search_runs(["1"], f"tags.`emloc.role` = '{role}'")
    return sorted(found, key=lambda run: run.info.run_name)


def test_each_result_is_logged_once_and_the_ratios_have_one_parent(project: Path) -> None:
    assert [log_branch(ratio) for ratio in ("0.8", "0.5", "0.8")] == [True, True, False]
    assert [log_report(), log_report()] == [True, False]
    low, high = runs("ratio")
    (parent,) = runs("parent")
    assert [run.info.run_name for run in (low, high)] == ["ratio 0.5", "ratio 0.8"]
    for run in (low, high):
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.artifact_uri.startswith((project / "mlartifacts").as_uri())
    branch = read_branch("0.5")
    last = {key: points[-1][1] for key, points in branch.curves.items()}
    assert low.data.metrics == branch.metrics | last
    assert low.data.params == {"ratio": "0.5", **branch.params}
    assert low.data.tags["dvc.adapter.corrected"] == branch.hashes["adapter.corrected"]
    history = client().get_metric_history(low.info.run_id, "train/curve/loss")
    assert [(point.step, point.value) for point in history] == branch.curves["train/curve/loss"]
    assert parent.data.params == branch.params
    assert parent.data.metrics.items() >= read_shared().metrics.items()
    assert "|table|" in parent.data.tags["mlflow.note.content"]
    assert "dvc.adapter.raw" not in parent.data.tags


def test_results_that_are_not_current_are_not_logged(project: Path) -> None:
    change_params(lambda params: params["correct"].update(limit=1))
    with pytest.raises(MissingResultError, match="correct in params.yaml is modified"):
        log_branch("0.5")
    with pytest.raises(MissingResultError, match="correct in params.yaml is modified"):
        log_report()
    assert client().get_experiment_by_name("codespell") is None


def test_adapters_samples_and_report_are_in_the_store(project: Path) -> None:
    log_branch("0.5")
    log_report()
    (run,), (parent,) = runs("ratio"), runs("parent")
    for kind in ("raw", "corrected"):
        folder = client().download_artifacts(run.info.run_id, f"adapters/{kind}")
        here = project / f"artifacts/adapters/0.5/{kind}/adapter_model.safetensors"
        assert (Path(folder) / here.name).read_bytes() == here.read_bytes()
    table = json.loads(
        Path(client().download_artifacts(run.info.run_id, "predictions.json")).read_text()
    )
    assert table["columns"] == ["prompt", "answer", *sorted(WAYS)]
    assert table["data"] == [["2a", "aa", *(f"{way}5" for way in sorted(WAYS))]]
    report = Path(client().download_artifacts(parent.info.run_id, "report"))
    assert {file.name for file in report.iterdir()} == {
        "report.md",
        "quality.png",
        "predictions.html",
    }


@pytest.mark.slow
def test_a_changed_report_updates_its_parent_and_repeats_no_metric(project: Path) -> None:
    log_branch("0.8")
    log_report()
    shutil.rmtree("report")
    write_out(Path("report"), "report", 1)
    finish(project)
    assert log_report()
    (parent,) = runs("parent")
    assert "EMLoC report 1" in parent.data.tags["mlflow.note.content"]
    assert parent.data.tags["dvc.report"] == read_shared().hashes["report"]
    for key in ("direct/curve/loss", "baseline/original/loss"):
        points = client().get_metric_history(parent.info.run_id, key)
        assert len(points) == len({point.step for point in points})


@pytest.mark.slow
def test_a_run_that_was_left_unfinished_is_replaced(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    with monkeypatch.context() as broken:
        broken.setattr(MlflowClient, "log_table", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(TrackingError, match=r"\(full\).*python -m flows.track logs them later"):
            log_branch("0.8")
    (failed,) = runs("ratio")
    assert failed.info.status == "FAILED"
    tags = {name: failed.data.tags[name] for name in ("emloc.role", "emloc.key")}
    killed = client().create_run("1", tags=tags)
    (parent,) = runs("parent")
    client().update_run(parent.info.run_id, status="RUNNING")
    assert log_branch("0.8")
    assert runs("parent")[0].info.status == "FINISHED"
    (run,) = runs("ratio")
    assert run.info.status == "FINISHED"
    assert run.info.run_id not in (failed.info.run_id, killed.info.run_id)


@pytest.mark.slow
def test_threads_log_to_a_store_that_nobody_made_before(project: Path) -> None:
    Path("mlflow.db").unlink()
    logged: list[bool] = []
    threads = [
        threading.Thread(target=lambda ratio=ratio: logged.append(log_branch(ratio)))
        for ratio in ("0.8", "0.5", "0.8", "0.5")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(logged) == [False, False, True, True]
    assert (len(runs("ratio")), len(runs("parent"))) == (2, 1)


@pytest.mark.slow
def test_ratios_of_two_parents_are_put_under_the_older_one(project: Path) -> None:
    log_branch("0.8")
    (first,) = runs("parent")
    tags = {name: first.data.tags[name] for name in ("emloc.role", "emloc.group")}
    second = client().create_run("1", tags=tags)
    (child,) = runs("ratio")
    client().set_tag(child.info.run_id, "mlflow.parentRunId", second.info.run_id)
    log_report()
    assert [run.info.run_id for run in runs("parent")] == [first.info.run_id]
    (child,) = runs("ratio")
    assert child.data.tags["mlflow.parentRunId"] == first.info.run_id


def test_a_deleted_experiment_is_named(project: Path) -> None:
    log_branch("0.8")
    client().delete_experiment("1")
    with pytest.raises(TrackingError, match="'codespell' is deleted.*restore --experiment-id 1"):
        log_branch("0.5")


def test_a_store_of_another_mlflow_is_named(project: Path) -> None:
    log_branch("0.8")
    shutil.copyfile("mlflow.db", "newer.db")
    with contextlib.closing(sqlite3.connect("newer.db")) as database:
        database.execute("UPDATE alembic_version SET version_num = 'fromthefuture'")
        database.commit()
    change_params(lambda params: params["mlflow"].update(tracking_uri="sqlite:///newer.db"))
    with pytest.raises(TrackingError, match=r"newer.db was written by another version.*3\.\d+"):
        log_branch("0.8")


def test_the_page_of_the_ratios_is_a_view_saved_with_the_experiment(project: Path) -> None:
    assert "viewStateShareKey" not in ratios_page()
    log_branch("0.8")
    key = ratios_page().partition("viewStateShareKey=")[2].partition("&")[0]
    view = json.loads(client().get_experiment("1").tags[f"mlflow.sharedViewState.{key}"])
    state = json.loads(view["state"])
    found = client().search_runs(["1"], state["searchFilter"], order_by=[state["orderByKey"]])
    assert [run.info.run_name for run in found] == ["ratio 0.8"]


def test_nothing_is_reported_to_the_makers_of_mlflow() -> None:
    code = "import flows.tracking, mlflow.telemetry.utils as t; print(t.is_telemetry_disabled())"
    clean = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True)
    assert done.stdout.split() == ["True"], done.stderr

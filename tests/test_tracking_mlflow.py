"""The pipeline's real results in MLflow: python -m flows.track after dvc repro on a tiny model."""

from __future__ import annotations

import json
import os
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.answers import score_answers
from tasks.params import load_params
from tests.project import write_params
from tests.servers import environment, free_port, started, wait_for
from tests.shell import clone, dvc, read_params, run

pytest_plugins = "tests.reproduced"
pytestmark = pytest.mark.slow


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store that all projects of a test log to."""
    uri = f"sqlite:///{tmp_path}/store/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


def track(folder: Path) -> tuple[int, str]:
    """Run `python -m flows.track` in a project on the store of the test: its exit code and what it
    printed."""
    done = run(folder, "flows.track", MLFLOW_TRACKING_URI=os.environ["MLFLOW_TRACKING_URI"])
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


def search(filter_string: str = "") -> list[dict[str, Any]]:
    """The runs of the store as anyone searches for them."""
    import mlflow

    return mlflow.search_runs(
        experiment_names=["codespell"], filter_string=filter_string, output_format="list"
    )


def ratios() -> dict[str, Any]:
    """The newest run of each ratio, by the ratio."""
    return {run.data.params["ratio"]: run for run in reversed(search("params.ratio LIKE '%'"))}


def restored_clone(project: Path, target: Path, **changes: Any) -> Path:
    """A clone that shares the project's DVC cache, after `dvc repro` with changed params."""
    cloned = clone(project, target, {**read_params(project), **changes})
    dvc(cloned, "cache", "dir", "--local", str(project / ".dvc/cache"))
    dvc(cloned, "repro")
    return cloned


def test_a_restored_result_is_not_logged_again(project: Path, store: str, tmp_path: Path) -> None:
    code, printed = track(project)
    assert (code, printed.count(": logged")) == (0, 3)
    before = {run.info.run_id for run in search()}
    assert len(before) == 3

    cloned = restored_clone(project, tmp_path / "clone")
    for place in (project, cloned):
        code, printed = track(place)
        assert (code, printed.count(": already there")) == (0, 3), printed
    assert {run.info.run_id for run in search()} == before


def test_search_runs_has_a_row_a_ratio_with_the_metrics_of_the_stages(
    project: Path, store: str
) -> None:
    track(project)
    found = ratios()
    assert set(found) == {str(ratio) for ratio in read_params(project)["ratios"]}
    for ratio, logged in found.items():
        scores = json.loads((project / f"results/{ratio}/evaluate.json").read_text())
        for way, values in scores.items():
            for metric, value in values.items():
                assert logged.data.metrics[f"evaluate/{way}/{metric}"] == value
    (parent,) = search("tags.`emloc.role` = 'parent'")
    baseline = json.loads((project / "results/baseline/baseline.json").read_text())
    assert parent.data.metrics["baseline/original/loss"] == baseline["original"]["loss"]


def test_downloaded_adapters_score_as_recorded_on_the_original(
    project: Path, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    track(project)
    logged = ratios()["0.5"]
    monkeypatch.chdir(project)
    original = read_params(project)["model"]["source"]
    losses = []
    for kind in ("raw", "corrected"):
        adapter = MlflowClient().download_artifacts(logged.info.run_id, f"adapters/{kind}")
        scores = score_answers(
            Path(original),
            Path(adapter),
            load_params(),
            label=kind,
            predictions=tmp_path / kind,
            device=torch.device("cpu"),
        )
        for metric, value in scores.items():
            recorded = logged.data.metrics[f"evaluate/original-{kind}/{metric}"]
            assert value == pytest.approx(recorded, rel=1e-5)
        losses.append(scores["loss"])
    assert losses[0] != losses[1]


def test_a_ratio_that_is_added_later_joins_its_parent(
    project: Path, store: str, tmp_path: Path
) -> None:
    track(project)
    (parent,) = search("tags.`emloc.role` = 'parent'")
    cloned = restored_clone(project, tmp_path / "clone", ratios=[0.8, 0.5, 0.3])
    _, printed = track(cloned)
    assert "ratio 0.8: already there" in printed
    assert "ratio 0.3: logged" in printed
    assert "report: logged" in printed
    assert {run.data.tags["mlflow.parentRunId"] for run in ratios().values()} == {
        parent.info.run_id
    }
    (after,) = search("tags.`emloc.role` = 'parent'")
    assert after.info.run_id == parent.info.run_id
    assert "0.3" in after.data.tags["mlflow.note.content"]


def test_changed_params_give_runs_of_another_group(
    project: Path, store: str, tmp_path: Path
) -> None:
    track(project)
    first = ratios()
    cloned = restored_clone(project, tmp_path / "clone", correct={"limit": 1})
    code, printed = track(cloned)
    assert (code, printed.count(": logged")) == (0, 3)
    second = ratios()
    assert len(search("tags.`emloc.role` = 'ratio'")) == 4
    for ratio, changed in second.items():
        assert changed.data.params["correct.limit"] == "1"
        assert changed.data.tags["emloc.group"] != first[ratio].data.tags["emloc.group"]
        assert changed.data.tags["dvc.emulator"] == first[ratio].data.tags["dvc.emulator"]
    assert len(search("tags.`emloc.role` = 'parent'")) == 2


def test_results_that_params_yaml_no_longer_asks_for_are_not_logged(
    project: Path, store: str, tmp_path: Path
) -> None:
    cloned = restored_clone(project, tmp_path / "clone")
    write_params(cloned, {**read_params(project), "correct": {"limit": 1}})
    code, printed = track(cloned)
    assert code == 1
    assert "correct in params.yaml is modified" in printed
    assert "error: There are no results to log: run dvc repro." in printed
    dvc(cloned, "repro", "evaluate@0.8")
    code, printed = track(cloned)
    assert code == 0
    assert "ratio 0.8: logged" in printed
    assert "ratio 0.5: The result" in printed


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a running MLflow server, which the environment names."""
    folder = tmp_path / "server"
    folder.mkdir()
    url = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    command = ["mlflow", "server", "--workers", "1", "--port", url.rpartition(":")[2]]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}

    def healthy() -> bool:
        try:
            with urllib.request.urlopen(f"{url}/health") as answer:
                return answer.status == 200
        except OSError:
            return False

    with started(command, folder, environment(folder, **quiet), folder / "server.log"):
        wait_for("the MLflow server", healthy, seconds=90)
        yield folder


def test_a_server_keeps_runs_and_adapters(project: Path, server: Path) -> None:
    code, printed = track(project)
    assert (code, printed.count(": logged")) == (0, 3), printed
    code, printed = track(project)
    assert (code, printed.count(": already there")) == (0, 3)
    (corrected,) = (server / "mlartifacts").glob(
        f"*/{ratios()['0.5'].info.run_id}/artifacts/adapters/corrected/*.safetensors"
    )
    here = project / "artifacts/adapters/0.5/corrected/adapter_model.safetensors"
    assert corrected.read_bytes() == here.read_bytes()


def test_a_server_that_does_not_answer_is_one_sentence(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    started = time.monotonic()
    code, printed = track(project)
    assert code == 1
    assert "error: No MLflow server answers at http://127.0.0.1:9: start it" in printed
    assert time.monotonic() - started < 60  # MLflow's own retries take minutes

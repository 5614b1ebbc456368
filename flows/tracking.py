"""MLflow: the results of each ratio as a run, the ratios that belong together under a parent.

- `log_branch`: one ratio, once for each result, however often that is restored
- `log_report`: the report and what the ratios are compared with, on the parent
- `ratios_page`: the page of MLflow's UI that compares the ratios

They work on the project in the current directory and on the experiment that its params.yaml names.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flows.results import ResultError, Results, read_branch, read_samples, read_shared
from flows.stages import LOCK, StageError
from flows.store import TrackingError, open_store
from flows.workspace import changed_files, commit

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["MissingResultError", "TrackingError", "log_branch", "log_report", "ratios_page"]

_VIEW = "ratios"  # a view of MLflow's UI, saved with the experiment
_VIEW_TAG = f"mlflow.sharedViewState.{_VIEW}"
_METRICS_A_BATCH, _PARAMS_A_BATCH = 1000, 100
_NOTE_LENGTH = 5000


class MissingResultError(TrackingError):
    """There is no current result to log; the message says in a sentence what it lacks."""


def log_branch(ratio: str) -> bool:
    """Log the results of one ratio; False if they are logged already.

    Raises:
        MissingResultError: there is no current result.
        TrackingError: MLflow's store cannot be used.
    """
    branch = _read(lambda: read_branch(str(ratio)))
    with open_store() as opened:
        runs = _Runs(*opened)
        found = runs.find(role="ratio", key=branch.key)
        if any(run.info.status == "FINISHED" for run in found):
            return False
        for run in found:
            runs.client.delete_run(run.info.run_id)
        with runs.ratio(branch) as run_id:
            runs.log_params(run_id, {"ratio": str(branch.ratio), **branch.params})
            runs.log_metrics(run_id, branch)
            for kind in ("raw", "corrected"):
                folder = branch.folders[f"adapter.{kind}"]
                runs.client.log_artifacts(run_id, str(folder), f"adapters/{kind}")
            runs.log_samples(run_id, branch)
        runs.save_view(branch)
    return True


def log_report() -> bool:
    """Bring the parent of the current ratios up to date; False if it was.

    It gets the report, the metrics of the original alone and of direct LoRA, and all runs of its
    ratios.

    Raises:
        MissingResultError, TrackingError: see `log_branch`.
    """
    shared = _read(read_shared)
    with open_store() as opened:
        runs = _Runs(*opened)
        parent = runs.parent(shared)
        run_id = parent.info.run_id
        runs.gather(shared.group, run_id)
        if parent.data.tags.get("emloc.key") == shared.key:
            return False
        runs.log_metrics(run_id, shared, known=parent.data.metrics)
        runs.client.log_artifacts(run_id, str(shared.folders["report"]), "report")
        runs.log_samples(run_id, shared)
        page = (shared.folders["report"] / "report.md").read_text(encoding="utf-8")
        note = page.partition("\n## ")[0][:_NOTE_LENGTH]
        runs.set_tags(run_id, {**_tags_of(shared), "mlflow.note.content": note})
        runs.set_tags(run_id, {"emloc.key": shared.key})
        runs.client.set_terminated(run_id)
    return True


def ratios_page() -> str:
    """The path of the page in MLflow's UI that has the ratios side by side.

    Raises:
        TrackingError: MLflow's store cannot be used.
    """
    with open_store() as (client, experiment):
        page = f"/#/experiments/{experiment}/runs?workflowType=machine_learning"
        saved = _VIEW_TAG in client.get_experiment(experiment).tags
        return f"{page}&viewStateShareKey={_VIEW}&compareRunsMode=CHART" if saved else page


def _read(read: Callable[[], Results]) -> Results:
    try:
        return read()
    except (ResultError, StageError) as error:
        raise MissingResultError(str(error)) from error


@dataclass(frozen=True)
class _Runs:
    """The runs of an experiment. Every call names its run: threads do not mind each other."""

    client: MlflowClient
    experiment: str

    def find(self, **tags: str) -> list[Any]:
        """The runs with these emloc tags, oldest first."""
        wanted = " and ".join(f"tags.`emloc.{name}` = '{value}'" for name, value in tags.items())
        found: list[Any] = []
        token = None
        while True:
            page = self.client.search_runs([self.experiment], wanted, page_token=token)
            found += page
            if not (token := page.token):
                return sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))

    def parent(self, results: Results) -> Any:
        """The run of the results' group; the oldest, should two machines have made one at once."""
        if not self.find(role="parent", group=results.group):
            name = results.model.rpartition("/")[2].removesuffix(".gguf")
            common = replace(results, hashes={}, machine={})
            self.create(f"{name} {results.group[:8]}", "parent", common, {})
        parent = self.find(role="parent", group=results.group)[0]
        if parent.info.status != "FINISHED":
            self.log_params(parent.info.run_id, results.params)
            self.client.set_terminated(parent.info.run_id)
        return parent

    def gather(self, group: str, parent: str) -> None:
        """Put all ratios of a group under one parent, and remove its other parents."""
        for run in self.find(role="ratio", group=group):
            if run.data.tags.get("mlflow.parentRunId") != parent:
                self.client.set_tag(run.info.run_id, "mlflow.parentRunId", parent)
        for run in self.find(role="parent", group=group):
            if run.info.run_id != parent:
                self.client.delete_run(run.info.run_id)

    def create(self, name: str, role: str, results: Results, tags: Mapping[str, str]) -> str:
        own = {"emloc.role": role, "emloc.group": results.group, **_tags_of(results), **tags}
        return self.client.create_run(self.experiment, run_name=name, tags=own).info.run_id

    @contextlib.contextmanager
    def ratio(self, branch: Results) -> Iterator[str]:
        """A run that is finished when the block ends, or failed when it raises."""
        tags = {
            "emloc.ratio": str(branch.ratio),
            "emloc.key": branch.key,
            "mlflow.parentRunId": self.parent(branch).info.run_id,
        }
        run_id = self.create(f"ratio {branch.ratio}", "ratio", branch, tags)
        try:
            yield run_id
        except BaseException:
            with contextlib.suppress(Exception):
                self.client.set_terminated(run_id, "FAILED")
            raise
        self.client.set_terminated(run_id)

    def log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        entries = [Param(key, value) for key, value in params.items()]
        for start in range(0, len(entries), _PARAMS_A_BATCH):
            self.client.log_batch(run_id, params=entries[start : start + _PARAMS_A_BATCH])

    def log_metrics(
        self, run_id: str, results: Results, known: Mapping[str, float] | None = None
    ) -> None:
        """Log metrics and curves, but for those whose last value is known."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = {key: [(0, value)] for key, value in results.metrics.items()} | results.curves
        entries = [
            Metric(key, value, now, step)
            for key, values in points.items()
            if (known or {}).get(key) != values[-1][1]
            for step, value in values
        ]
        for start in range(0, len(entries), _METRICS_A_BATCH):
            self.client.log_batch(run_id, entries[start : start + _METRICS_A_BATCH])

    def log_samples(self, run_id: str, results: Results) -> None:
        """A table of answers, or the pictures that were drawn."""
        folder = results.folders["predictions"]
        if samples := read_samples(folder):
            self.client.log_table(run_id, samples, "predictions.json")
        else:
            self.client.log_artifacts(run_id, str(folder), "pictures")

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def save_view(self, branch: Results) -> None:
        """A view for MLflow's UI with one row a ratio and the columns to compare, if there is
        none."""
        if _VIEW_TAG in self.client.get_experiment(self.experiment).tags:
            return
        compared = [key for key in branch.metrics if key.startswith("evaluate/")]
        compared += ["compress/emulator_bytes", "system/train_peak_gib", "system/train_seconds"]
        columns = ["params.`ratio`", *(f"metrics.`{key}`" for key in compared)]
        state = {
            "searchFilter": "tags.`emloc.role` = 'ratio'",
            "orderByKey": "params.`ratio`",
            "orderByAsc": False,
            "selectedColumns": columns,
        }
        now = int(time.time() * 1000)
        view = {"name": "Ratios", "createdAt": now, "updatedAt": now, "state": json.dumps(state)}
        self.client.set_experiment_tag(self.experiment, _VIEW_TAG, json.dumps(view))


def _tags_of(results: Results) -> dict[str, str]:
    """What the results come from: model, machine, DVC's hashes, the commit."""
    tags = {"emloc.model": results.model, "mlflow.source.name": "dvc repro"}
    tags |= {f"machine.{name}": value for name, value in results.machine.items()}
    tags |= {f"dvc.{name}": value for name, value in results.hashes.items()}
    with contextlib.suppress(OSError, KeyError):  # a user id without a name
        tags["mlflow.user"] = getpass.getuser()
    if revision := commit():
        tags["mlflow.source.git.commit"] = revision
    if changed := [file for file in changed_files() if file != str(LOCK)]:
        tags["emloc.changed_files"] = ", ".join(changed)
    return tags

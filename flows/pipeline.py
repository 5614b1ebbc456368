"""The whole pipeline as a Prefect flow: python -m flows.pipeline

Every stage is a task: its log as it comes, its state (ran, restored or unchanged), its seconds. The
branches of the ratios run side by side up to a limit; a branch that fails leaves the others alone,
and the same command later goes on from there.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Annotated, Any

import typer
from prefect import flow
from prefect.artifacts import create_image_artifact, create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.runtime import deployment
from prefect.states import Completed, Failed
from pydantic import Field
from tabulate import tabulate

from flows import workspace
from flows.command import OverrideOption, ParallelOption, RatioOption, TrackOption, run_flow
from flows.graph import Step, Summary, patient_task, run_steps, stage_steps, stopping_stages
from flows.remotes import choose_remote, forget_repeated_runs
from flows.stages import Stage, StageError, read_graph, read_lock, run_dvc

REPORT = Path("report")

Ratio = Annotated[float, Field(gt=0, lt=1)]
Ratios = Annotated[list[Ratio], Field(min_length=1)]
Override = Annotated[str, Field(pattern=r"^[\w.~+]+=.*$")]


@flow(name="pipeline")
def pipeline(
    ratios: Ratios | None = None,
    overrides: list[Override] | None = None,
    remote: str | None = None,
    parallel: Annotated[int, Field(ge=1)] = 1,
    track: bool = True,
) -> State[Any]:
    """Bring every stage up to date, and log the results to MLflow.

    Args:
        ratios: instead of those in params.yaml.
        overrides: other values for params.yaml, KEY=VALUE.
        remote: DVC remote, a name or a URL, to look in first and to push to; None: none.
        parallel: stages that may run at the same time.
        track: log to MLflow.
    """
    log = get_run_logger()
    with stopping_stages():
        try:
            set_up(ratios, overrides, track=track)
            if remote is not None:
                choose_remote(remote, log=log.info)
            graph = read_graph()
        except (StageError, ValueError) as error:
            return Failed(message=str(error))
        steps = stage_steps(graph, set(graph), pull=remote is not None)
        steps |= result_steps(graph, set(graph), track=track, share=remote is not None)
        summary = run_steps(steps, parallel=parallel)
        publish(summary)
        log.info(summary.sentence())
        return ending(summary)


def set_up(ratios: Ratios | None, overrides: list[Override] | None, *, track: bool) -> None:
    """Make the working tree what a flow's parameters ask for.

    Raises:
        StageError, ValueError: one sentence.
    """
    if deployment.id:
        workspace.check_clean()
        workspace.share_state(get_run_logger().info)
        if track:
            workspace.share_store()
    workspace.set_params(ratios, overrides or [])


def _track(ratio: str | None) -> State[Any]:
    """Log a branch, or the report, to MLflow, unless it is there already."""
    from flows.tracking import TrackingError, log_branch, log_report

    try:
        logged = log_report() if ratio is None else log_branch(ratio)
    except TrackingError as error:
        return Failed(message=str(error))
    return Completed(name="Logged" if logged else "Unchanged")


def _push(names: str) -> State[Any]:
    """Push what stages made, what they needed, and the run cache, to the default remote."""
    forget_repeated_runs(read_lock())
    lines = run_dvc("push", "--run-cache", "--with-deps", *names.split(), log=get_run_logger().info)
    return Completed(name="Pushed", message=lines[-1] if lines else None)


_track_branch = patient_task(_track, "track@{ratio}")
_track_report = patient_task(_track, "track")
push = patient_task(_push, "push {names}")


def result_steps(
    graph: dict[str, Stage], names: set[str], *, track: bool, share: bool
) -> dict[str, Step]:
    """Steps after the stages: log each branch and the report, and push both."""
    steps = {}
    for name, stage in graph.items():
        ratio = stage.ratio
        if name not in names or stage.kind not in ("evaluate", "report"):
            continue
        suffix = f"@{ratio}" if ratio else ""
        if track:
            logging = _track_branch if ratio else _track_report
            steps[f"track{suffix}"] = _after(name, logging, ratio)
        if share:
            steps[f"push{suffix}"] = _after(name, push, name)
    return steps


def _after(name: str, work: Any, argument: Any) -> Step:
    return Step(frozenset({name}), lambda needed: work.submit(argument, wait_for=needed))


def publish(summary: Summary) -> None:
    """Prefect artifacts: a table of the stages with the report's own, and its picture."""
    rows = [
        (f"`{name}`", outcome.state, f"{outcome.seconds:.1f}")
        for name, outcome in summary.outcomes.items()
        if outcome
    ]
    rows += [(f"`{name}`", f"failed: {cause}", "") for name, cause in summary.failed.items()]
    rows += [(f"`{name}`", "not begun", "") for name in summary.skipped]
    parts = [tabulate(rows, ("stage", "state", "seconds"), tablefmt="github")]
    page = REPORT / "report.md"
    if "report" in summary.outcomes and page.exists():
        parts.insert(0, page.read_text(encoding="utf-8").partition("\n## ")[0])
        picture = base64.b64encode((REPORT / "quality.png").read_bytes()).decode()
        create_image_artifact(
            key="quality",
            image_url=f"data:image/png;base64,{picture}",
            description="Quality against ratio",
        )
    create_markdown_artifact(key="report", markdown="\n\n".join(parts))


def ending(summary: Summary) -> State[Any]:
    """The state that a flow with this summary ends in."""
    kind = Failed if summary.failed else Completed
    return kind(message=summary.sentence())


def main(
    ratio: RatioOption = None,
    overrides: OverrideOption = None,
    remote: Annotated[
        str | None, typer.Option(help="DVC remote (name or URL) to pull from and push to")
    ] = None,
    parallel: ParallelOption = 1,
    track: TrackOption = True,
) -> None:
    """Run all stages that are not up to date, and log the results to MLflow."""
    run_flow(
        pipeline, ratios=ratio, overrides=overrides, remote=remote, parallel=parallel, track=track
    )


if __name__ == "__main__":
    typer.run(main)

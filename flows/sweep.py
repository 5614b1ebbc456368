"""A sweep over several machines as Prefect flows: python -m flows.sweep

The sweep brings the stages that no ratio changes up to date and pushes them to a DVC remote; then
each ratio is a run of the deployment branch/emloc, which a worker anywhere takes, builds in a clone
of its own and pushes; the sweep collects from the remote and computes nothing but the report.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.states import Cancelling, Failed
from pydantic import Field

from flows import workspace
from flows.command import OverrideOption, ParallelOption, RatioOption, TrackOption, run_flow
from flows.graph import Step, Summary, run_steps, stage_steps, stopping_stages
from flows.pipeline import (
    Override,
    Ratio,
    Ratios,
    ending,
    publish,
    push,
    result_steps,
    set_up,
)
from flows.remotes import Remote, choose_remote
from flows.stages import Stage, StageError, ancestors, forget, read_graph

BRANCH = "branch/emloc"
_POLL_SECONDS = 3.0
_NO_DEPLOYMENT = (
    f"There is no deployment {BRANCH}: run prefect deploy --all, start a worker (prefect worker "
    "start --pool emloc), and sweep again."
)


@flow(name="branch", flow_run_name="branch {ratio}")
def branch(
    ratio: Ratio,
    remote: str | None = None,
    params: dict[str, Any] | None = None,
    commit: str | None = None,
) -> State[Any]:
    """Build one ratio, up to its scores, from what the remote has, and push it.

    Args:
        ratio: of the emulator.
        remote: DVC remote, a name or a URL; None: the project's default one.
        params: what params.yaml is to hold; None: what the commit has.
        commit: that the sweep works on; another one here is refused.
    """
    with stopping_stages():
        try:
            _check_commit(commit)
            set_up(None, None, track=False)
            workspace.write_params({**(params or workspace.read_params()), "ratios": [ratio]})
            choose_remote(remote, log=get_run_logger().info)
            graph = read_graph()
            forget(set(graph))
        except (StageError, ValueError) as error:
            return Failed(message=str(error))
        last = f"evaluate@{ratio}"
        names = ancestors(graph, [last])
        steps = stage_steps(graph, names, pull=True)
        steps |= result_steps(graph, names, track=False, share=True)
        summary = run_steps(steps, parallel=1)
        return ending(summary)


@flow(name="sweep")
def sweep(
    ratios: Ratios | None = None,
    overrides: list[Override] | None = None,
    remote: str | None = None,
    parallel: Annotated[int, Field(ge=1)] = 1,
    track: bool = True,
) -> State[Any]:
    """Build every ratio on the workers of branch/emloc, and collect and log the results here.

    Args:
        ratios: instead of those in params.yaml.
        overrides: other values for params.yaml, KEY=VALUE.
        remote: DVC remote, a name or a URL, that all machines reach; None: the default one.
        parallel: stages that may run at the same time here.
        track: log to MLflow.
    """
    with stopping_stages():
        try:
            workspace.check_clean(besides=["params.yaml", "dvc.lock"])
            set_up(ratios, overrides, track=track)
            _check_runs_kept(choose_remote(remote, log=get_run_logger().info))
            graph = read_graph()
        except (StageError, ValueError) as error:
            return Failed(message=str(error))
        summary = run_steps(_first_steps(graph), parallel=parallel)
        if not summary.failed:
            here = {"params": workspace.read_params(), "commit": workspace.commit()}
            try:
                failed = _build_branches(graph, {"remote": remote, **here})
            except ObjectNotFound:
                return Failed(message=_NO_DEPLOYMENT)
            summary = _collect(graph, failed, parallel=parallel, track=track)
            publish(summary)
        get_run_logger().info(summary.sentence())
        return ending(summary)


def _check_runs_kept(remote: Remote) -> None:
    if not remote.keeps_runs:
        raise ValueError(
            f"{remote} keeps no record of runs, through which the machines of a sweep find each "
            "other's results: use a folder, S3, ssh or another remote that can be written to."
        )


def _check_commit(expected: str | None) -> None:
    here = workspace.commit()
    if expected is not None and expected != here:
        raise ValueError(
            f"The sweep works on commit {expected}, but this deployment on {here}: run prefect "
            "deploy --all for both at the same commit, and sweep again."
        )


def _first_steps(graph: dict[str, Stage]) -> dict[str, Step]:
    """The stages that no ratio changes, and what pushes them."""
    names = {n for n in graph if not any(graph[needed].ratio for needed in ancestors(graph, [n]))}
    steps = stage_steps(graph, names, pull=True)
    last = frozenset(names - {needed for n in names for needed in graph[n].needs})
    steps["push"] = Step(last, lambda needed: push.submit(" ".join(sorted(last)), wait_for=needed))
    return steps


def _build_branches(graph: dict[str, Stage], parameters: dict[str, Any]) -> dict[str, str]:
    """Run the deployment once a ratio, side by side; ratio → cause of those that failed."""
    runs: dict[str, FlowRun] = {}
    with get_client(sync_client=True) as client, _cancelling(client, runs):
        for stage in graph.values():
            if stage.kind == "evaluate" and stage.ratio:
                runs[stage.ratio] = run_deployment(
                    BRANCH,
                    parameters={**parameters, "ratio": float(stage.ratio)},
                    flow_run_name=f"branch {stage.ratio}",
                    timeout=0,
                )
        states = _wait(client, runs)
    failed = {ratio: state for ratio, state in states.items() if not state.is_completed()}
    return {ratio: state.message or state.name for ratio, state in failed.items()}


def _wait(client: SyncPrefectClient, runs: dict[str, FlowRun]) -> dict[str, State[Any]]:
    """The last state of each run; a change of state is logged."""
    log = get_run_logger()
    shown: dict[str, str] = {}
    states: dict[str, State[Any]] = {}
    while len(states) < len(runs):
        time.sleep(_POLL_SECONDS)
        for ratio in runs.keys() - states.keys():
            state = client.read_flow_run(runs[ratio].id).state
            if state is None:
                continue
            if shown.get(ratio) != state.name:
                shown[ratio] = state.name
                hint = ": is a worker running? prefect worker start --pool emloc"
                log.info(f"branch {ratio}: {state.name}{hint if state.name == 'Late' else ''}")
            if state.is_final():
                states[ratio] = state
    return states


def _collect(
    graph: dict[str, Stage], failed: dict[str, str], *, parallel: int, track: bool
) -> Summary:
    """Take from the remote all that does not need a branch that failed, and report on it."""
    forget({name for name, stage in graph.items() if stage.ratio})
    lost = {name for name, stage in graph.items() if stage.ratio in failed}
    left = {name for name in graph if ancestors(graph, [name]) & lost}
    names = set(graph) - left
    steps = stage_steps(graph, names, pull=True)
    steps |= result_steps(graph, names, track=track, share=True)
    summary = run_steps(steps, parallel=parallel)
    summary.failed |= {f"branch {ratio}": cause for ratio, cause in failed.items()}
    summary.skipped = sorted({*summary.skipped, *left})
    return summary


@contextlib.contextmanager
def _cancelling(client: SyncPrefectClient, runs: dict[str, FlowRun]) -> Iterator[None]:
    """When the sweep is interrupted or cancelled, cancel its branches too."""
    try:
        yield
    except BaseException:
        for run in runs.values():
            state = client.read_flow_run(run.id).state
            if state is None or not state.is_final():
                client.set_flow_run_state(run.id, Cancelling(message="The sweep was stopped."))
        raise


def main(
    ratio: RatioOption = None,
    overrides: OverrideOption = None,
    remote: Annotated[
        str | None, typer.Option(help="DVC remote (name or URL) that all machines reach")
    ] = None,
    parallel: ParallelOption = 1,
    track: TrackOption = True,
) -> None:
    """Build every ratio on workers, then collect and log the results here."""
    run_flow(
        sweep,
        needs_server=True,
        ratios=ratio,
        overrides=overrides,
        remote=remote,
        parallel=parallel,
        track=track,
    )


if __name__ == "__main__":
    typer.run(main)

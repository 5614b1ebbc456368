"""What is logged to MLflow without a flow: python -m flows.track --help."""

from __future__ import annotations

import os
import socket
import sys
from typing import Annotated

import typer

from flows.stages import StageError, read_graph
from flows.store import find_store
from flows.tracking import MissingResultError, TrackingError, log_branch, log_report, ratios_page

app = typer.Typer(invoke_without_command=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def track(context: typer.Context) -> None:
    """Log the results that are here to MLflow, each ratio once; with `ui`, look at them.

    For results that no flow logged: those of dvc repro, or of a teammate's remote.
    """
    if context.invoked_subcommand is not None:
        return
    ratios = [stage.ratio for stage in read_graph().values() if stage.kind == "evaluate"]
    missing = 0
    for ratio in ratios:
        try:
            state = "logged" if log_branch(str(ratio)) else "already there"
        except MissingResultError as error:
            state, missing = str(error), missing + 1
        print(f"ratio {ratio}: {state}")
    try:
        print(f"report: {'logged' if log_report() else 'already there'}")
    except MissingResultError as error:
        print(f"report: {error}")
    if missing == len(ratios):
        sys.exit("error: There are no results to log: run dvc repro.")
    place = find_store()
    print(f"\nexperiment {place.experiment} in {place.shown}")
    print("to compare the ratios: python -m flows.track ui")


@app.command()
def ui(port: Annotated[int, typer.Option(help="of this machine")] = 5000) -> None:
    """Show the ratios in MLflow's UI; on a server of its own if the runs are in a file."""
    place, page = find_store(), ratios_page()
    if place.folder is None:
        print(f"{place.shown.rstrip('/')}{page}")
        return
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            sys.exit(f"error: port is {port}, which another program uses: pass another --port.")
    print(f"http://127.0.0.1:{port}{page}\nstop with Ctrl-C", flush=True)
    own = {
        "MLFLOW_BACKEND_STORE_URI": place.uri,
        "MLFLOW_REGISTRY_STORE_URI": place.uri,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PYTHONWARNINGS": "ignore",
    }
    options = ["--workers", "1", "--port", str(port), "--uvicorn-opts", "--log-level warning"]
    command = [sys.executable, "-m", "mlflow", "ui", *options]
    os.execve(sys.executable, command, {**os.environ, **own})


def main() -> None:
    """Run a command; a problem is one sentence and exit code 1."""
    try:
        app(prog_name="python -m flows.track")
    except (TrackingError, StageError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

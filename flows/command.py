"""Run a flow from the command line: shared options, problems as one sentence, Ctrl-C at once."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import httpx
import typer
from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.exceptions import ParameterTypeError
from prefect.settings import get_current_settings

from flows.stages import one_line

RatioOption = Annotated[list[float] | None, typer.Option(help="instead of those in params.yaml")]
OverrideOption = Annotated[
    list[str] | None, typer.Option("--set", "-S", help="KEY=VALUE, written to params.yaml")
]
ParallelOption = Annotated[int, typer.Option(min=1, help="stages at the same time")]
TrackOption = Annotated[bool, typer.Option(help="log the results to MLflow")]


def run_flow(flow: Flow[..., Any], *, needs_server: bool = False, **parameters: Any) -> None:
    """Run a flow in this process; exits with 1 and a sentence when it fails, 130 when stopped.

    Args:
        flow: returns a state.
        needs_server: a temporary server of its own would not do.
        parameters: of the flow.
    """
    if problem := _server_problem(needs_server):
        sys.exit(f"error: {problem}")
    try:
        state = flow(**parameters, return_state=True)
    except KeyboardInterrupt:
        sys.exit(130)
    except ParameterTypeError as error:
        sys.exit(f"error: {one_line(error)}")
    if not state.is_completed():
        sys.exit(f"error: {state.message}")


def _server_problem(needed: bool) -> str | None:
    """Why Prefect's server cannot be used, in a sentence, or None."""
    url = get_current_settings().api.url
    start = (
        "start one (prefect server start) and point to it (prefect config set "
        "PREFECT_API_URL=http://HOST:4200/api)"
    )
    if url is None:
        if not needed:
            return None
        return f"A sweep hands its branches to workers through a Prefect server: {start}."
    with get_client(sync_client=True) as client:
        problem = client.api_healthcheck()
    if problem is None:
        return None
    if isinstance(problem, httpx.TransportError):
        return f"No Prefect server answers at {url}: {start}, or unset PREFECT_API_URL."
    return f"The Prefect server at {url} is not well: {problem}"

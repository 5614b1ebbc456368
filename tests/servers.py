"""Real Prefect servers and workers on loopback, and what they run."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import socketserver
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil

from tests.shell import BINARIES, environment

Found = TypeVar("Found")


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def wait_for(what: str, look: Callable[[], Found], *, seconds: float) -> Found:
    """The first true thing that `look` finds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(0.3)
    raise AssertionError(f"{what}: not within {seconds} s")


@contextlib.contextmanager
def started(
    command: list[str], cwd: Path, env: dict[str, str], log: Path
) -> Iterator[psutil.Popen]:
    """A process in the background, its output in a file; it and its children end with the test."""
    # A shell that runs the tests in the background has them ignore Ctrl-C, which is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(log, "w") as output:
        process = psutil.Popen(
            command, cwd=cwd, env=env, stdout=output, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        members = [*process.children(recursive=True), process] if process.is_running() else []
        for member in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(members, timeout=15)
        for member in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()


class Outside:
    """A proxy that lets nothing through and notes what would have left the machine."""

    def __init__(self) -> None:
        asked = self.asked = []

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                asked.append(self.rfile.readline().decode(errors="replace").strip())
                self.wfile.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        url = f"http://127.0.0.1:{self.server.server_address[1]}"
        names = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
        self.env = {**dict.fromkeys(names, url), "NO_PROXY": "127.0.0.1,localhost"}

    def __enter__(self) -> Outside:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class Prefect:
    """A Prefect server: its command line and its API."""

    def __init__(self, url: str, env: dict[str, str], folder: Path) -> None:
        self.url, self.folder = url, folder
        self.env = {**env, "PREFECT_API_URL": url}

    def run(self, cwd: Path, *arguments: str, ok: bool = True) -> str:
        """Run the prefect command; what it printed."""
        done = subprocess.run(
            [str(BINARIES / "prefect"), *arguments],
            cwd=cwd,
            env={**self.env, "COLUMNS": "1000"},
            capture_output=True,
            text=True,
        )
        assert (done.returncode == 0) == ok, done.stdout + done.stderr
        return done.stdout + done.stderr

    def post(self, path: str, **body: Any) -> Any:
        """Ask the API."""
        request = urllib.request.Request(
            f"{self.url}{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read() or b"null")

    def runs(self, deployment: str, state: str | None = None) -> list[dict[str, Any]]:
        """Flow runs of a deployment ("flow/name"), newest last."""
        flow, name = deployment.split("/")
        filters = {"flows": {"name": {"any_": [flow]}}, "deployments": {"name": {"any_": [name]}}}
        found = self.post("/flow_runs/filter", **filters, limit=200)
        chosen = [run for run in found if state is None or run["state_type"] == state]
        return sorted(chosen, key=lambda run: run["expected_start_time"])

    def run_of(self, run: str) -> dict[str, Any]:
        """One flow run by its id."""
        return self.post("/flow_runs/filter", flow_runs={"id": {"any_": [run]}})[0]

    def stages(self, run: str) -> dict[str, str]:
        """Task run → name of its state, of a flow run."""
        found = self.post("/task_runs/filter", flow_runs={"id": {"any_": [run]}}, limit=200)
        return {task["name"]: task["state_name"] for task in found}

    def ended(self, run: str, *, seconds: float = 240) -> dict[str, Any]:
        """A flow run when it is over."""
        final = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")

        def look() -> dict[str, Any] | None:
            found = self.run_of(run)
            return found if found["state_type"] in final else None

        return wait_for(f"flow run {run}", look, seconds=seconds)

    def start(self, cwd: Path, deployment: str, *parameters: str) -> str:
        """Start a run of a deployment; its id."""
        before = {run["id"] for run in self.runs(deployment)}
        options = [option for parameter in parameters for option in ("-p", parameter)]
        self.run(cwd, "deployment", "run", deployment, *options)
        new = [run for run in self.runs(deployment) if run["id"] not in before]
        return next(run["id"] for run in new if not run["auto_scheduled"])

    @contextlib.contextmanager
    def worker(self, name: str, **more: str) -> Iterator[None]:
        """A process worker with a work folder of its own."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        command = [str(BINARIES / "prefect"), "worker", "start", "--pool", "emloc", "--name", name]
        with started(
            [*command, "--limit", "1"], folder, {**self.env, **more}, self.folder / f"{name}.log"
        ):
            yield


@contextlib.contextmanager
def prefect_server(project: Path, folder: Path, **more: str) -> Iterator[Prefect]:
    """A Prefect server, started in a project's folder as its user would."""
    port = free_port()
    env = environment(folder, **more)
    command = [str(BINARIES / "prefect"), "server", "start", "--port", str(port)]
    server = Prefect(f"http://127.0.0.1:{port}/api", env, folder)

    def healthy() -> bool:
        with contextlib.suppress(OSError):
            with urllib.request.urlopen(f"{server.url}/health") as answer:
                return answer.status == 200
        return False

    with started(command, project, env, folder / "server.log"):
        wait_for("the Prefect server", healthy, seconds=120)
        server.run(project, "work-pool", "create", "emloc", "--type", "process")
        yield server


def stage_processes(folder: Path, task: str) -> list[psutil.Process]:
    """Running processes of a stage whose working folder lies in `folder`, or is gone."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if f"tasks.{task}" not in (process.info["cmdline"] or []):
            continue
        with contextlib.suppress(psutil.Error):
            if str(folder) in process.cwd() or str(folder) in str(process.environ()):
                found.append(process)
    return found

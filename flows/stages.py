"""DVC's side of a flow: the graph of stages, dvc.lock, and the dvc command.

- `read_graph`: stages of dvc.yaml with the ratios of params.yaml, in an order that can be run
- `read_lock`: what the stages last read and wrote, by hash
- `run_dvc`: one dvc command as a process that can be stopped, its lines as they come
- `reproduce`: run one stage, or take it from the cache, and tell which of the two it was
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import yaml

State = Literal["ran", "restored", "unchanged"]
LOCK = Path("dvc.lock")

_STATES: tuple[tuple[str, State], ...] = (
    ("Running stage '", "ran"),
    ("is cached - skipping run", "restored"),
    ("didn't change, skipping", "unchanged"),
)
_TRANSIENT = re.compile(
    r"unable to acquire lock|is busy, it is being blocked|timed? ?out|connection reset"
    r"|temporar(y failure|ily unavailable)|service unavailable|slow ?down|too many requests",
    re.IGNORECASE,
)
_HINT = re.compile(
    r"(Generating|Updating) lock file|To (track the changes with git|enable auto staging), run:"
    r"|\s+(git add|dvc config)|Use `dvc push` to send"
)
_PROGRESS_SECONDS = 30.0  # a progress bar is logged this often
_STOP_SECONDS = 10.0  # from asking a process to end to ending it


class StageError(Exception):
    """A dvc command failed; the message is the cause in a sentence."""


class TransientError(StageError):
    """A failure that can pass by itself: a busy lock, a remote that timed out."""


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline.

    Attributes:
        name: as dvc calls it: "train@0.5".
        needs: names of the stages whose outs it reads.
    """

    name: str
    needs: frozenset[str]

    @property
    def kind(self) -> str:
        """The name without a ratio: "train"."""
        return self.name.partition("@")[0]

    @property
    def ratio(self) -> str | None:
        """The ratio as written in the name, or None for a stage that no ratio changes."""
        return self.name.partition("@")[2] or None


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: what dvc did, and in how many seconds."""

    name: str
    state: State
    seconds: float


def read_graph() -> dict[str, Stage]:
    """All stages by name, each after those that it needs.

    Raises:
        StageError: dvc.yaml or params.yaml cannot be read, or there is no DVC project here.
    """
    import networkx
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            graph = repo.index.graph
            order = list(networkx.dfs_postorder_nodes(graph))
            return {
                stage.addressing: Stage(
                    stage.addressing,
                    frozenset(needed.addressing for needed in graph.successors(stage)),
                )
                for stage in order
            }
    except DvcException as error:
        raise StageError(one_line(error)) from error


def ancestors(graph: dict[str, Stage], names: Iterable[str]) -> set[str]:
    """The named stages and all that they need, directly or not."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(graph[name].needs)
    return found


def read_lock() -> dict[str, dict[str, Any]]:
    """The stages of dvc.lock by name: cmd, deps, params and outs with their hashes."""
    if not LOCK.exists():
        return {}
    return yaml.safe_load(LOCK.read_text(encoding="utf-8")).get("stages", {})


def forget(names: set[str]) -> None:
    """Take stages out of dvc.lock, so that dvc asks the run cache about them.

    An entry whose outs are neither in the cache nor in the remote would keep dvc from looking for
    the same stage's outs of another machine, and make it run the stage.
    """
    if not LOCK.exists():
        return
    lock = yaml.safe_load(LOCK.read_text(encoding="utf-8"))
    lock["stages"] = {name: entry for name, entry in lock["stages"].items() if name not in names}
    beside = LOCK.with_suffix(".partial")
    beside.write_text(yaml.safe_dump(lock, sort_keys=False), encoding="utf-8")
    beside.replace(LOCK)


def reproduce(name: str, *, pull: bool = False, log: Callable[[str], None] = print) -> Outcome:
    """Bring one stage up to date; what it needs must be so already.

    Args:
        name: of a stage in `read_graph`.
        pull: look in the default remote, too, before running its command.
        log: takes each line that dvc or the stage prints.

    Raises:
        TransientError, StageError: see `run_dvc`.
    """
    started = time.perf_counter()
    options = ["--pull"] if pull else []
    lines = run_dvc("repro", "--single-item", *options, name, log=log)
    state = next((state for mark, state in _STATES for line in lines if mark in line), "unchanged")
    return Outcome(name, state, time.perf_counter() - started)


def run_dvc(*arguments: str, log: Callable[[str], None] = print) -> list[str]:
    """Run a dvc command to its end; the lines that it printed.

    It waits for other dvc commands in the same project. It stays in this process's group, so that
    Ctrl-C and a cancelled run's signal reach the stage as well; `stop_all` ends it from here.

    Raises:
        TransientError: it failed, and may pass when tried again.
        StageError: it failed.
    """
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", *arguments]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=_environment(),
    )  # fmt: skip
    with _stoppable(process):
        lines = _follow(process.stdout, log)
        code = process.wait()
    if code == 0:
        return lines
    ending = f"exit code {code}" if code > 0 else f"signal {-code}: it was stopped"
    problem = _problem(lines) or f"dvc {' '.join(arguments)} ended with {ending}."
    raise (TransientError if _TRANSIENT.search(problem) else StageError)(problem)


def stop_all() -> None:
    """End every dvc command that `run_dvc` started, with the stages that they run."""
    with _guard:
        started = list(_started)
    below = [child for process in started for child in _below(process)]
    for process in (*started, *below):  # dvc first: it would end well when its stage ends
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(below, timeout=_STOP_SECONDS)
    for child in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    for process in started:  # by Popen, whose exit code `run_dvc` waits for as well
        try:
            process.wait(timeout=_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


_started: set[subprocess.Popen] = set()
_guard = threading.Lock()


@contextlib.contextmanager
def _stoppable(process: subprocess.Popen) -> Iterator[None]:
    """Keep a process among those that `stop_all` ends."""
    with _guard:
        _started.add(process)
    try:
        yield
    finally:
        with _guard:
            _started.discard(process)


def _below(process: subprocess.Popen) -> list[psutil.Process]:
    """All that a process started, and what those started."""
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _environment() -> dict[str, str]:
    """This process's environment, with this interpreter as the `python` of the stages."""
    binaries = str(Path(sys.executable).parent)
    path = os.pathsep.join([binaries, os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1"}


def _follow(stream: Any, log: Callable[[str], None]) -> list[str]:
    """Log lines as they come, progress bars (which end in a carriage return) now and then."""
    lines, shown = [], time.monotonic()
    for raw in io.TextIOWrapper(stream, encoding="utf-8", errors="replace", newline=""):
        line = raw.rstrip()
        if not line.strip() or _HINT.match(line):
            continue
        if raw.endswith("\r"):
            if time.monotonic() - shown < _PROGRESS_SECONDS:
                continue
            shown = time.monotonic()
        log(line)
        lines.append(line)
    return lines


def _problem(lines: list[str]) -> str | None:
    """The sentence that a stage ended with, or else dvc's own."""
    for mark in ("error: ", "ERROR: "):
        for line in reversed(lines):
            if line.startswith(mark):
                return one_line(line.removeprefix(mark))
    return None


def one_line(text: object) -> str:
    """A message without line breaks."""
    return " ".join(str(text).split())

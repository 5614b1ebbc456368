"""Share emulators, adapters and reports in a team through a DVC remote.

The remote is set up once by `dvc remote add -d team URL` (a folder, s3://, ssh:// ...) and
committed. With the results goes dvc's record of the runs, so that a teammate with the same
parameters and code gets them without computing, also if no dvc.lock was committed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict
from typing import Annotated, Any

import typer
from dvc.exceptions import DvcException
from tabulate import tabulate

from flows.emulators import Emulator, Place, find_emulators
from flows.remotes import Remote, choose_remote, forget_repeated_runs, opened
from flows.stages import StageError, one_line, read_lock, run_dvc
from flows.workspace import read_params

app = typer.Typer(
    help="Share emulators, adapters and reports in a team through a DVC remote.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RemoteOption = Annotated[
    str | None,
    typer.Option("--remote", "-r", help="name or URL; becomes the default one of this clone"),
]

_UNSENT = re.compile(r"ERROR: failed to transfer '.*?' - (.*)")
_STARTED = re.compile(r"Running stage '(.*)':")
_GIVEN = re.compile(r"Stage '(.*)' is cached|Pulling data for stage: '(.*)'")
_NOWHERE = "Some of the cache files do not exist neither locally nor on remote"
_HIDDEN = re.compile(
    r"\s*0%|!$|Running stage '|> |WARNING: |ERROR: |(name|md5): |Collecting |Pushing$"
    r"|Having any troubles"
)
_WIDTH = 40  # of a source or targets, in a table


@app.command()
def push(remote: RemoteOption = None) -> None:
    """Copy the results that dvc.lock names, and the record of all runs, to the remote."""
    if not (lock := read_lock()):
        raise ValueError("dvc.lock names no results to push: run `dvc repro` first.")
    target = choose_remote(remote)
    forget_repeated_runs(lock)
    lines, problem = _run("push", *(["--run-cache"] if target.keeps_runs else []))
    if problem:
        raise StageError(
            f"{target} did not take everything: {problem}. Nothing is lost: the results are still "
            "in the cache here, and the next push goes on from there."
        )
    if any(_NOWHERE in line for line in lines):
        raise StageError(
            f"{target} has the results of the last `dvc repro` but for some files that are no "
            "longer in the cache here either: `dvc repro` makes them again, then push again."
        )
    print(f"{target} has the results of the last `dvc repro`.")
    if not target.keeps_runs:
        print("It keeps no record of runs, so a teammate needs this dvc.lock, too: commit it.")


@app.command()
def pull(
    stages: Annotated[
        list[str] | None, typer.Argument(help="such as compress@0.5; what they need comes along")
    ] = None,
    remote: RemoteOption = None,
) -> None:
    """Get what the present parameters and code give, as `dvc repro --pull`, but compute nothing."""
    source = choose_remote(remote, must_exist=True)
    with _stages_refused():
        lines, problem = _run("repro", "--pull", "--keep-going", *(stages or []))
    refused = [match[1] for line in lines if (match := _STARTED.search(line))]
    given = {match[1] or match[2] for line in lines if (match := _GIVEN.search(line))}
    given -= set(refused)
    _put_back(refused)
    if problem and (not refused or any(_UNSENT.search(line) for line in lines)):
        raise StageError(
            f"{source} did not give everything: {problem}. Nothing was computed, and nothing is "
            "lost: pull again when this is solved."
        )
    if refused:
        raise StageError(
            f"{source} does not have {_listed(refused)} for the present params.yaml and code, nor "
            f"what builds on it; {len(given)} other stages were pulled, and nothing was computed. "
            f"To compute it: `dvc repro --pull {refused[0]}`, or `dvc repro --pull` for all."
        )
    print(f"{source} gave the results of {len(given)} stages; nothing was computed.")


@app.command("list")
def list_command(
    remote: Annotated[
        str | None, typer.Option("--remote", "-r", help="name or URL of one to look in, too")
    ] = None,
    gone: Annotated[
        bool, typer.Option("--all", help="also emulators whose files are gone")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="everything known, as JSON")] = False,
) -> None:
    """Show the emulators in this project's cache, and with --remote also those in a remote."""
    with opened(remote) as (repo, asked, there):
        here = Place(repo.cache.legacy, repo.cache.local)
        emulators = find_emulators(here, there, read_params())
    shown = [one for one in emulators if gone or one.here or one.there]
    if as_json:
        print(json.dumps([asdict(one) for one in shown], indent=2))
    else:
        print(_table(shown, asked) if shown else "No emulators.")


def _table(emulators: list[Emulator], asked: Remote | None) -> str:
    rows = []
    for one in emulators:
        targets = "; ".join(f"{regex}: {value}" for regex, value in one.targets.items())
        row: dict[str, Any] = {
            "model": _short(one.model),
            "data": f"{_short(one.data)} {(one.rows or '')[:8]}",
            "ratio": one.ratio,
            "targets": targets if len(targets) <= _WIDTH else f"{targets[:_WIDTH]}…",
            "MiB": f"{one.size / 2**20:.1f}",
            "hash": one.hash[:8],
            "params.yaml": _yes(one.current),
            "here": _yes(one.here),
        }
        if asked is not None:
            row[asked.name] = _yes(bool(one.there))
        rows.append(row)
    return tabulate(rows, headers="keys", tablefmt="simple", disable_numparse=True)


def _short(source: str | None) -> str:
    if source is None:
        return "?"
    return source if len(source) <= _WIDTH else f"…/{source.rpartition('/')[2]}"


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


def _put_back(stages: list[str]) -> None:
    """Check out again what dvc removed before a stage that was then refused."""
    if before := [name for name in stages if name in read_lock()]:
        with suppress(StageError):  # it is not in the cache, so it was not here before
            run_dvc("checkout", *before, log=lambda _: None)


def _stages_refused() -> AbstractContextManager[None]:
    """Let no stage of a dvc command run: dvc starts them in $SHELL, which fails at once.

    Raises:
        StageError: dvc has no such way on this system.
    """
    refusing = shutil.which("false")
    if os.name == "nt" or refusing is None:
        raise StageError("pull needs a POSIX system; `dvc repro --pull` does not, but computes.")
    return _environment(SHELL=refusing)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _run(*arguments: str) -> tuple[list[str], str | None]:
    """The lines of a dvc command, and what went wrong; a file that failed is only logged by dvc."""
    lines: list[str] = []

    def log(line: str) -> None:
        lines.append(line)
        if not _HIDDEN.match(line):
            print(line, flush=True)

    problem = None
    try:
        with _environment(DVC_IGNORE_ISATTY="1"):  # progress, which run_dvc logs now and then
            run_dvc(*arguments, log=log)
    except StageError as error:
        problem = str(error)
    unsent = next((match[1] for line in lines if (match := _UNSENT.search(line))), None)
    return lines, (unsent or problem or "").rstrip(".") or None


def _listed(names: list[str]) -> str:
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), names[-1]])


def main() -> None:
    """Run a command; what goes wrong is one sentence and exit code 1."""
    try:
        app()
    except (ValueError, FileNotFoundError, StageError, DvcException) as error:
        sys.exit(f"error: {one_line(error)}")


if __name__ == "__main__":
    main()

"""DVC remotes as sharing needs them.

- `choose_remote`, `opened`: which one is meant, whether it answers, why it does not
- `forget_repeated_runs`: what has to be done before a push
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from dvc.repo import Repo

from flows.emulators import Place
from flows.stages import StageError, one_line, run_dvc

_UNNAMED = "there"  # what a remote that is given by its URL is called
_HTTP = ("http://", "https://")


@dataclass(frozen=True)
class Remote:
    """A DVC remote.

    Attributes:
        keeps_runs: whether dvc can keep its record of runs there.
    """

    name: str
    url: str
    keeps_runs: bool

    def __str__(self) -> str:
        named = "" if self.name == _UNNAMED else f"{self.name!r} "
        return f"The remote {named}({self.url})"


def choose_remote(
    given: str | None, *, must_exist: bool = False, log: Callable[[str], None] = print
) -> Remote:
    """The remote of a name or URL, which becomes the default one of this clone; or the default.

    Args:
        given: by the user; None for the default.
        must_exist: whether something must be there already.
        log: takes a line about what became the default.

    Raises:
        ValueError: there is no such remote.
        StageError: it does not answer, refuses, or holds nothing.
    """
    with Repo(config=_config(given)) as repo:
        remote = _described(repo, given or _default(repo))
        _check_reachable(repo, remote, must_exist=must_exist)
    if given is not None:
        _make_default(remote, log)
    return remote


@contextmanager
def opened(given: str | None) -> Iterator[tuple[Repo, Remote | None, Place | None]]:
    """This project, and the remote of a name or URL to read in, if one is given.

    Raises:
        ValueError: there is no such remote, or it keeps no record of runs.
        StageError: it does not answer, or refuses.
    """
    with Repo(config=_config(given)) as repo:
        if given is None:
            yield repo, None, None
            return
        remote = _described(repo, given)
        if not remote.keeps_runs:
            raise ValueError(f"{remote} keeps no record of runs, so nothing in it can be listed.")
        with _blaming(remote):
            connected = repo.cloud.get_remote(remote.name)
            yield repo, remote, Place(connected.legacy_odb, connected.odb)


def forget_repeated_runs(lock: dict[str, Any]) -> None:
    """Of runs with the same inputs, keep the record of the one in dvc.lock only.

    A stage that ran twice (by force, or in two clones at once) has two records, as its measured
    cost differs. Both would be pushed, but the files of one; a teammate's dvc would take either.
    """
    locked = [_results(stage) for stage in lock.values()]
    with Repo() as repo:
        runs = Path(repo.cache.legacy.path) / "runs"
    for folder in runs.glob("*/*"):
        if len(files := list(folder.iterdir())) < 2:
            continue
        records = {file: _results(yaml.safe_load(file.read_text())) for file in files}
        if any(results in locked for results in records.values()):
            for file, results in records.items():
                if results not in locked:
                    file.unlink(missing_ok=True)


def _results(run: dict[str, Any]) -> tuple[str, dict[str, str]]:
    return run["cmd"], {out["path"]: out["md5"] for out in run["outs"]}


def _make_default(remote: Remote, log: Callable[[str], None]) -> None:
    """Write it into .dvc/config.local."""
    name = remote.name
    if name == _UNNAMED:
        name = "flow"
        run_dvc("remote", "add", "--local", "--force", name, remote.url, log=lambda _: None)
    run_dvc("remote", "default", "--local", name, log=log)
    log(f"{remote} is now the default one of this clone.")


def _default(repo: Repo) -> str:
    if name := repo.config["core"].get("remote"):
        return name
    if known := sorted(repo.config["remote"]):
        raise ValueError(
            f"None of this project's remotes ({', '.join(known)}) is the default one: name one "
            f"with --remote, or choose it with dvc remote default {known[0]}."
        )
    raise ValueError(
        "This project has no remote: add one with dvc remote add -d team URL, where URL is a "
        "folder that the team can reach, or s3://bucket/folder, ssh://host/folder and the like."
    )


def _described(repo: Repo, given: str) -> Remote:
    known = repo.config["remote"]
    name = given if given in known else _UNNAMED
    if name not in known:
        raise ValueError(
            f"remote is {given!r}, but the remotes of this project are {sorted(known)}: name one "
            f"of them, give a URL (s3://bucket/folder, /mnt/team), or add it with dvc remote add "
            f"{given} URL."
        )
    url = known[name]["url"]
    versioned = known[name].get("version_aware") or known[name].get("worktree")
    return Remote(name, url, keeps_runs=not url.startswith(_HTTP) and not versioned)


def _config(given: str | None) -> dict[str, Any]:
    """dvc's configuration for a remote that is given by its URL."""
    if given is None or not any(mark in given for mark in ("/", ":", "\\")):
        return {}
    url = given if "://" in given else str(Path(given).absolute())
    return {"remote": {_UNNAMED: {"url": url}}}


def _check_reachable(repo: Repo, remote: Remote, *, must_exist: bool) -> None:
    """Ask once; without an answer, dvc would try each file for seconds."""
    if remote.url.startswith(_HTTP):
        return  # cannot be asked for what it holds
    with _blaming(remote):
        connected = repo.cloud.get_remote(remote.name)
        try:
            connected.fs.ls(connected.path)
        except FileNotFoundError as error:
            if must_exist:
                raise StageError(
                    f"{remote} holds nothing: check that the URL is right, that it is mounted if "
                    "it is a folder, and that someone has pushed (python -m flows.share push)."
                ) from error


@contextmanager
def _blaming(remote: Remote) -> Iterator[None]:
    """Turn what goes wrong into a sentence that names the remote."""
    try:
        yield
    except (StageError, ValueError):
        raise
    except Exception as error:  # each kind of remote has its own library, with errors of its own
        reason = one_line(error) or type(error).__name__
        raise StageError(
            f"{remote} cannot be used: {reason.rstrip('.')}. Nothing is lost: what was computed "
            "here is in the cache."
        ) from error

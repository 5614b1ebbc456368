"""The working tree that a flow runs in: its parameters, its commit, and what it shares.

A deployment's run works in a fresh clone at the deployed commit. What would be lost with the clone,
the DVC cache, checkpoints and the MLflow store, is that of the checkout which was deployed from, if
the run is on the same machine; else the machine's own, in the folder EMLOC_CACHE. A worker's
EMLOC_DVC_CACHE, EMLOC_CHECKPOINTS and MLFLOW_TRACKING_URI come first.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from flows.stages import StageError, run_dvc

PARAMS = Path("params.yaml")
CHECKPOINTS = ".emloc/checkpoints"
CHECKOUT = "EMLOC_CHECKOUT"  # set by prefect.yaml
SQLITE = "sqlite:///"


def read_params() -> dict[str, Any]:
    """params.yaml as dvc reads it."""
    import dvc.api

    return dvc.api.params_show(str(PARAMS))


def set_params(ratios: Sequence[float] | None, overrides: Sequence[str]) -> None:
    """Write other values into params.yaml, as `dvc exp run -S` does; comments stay.

    Raises:
        ValueError: an override is not KEY=VALUE, or names a key that params.yaml does not have.
    """
    from dvc.exceptions import InvalidArgumentError
    from dvc.utils.hydra import apply_overrides

    chosen = [] if ratios is None else [f"ratios=[{','.join(map(str, ratios))}]"]
    if not (chosen := [*chosen, *overrides]):
        return
    try:
        apply_overrides(PARAMS, chosen)
    except InvalidArgumentError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(
            f"overrides is {list(overrides)}, but {reason.rstrip('.')}: write KEY=VALUE with a key "
            "of params.yaml, for instance train.lora.r=16."
        ) from error


def write_params(params: Mapping[str, Any]) -> None:
    """Replace params.yaml."""
    PARAMS.write_text(yaml.safe_dump(dict(params), sort_keys=False), encoding="utf-8")


def share_state(log: Callable[[str], None]) -> None:
    """In a deployment's clone: keep the DVC cache and checkpoints outside of it.

    Raises:
        StageError: dvc cannot use that cache.
    """
    checkout = _checkout()
    cache, checkpoints = _checkout_state(checkout) if checkout else _machine_state()
    run_dvc("cache", "dir", "--local", os.environ.get("EMLOC_DVC_CACHE", str(cache)), log=log)
    os.environ.setdefault("EMLOC_CHECKPOINTS", str(checkpoints))


def share_store() -> None:
    """In a deployment's clone: log to the MLflow store of the checkout, or to a server.

    Raises:
        StageError: the store is a file, and the checkout is on another machine.
    """
    uri = read_params()["mlflow"]["tracking_uri"]
    if "MLFLOW_TRACKING_URI" in os.environ or not uri.startswith(SQLITE):
        return
    path, checkout = Path(uri.removeprefix(SQLITE)), _checkout()
    if not checkout and not path.is_absolute():
        raise StageError(
            f"mlflow.tracking_uri is {uri!r}, a file in this run's clone, which goes when the run "
            "ends: name a server (http://HOST:5000), or set MLFLOW_TRACKING_URI for the worker."
        )
    os.environ["MLFLOW_TRACKING_URI"] = SQLITE + str((checkout or Path()) / path)


def _checkout() -> Path | None:
    """The checkout that was deployed from, if it is on this machine."""
    path = Path(os.environ.get(CHECKOUT, ""))
    return path if path.is_absolute() and path.is_dir() else None


def _checkout_state(checkout: Path) -> tuple[Path, Path]:
    from dvc.repo import Repo

    with Repo(str(checkout)) as repo:
        return Path(repo.cache.local_cache_dir), checkout / CHECKPOINTS


def _machine_state() -> tuple[Path, Path]:
    """In the folder of the stages' downloads, which they name in the same way."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(os.environ.get("EMLOC_CACHE") or f"{base}/emloc").expanduser().absolute()
    return folder / "dvc", folder / "checkpoints"


def commit() -> str | None:
    """The commit that is checked out; None outside of a git repository."""
    return _git("rev-parse", "HEAD")


def changed_files() -> list[str]:
    """Files that git tracks and that differ from the commit."""
    status = _git("status", "--porcelain", "--untracked-files=no") or ""
    return [line[3:] for line in status.splitlines()]


def check_clean(*, besides: Sequence[str] = ()) -> None:
    """Refuse a working tree that differs from its commit, in other files than these.

    Raises:
        StageError: names the changed files.
    """
    if changed := [file for file in changed_files() if file not in besides]:
        raise StageError(
            f"A deployment works on a commit alone, but {', '.join(changed)} differ from it: "
            "commit the changes and deploy again, or pass parameters as overrides."
        )


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    return done.stdout.strip("\n") if done.returncode == 0 else None

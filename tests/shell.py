"""Projects with a tiny model, and the commands that a user would type in them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.project import HEALING, make_project, write_params

BINARIES = Path(sys.executable).parent
BRANCH = ("compress", "heal", "train", "correct", "evaluate")  # the stages of one ratio


def environment(folder: Path, **more: str) -> dict[str, str]:
    """For processes of a test: state of their own in `folder`, one thread each, and nothing that
    would switch off what libraries report to their makers, or send it elsewhere."""
    left = ("PREFECT_", "MLFLOW_", "EMLOC_", "DO_NOT_TRACK", "CI")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left)}
    return {
        **kept,
        "PATH": f"{BINARIES}{os.pathsep}{os.environ['PATH']}",
        "PREFECT_HOME": str(folder / "prefect"),
        "EMLOC_CACHE": str(folder / "emloc-cache"),
        "OMP_NUM_THREADS": "1",
        **more,
    }


def run(folder: Path, *module: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ...` in a project, with more environment variables."""
    return subprocess.run(
        [sys.executable, "-m", *module],
        cwd=folder,
        env=environment(folder.parent, **more),
        capture_output=True,
        text=True,
    )


def dvc(folder: Path, *arguments: str, **more: str) -> str:
    """Run a dvc command in a project; what it printed."""
    done = run(folder, "dvc", *arguments, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ran(printed: str) -> set[str]:
    """Stages whose command was run, from dvc's lines."""
    return _named(printed, "Running stage '")


def restored(printed: str) -> set[str]:
    """Stages whose outputs came from the run cache."""
    return _named(printed, "is cached - skipping run")


def _named(printed: str, mark: str) -> set[str]:
    return {line.split("'")[1] for line in printed.splitlines() if mark in line}


def lock(folder: Path) -> dict[str, Any]:
    """The stages of dvc.lock."""
    return yaml.safe_load((folder / "dvc.lock").read_text())["stages"]


def hashes(folder: Path) -> dict[str, str]:
    """Out → hash, of all outs that hold no measured cost, from dvc.lock."""
    outs = [out for stage in lock(folder).values() for out in stage["outs"]]
    return {out["path"]: out["md5"] for out in outs if "cost" not in out["path"]}


def check_cache(folder: Path) -> int:
    """Hash every file of a cache, look for the parts of every folder; the number of objects."""
    objects = [path for path in (folder / "files/md5").rglob("*") if path.is_file()]
    present = {path.parent.name + path.name for path in objects}
    for path in objects:
        content = path.read_bytes()
        assert hashlib.md5(content).hexdigest() == path.parent.name + path.stem
        if path.suffix == ".dir":
            assert {entry["md5"] for entry in json.loads(content)} <= present
    return len(objects)


def git(folder: Path, *arguments: str) -> None:
    """Run a git command in a project."""
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def commit(folder: Path) -> None:
    """Commit all files of a project that git does not ignore."""
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "all")


def start(folder: Path) -> dict[str, Any]:
    """A project in a git repository of its own, all of it committed; its params."""
    params = make_project(folder) | HEALING
    write_params(folder, params)
    git(folder, "init", "--quiet")
    commit(folder)
    return params


def read_params(folder: Path) -> dict[str, Any]:
    """A project's params.yaml."""
    return yaml.safe_load((folder / "params.yaml").read_text())


def clone(folder: Path, target: Path, params: dict[str, Any] | None = None) -> Path:
    """A clean clone of what a project has committed, without its cache; with other params."""
    git(folder, "clone", "--quiet", str(folder), str(target))
    if params is not None:
        write_params(target, params)
    return target

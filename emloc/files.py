"""Files that are either whole or not there, and small JSON helpers.

- `writing`: write beside, rename at the end
- JSON and JSON Lines with a stable byte layout, so that equal content has an equal hash
- `sha256` of a file
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from emloc.sizes import show_gib


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], *, size: int = 0) -> Iterator[Path]:
    """Yield a path beside `path` to create as a file or a folder; rename it onto `path` at the end.

    What stood at `path` is replaced on success only. On an exception the partial result is removed
    and `path` is left as it was.

    Args:
        path: of the file or folder.
        size: bytes that it will take, if they are known.

    Raises:
        ValueError: there is less room on the disk than `size`.
        FileNotFoundError: the body ended without creating the yielded path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise ValueError(
            f"{path} will take {show_gib(size)}, but its disk has only {show_gib(free)} left: make "
            "room first (dvc gc removes what no run needs any more), or move the project."
        )
    holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    try:
        partial = holder / path.name
        yield partial
        if not partial.exists():
            raise FileNotFoundError(f"{path} was not written: nothing was created at {partial}.")
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        os.replace(partial, path)
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Parse one JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON; the message names it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): write it again.") from error


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON with sorted keys, so that equal content gives equal bytes."""
    with writing(path) as partial:
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        partial.write_text(text + "\n", encoding="utf-8")


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Parse a JSON Lines file that this project wrote."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, keys in the order given."""
    with writing(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(settings: Mapping[str, Any], files: Iterable[str | os.PathLike[str]]) -> str:
    """16 hex digits that change with the settings and with the content of the files."""
    total = hashlib.sha256(repr(sorted(settings.items())).encode())
    for file in files:
        total.update(sha256(file).encode())
    return total.hexdigest()[:16]

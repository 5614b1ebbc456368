"""The checkpoints of a training: finding the newest that is whole, and removing them.

A checkpoint counts when its last file is there and all its files are whole.
"""

from __future__ import annotations

import contextlib
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from emloc.files import read_json
from emloc.processes import agree, is_first

COMPLETE = "complete.json"  # written last in a checkpoint: its files and their sizes
_NAME = re.compile(r"checkpoint-(\d+)")


def last_checkpoint(folder: Path, total: int) -> str | None:
    """The newest whole checkpoint in `folder`; half-written ones are removed.

    Raises:
        ValueError: it is as far as the end (`total` steps) or beyond: it is another run's.
    """
    for step, path in sorted(checkpoints_in(folder), reverse=True):
        if not _is_whole(path):
            shutil.rmtree(path)
            continue
        with must_fit(folder):
            if step >= total:
                raise ValueError(f"it is at step {step} of {total}")
        return str(path)
    return None


def agreed_checkpoint(folder: Path, total: int) -> str | None:
    """`last_checkpoint` as the first process finds it, for all processes that train together.

    Raises:
        ValueError: see `last_checkpoint`; or another process does not see that checkpoint.
    """
    found = agree(last_checkpoint(folder, total) if is_first() else None)
    if found is not None and not _is_whole(Path(found)):
        raise ValueError(
            f"the checkpoint {found} is not on this machine: let all machines share the folder of "
            "the checkpoints."
        )
    return found


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints in `folder`, and the folder when nothing else is in it."""
    for _, path in checkpoints_in(folder):
        shutil.rmtree(path)
    with contextlib.suppress(OSError):
        folder.rmdir()


def checkpoints_in(folder: Path) -> list[tuple[int, Path]]:
    """Step and folder of each checkpoint, in no order."""
    found = folder.iterdir() if folder.is_dir() else ()
    named = ((_NAME.fullmatch(path.name), path) for path in found)
    return [(int(match.group(1)), path) for match, path in named if match]


def _is_whole(checkpoint: Path) -> bool:
    try:
        sizes = read_json(checkpoint / COMPLETE)
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def must_fit(folder: str | Path) -> Iterator[None]:
    """Whatever fails inside means that the checkpoint in `folder` is another run's."""
    try:
        yield
    except (
        ValueError,
        KeyError,
        RuntimeError,
        OSError,
        EOFError,
        pickle.UnpicklingError,
        SafetensorError,
    ) as error:
        raise ValueError(
            f"the checkpoint in {folder} does not fit this run ({error}): delete that folder and "
            "start again."
        ) from error

"""What a deployment is pinned to: python -m flows.pin NAME, which prefect.yaml runs on deploy."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path

import typer

from flows import workspace
from flows.stages import StageError


class Pin(StrEnum):
    """commit: to work on. repository: to clone. checkout: whose cache and store are shared."""

    commit = "commit"
    repository = "repository"
    checkout = "checkout"


def main(name: Pin) -> None:
    """Print the commit that is checked out here, the repository to clone it from (EMLOC_REPOSITORY,
    or this checkout), or this checkout."""
    checkout = str(Path.cwd())
    commit = workspace.commit()
    try:
        if commit is None:
            raise StageError(
                f"{checkout} is no git repository: deploy from a clone of the project."
            )
        workspace.check_clean()
    except StageError as error:
        sys.exit(f"error: {error}")
    repository = os.environ.get("EMLOC_REPOSITORY") or checkout
    print({Pin.commit: commit, Pin.repository: repository, Pin.checkout: checkout}[name])


if __name__ == "__main__":
    typer.run(main)

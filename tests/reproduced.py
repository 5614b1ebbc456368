"""Fixtures of a project after `dvc repro`: `pytest_plugins = "tests.reproduced"` in a module."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.shell import BRANCH, dvc, ran, start


@pytest.fixture(scope="session")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project after its first `dvc repro`, dvc.lock not committed. No test changes it."""
    folder = tmp_path_factory.mktemp("reproduced") / "project"
    params = start(folder)
    branches = {f"{stage}@{ratio}" for stage in BRANCH for ratio in params["ratios"]}
    shared = {"pretrain", "prepare", "calibrate", "teach", "direct", "baseline", "report"}
    assert ran(dvc(folder, "repro")) == branches | shared
    return folder


@pytest.fixture
def project(reproduced: Path, tmp_path: Path) -> Path:
    """A copy of it, with its cache, for one test to change."""
    return shutil.copytree(reproduced, tmp_path / "project")

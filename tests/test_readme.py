"""The README's commands, files and figures are those of the project."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_ci_runs_the_readmes_test_command() -> None:
    command = next(line for line in README.splitlines() if line.endswith("&& pytest"))
    assert command in (ROOT / ".ci/run").read_text().splitlines()


@pytest.mark.parametrize(
    "module", sorted(set(re.findall(r"python -m ([a-z_.]+)(?=[\s`])", README)))
)
def test_a_module_that_the_readme_runs_exists(module: str) -> None:
    assert importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)\)", README))))
def test_a_file_that_the_readme_links_exists(link: str) -> None:
    assert (ROOT / link).exists()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"presets/[\w.-]+\.yaml", README))))
def test_a_preset_that_the_readme_names_exists(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("name", ["calibration_memory", "construction", "overhead"])
def test_the_tables_of_the_benchmarks_have_results(name: str) -> None:
    result = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    assert f"python -m benchmarks.{name}" in README
    assert result["date"] in README

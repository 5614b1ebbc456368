"""What orchestration costs when there is nothing to compute: python -m benchmarks.overhead

Run it in a clean clone after `dvc repro`. Two more clones, which share its cache, take all stages
from there (restored), and are then run once more (unchanged): one through dvc alone, the other
through the Prefect flow with its temporary server and with MLflow logging.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import markdown, save_results

COMMANDS = {
    "dvc alone": ["-m", "dvc", "repro"],
    "Prefect flow": ["-m", "flows.pipeline"],
}


def run(project: Path) -> list[dict[str, Any]]:
    """A row for each way and state: way, state, seconds, stages."""
    stages = len(yaml.safe_load((project / "dvc.lock").read_text())["stages"])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        env = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PREFECT_HOME": str(Path(folder) / "prefect"),
        }
        env.pop("PREFECT_API_URL", None)
        dvc = [sys.executable, "-m", "dvc"]
        cache = _call([*dvc, "cache", "dir"], project, env).strip()
        for way, command in COMMANDS.items():
            clone = Path(folder) / way.replace(" ", "-")
            _call(["git", "clone", "--quiet", str(project), str(clone)], Path(folder), env)
            _call([*dvc, "cache", "dir", "--local", cache], clone, env)
            for state in ("restored", "unchanged"):
                started = time.perf_counter()
                printed = _call([sys.executable, *command], clone, env)
                seconds = time.perf_counter() - started
                if "Running stage" in printed:
                    sys.exit("error: a stage ran: bring this clone up to date first (dvc repro).")
                rows.append({"way": way, "state": state, "seconds": seconds, "stages": stages})
    return rows


def _call(command: list[str], cwd: Path, env: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    header = ["orchestration", "stages are", "in all", "a stage"]
    body = [
        [
            f"{row['way']}, {row['stages']} stages",
            row["state"],
            f"{row['seconds']:.1f} s",
            f"{row['seconds'] / row['stages']:.2f} s",
        ]
        for row in rows
    ]
    return markdown(header, body)


def main() -> None:
    """Measure, print the table, write the results."""
    if not Path("dvc.lock").exists():
        sys.exit("error: there is no dvc.lock here: run dvc repro first.")
    rows = run(Path.cwd())
    print(table(rows))
    print(save_results("overhead", rows))


if __name__ == "__main__":
    main()

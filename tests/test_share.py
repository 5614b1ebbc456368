"""The list of emulators, and what sharing refuses, on run caches written by hand."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.repo import Repo

from flows import remotes, share

CODE = "tasks/compress.py"
MODEL, DATA = "llama@0123456789ab", "pypi:words==1.0/words.txt"
TARGETS = {".*": "ratio"}


class Project:
    """A folder with a DVC cache whose records and files a test writes."""

    def __init__(self, folder: Path) -> None:
        Repo.init(str(folder), no_scm=True).close()
        self.cache = folder / ".dvc/cache"
        self.code = folder / CODE
        self.code.parent.mkdir()
        self.code.write_text("cut()\n")
        self.params = {
            "ratios": [0.5],
            "data": {"source": DATA},
            "compress": {"targets": TARGETS},
        }
        self.write_params()
        self.pointer = self.store(json.dumps({"name": MODEL}).encode())

    def write_params(self) -> None:
        Path("params.yaml").write_text(yaml.safe_dump(self.params))

    def store(self, content: bytes, suffix: str = "") -> str:
        """Put an object into the cache; its hash."""
        hash = hashlib.md5(content).hexdigest() + suffix
        path = self.object(hash)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return hash

    def store_folder(self, *contents: bytes) -> str:
        """Put a folder of files into the cache; its hash."""
        files = [
            {"md5": self.store(content), "relpath": f"{number}"}
            for number, content in enumerate(contents)
        ]
        return self.store(json.dumps(files).encode(), ".dir")

    def object(self, hash: str) -> Path:
        return self.cache / "files/md5" / hash[:2] / hash[2:]

    def record(
        self, command: str, params: dict[str, Any], deps: dict[str, str], outs: dict[str, str]
    ) -> Path:
        """Write the record of a run; runs of the same inputs share a folder."""
        entry = {
            "cmd": f"python -m tasks.{command}",
            "deps": [{"path": path, "hash": "md5", "md5": hash} for path, hash in deps.items()],
            "params": {"params.yaml": params},
            "outs": [
                {"path": path, "hash": "md5", "md5": hash, "size": 3 * 2**20}
                for path, hash in outs.items()
            ],
        }
        key = hashlib.sha256(repr((command, params, deps, sorted(outs))).encode()).hexdigest()
        text = yaml.safe_dump(entry, sort_keys=False)
        path = self.cache / "runs" / key[:2] / key / hashlib.sha256(text.encode()).hexdigest()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def record_factors(self, rows: str = "rows") -> str:
        """Records of prepare and calibrate; the hash of the factors."""
        hash = self.store(rows.encode())
        factors = self.store_folder(b"factors of " + rows.encode())
        prepared = {share_path("rows"): hash, share_path("pointer"): self.pointer}
        self.record("prepare", {"data": self.params["data"]}, {}, prepared)
        self.record("calibrate", {}, prepared, {share_path("factors"): factors})
        return factors

    def record_emulator(
        self, factors: str, targets: dict[str, Any], ratio: str = "0.5", weights: bytes = b"w"
    ) -> str:
        """The record of a compress; the hash of its emulator."""
        deps = {
            share_path("pointer"): self.pointer,
            share_path("factors"): factors,
            CODE: hashlib.md5(b"cut()\n").hexdigest(),
        }
        hash = self.store_folder(b"{}", weights)
        outs = {f"artifacts/emulators/{ratio}": hash}
        self.record(f"compress {ratio}", {"compress": {"targets": targets}}, deps, outs)
        return hash


def share_path(name: str) -> str:
    return {
        "pointer": "artifacts/model.json",
        "rows": "artifacts/data/calibration",
        "factors": "artifacts/factors",
    }[name]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(tmp_path)
    return Project(tmp_path)


def listed(capsys: pytest.CaptureFixture[str], **options: Any) -> dict[str, dict[str, Any]]:
    """What `list --json` tells, by hash."""
    share.list_command(as_json=True, **options)
    return {one["hash"]: one for one in json.loads(capsys.readouterr().out)}


def test_other_targets_at_the_same_ratio_are_another_emulator(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    factors = project.record_factors()
    plain = project.record_emulator(factors, TARGETS)
    mixed = project.record_emulator(factors, {".*mlp.*": 0.2, **TARGETS}, weights=b"m")
    project.record("train 0.5", {}, {}, {"artifacts/adapters/0.5/raw": project.store(b"adapter")})
    found = listed(capsys)
    assert found.keys() == {plain, mixed}
    assert found[plain] == {
        "model": MODEL,
        "data": DATA,
        "rows": hashlib.md5(b"rows").hexdigest(),
        "ratio": "0.5",
        "targets": TARGETS,
        "size": 3 * 2**20,
        "hash": plain,
        "here": True,
        "there": None,
        "current": True,
    }
    assert found[mixed]["targets"] == {".*mlp.*": 0.2, **TARGETS}
    assert not found[mixed]["current"]


def test_an_emulator_is_current_if_params_rows_and_code_are(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    factors = project.record_factors()
    emulator = project.record_emulator(factors, TARGETS)
    smaller = project.record_emulator(factors, TARGETS, "0.3", b"s")
    project.params["data"] = {"source": "/elsewhere"}
    other = project.record_emulator(project.record_factors("others"), TARGETS, weights=b"o")

    def current() -> set[str]:
        return {one["hash"] for one in listed(capsys).values() if one["current"]}

    assert listed(capsys)[other]["data"] == "/elsewhere"
    assert current() == {emulator}
    project.write_params()
    assert current() == {other}
    project.params["data"] = {"source": DATA}
    project.params["ratios"] = [0.3, 0.5]
    project.write_params()
    assert current() == {emulator, smaller}
    project.code.write_text("cut(twice)\n")
    assert current() == set()


def test_an_emulator_without_all_of_its_files_is_gone(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    emulator = project.record_emulator(project.record_factors(), TARGETS)
    assert listed(capsys)[emulator]["here"]
    project.object(hashlib.md5(b"w").hexdigest()).unlink()
    assert not listed(capsys)
    assert not listed(capsys, gone=True)[emulator]["here"]
    share.list_command()
    assert capsys.readouterr().out == "No emulators.\n"


def test_the_table_shows_what_the_remote_has(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    emulator = project.record_emulator(project.record_factors(), TARGETS)
    share.list_command(remote=str(tmp_path / "remote"))
    header, _, row = capsys.readouterr().out.splitlines()
    assert header.split() == [
        "model", "data", "ratio", "targets", "MiB", "hash", "params.yaml", "here", "there"
    ]  # fmt: skip
    rows = hashlib.md5(b"rows").hexdigest()[:8]
    assert row.split() == [
        MODEL, DATA, rows, "0.5", ".*:", "ratio", "3.0", emulator[:8], "yes", "yes", "no"
    ]  # fmt: skip
    project.cache.rename(tmp_path / "remote")
    share.list_command(remote=str(tmp_path / "remote"))
    assert capsys.readouterr().out.splitlines()[2].split()[-3:] == ["yes", "no", "yes"]


def test_of_repeated_runs_the_one_in_dvc_lock_is_kept(project: Project) -> None:
    deps = {CODE: project.store(b"code")}
    first = project.record("compress 0.5", {}, deps, {"cost": "1"})
    second = project.record("compress 0.5", {}, deps, {"cost": "2"})
    other = project.record("compress 0.3", {}, deps, {"cost": "1"})
    unlocked = [project.record("compress 0.8", {}, deps, {"cost": cost}) for cost in "12"]
    assert first.parent == second.parent != other.parent
    remotes.forget_repeated_runs({"compress@0.5": yaml.safe_load(second.read_text())})
    assert not first.exists()
    assert second.exists() and other.exists() and all(path.exists() for path in unlocked)


@pytest.mark.parametrize("shell", ["/bin/sh", None])
def test_dvc_cannot_start_a_stage_while_stages_are_refused(
    project: Project, shell: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SHELL", raising=False)
    if shell:
        monkeypatch.setenv("SHELL", shell)
    stage = {"stages": {"touch": {"cmd": "touch touched", "outs": ["touched"]}}}
    Path("dvc.yaml").write_text(yaml.safe_dump(stage))
    with share._stages_refused():
        lines, problem = share._run("repro")
    assert "Running stage 'touch':" in lines and problem
    assert not Path("touched").exists()
    assert os.environ.get("SHELL") == shell
    assert share._run("repro")[1] is None
    assert Path("touched").exists()


def said(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """The error of a command."""
    monkeypatch.setattr(sys, "argv", ["share", *arguments])
    with pytest.raises(SystemExit) as ended:
        share.main()
    return str(ended.value)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["push"], "dvc.lock names no results to push: run `dvc repro` first."),
        (["pull"], "error: This project has no remote: add one with dvc remote add -d team URL"),
        (["pull", "--remote", "nope"], "remote is 'nope', but the remotes of this project are []"),
        (["list", "--remote", "nope"], "remote is 'nope', but the remotes of this project are []"),
        (["list", "--remote", "http://host/x"], "(http://host/x) keeps no record of runs"),
        (["pull", "--remote", "gone/away"], "gone/away) holds nothing: check"),
        (["pull", "--remote", "x://host"], "Unsupported URL type x://"),
    ],
)
def test_a_remote_that_is_none_is_one_sentence(
    project: Project, monkeypatch: pytest.MonkeyPatch, arguments: list[str], problem: str
) -> None:
    text = said(monkeypatch, *arguments)
    assert text.startswith("error: ") and problem in text and "\n" not in text


def test_remotes_without_a_default_are_named(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(".dvc/config", "a") as config:
        config.write("['remote \"team\"']\n    url = /mnt/team\n")
    problem = "None of this project's remotes (team) is the default one: name one with --remote"
    assert problem in said(monkeypatch, "pull")


def test_outside_of_a_project_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "not inside of a DVC repository" in said(monkeypatch, "list")

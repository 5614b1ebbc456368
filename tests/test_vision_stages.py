"""All stages on a tiny vision-language model, from InternVL's format to the report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emloc.files import read_json, read_jsonl
from tasks.params import load_params
from tests.project import HEALING, make_vision_project, run_stage, write_params
from tests.shell import read_params
from tests.tiny_vision import save_picture

SPLITS = ("train", "validation", "test", "calibration")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A fresh project to run stages in; settings given replace those of its section `data`."""

    def make(**data: Any) -> Path:
        folder = tmp_path / "project"
        params = make_vision_project(folder)
        params["data"] |= data
        write_params(folder, params)
        monkeypatch.chdir(folder)
        monkeypatch.setenv("EMLOC_CACHE", str(tmp_path / "cache"))
        return folder

    return make


def inputs(folder: Path) -> Path:
    return folder.parent / "project-inputs"


def picture_names(split: str) -> list[str]:
    rows = read_jsonl(Path(f"artifacts/data/{split}/rows.jsonl"))
    return [row["messages"][0]["content"][0]["image"] for row in rows]


def stored(*splits: str) -> set[Path]:
    """The pictures of some splits."""
    folders = (Path("artifacts/data") / split for split in splits or SPLITS)
    return {path for folder in folders for path in folder.iterdir() if path.suffix != ".jsonl"}


def test_every_stage_runs_and_scores_with_the_task_s_metrics(
    project: Callable[..., Path],
) -> None:
    folder = project()
    write_params(folder, read_params(folder) | HEALING)
    for name in ("prepare", "calibrate", "teach", "direct", "baseline"):
        run_stage(name)
    for ratio in (0.8, 0.5):
        for name in ("compress", "heal", "train", "correct", "evaluate"):
            run_stage(name, ratio)
    run_stage("report")
    scores = read_json(Path("results/0.5/evaluate.json"))
    assert set(scores["original-corrected"]) == {"vqa_accuracy", "exact_match", "loss"}
    assert read_json("results/0.5/heal.json")["steps"] == 2
    layers = Path("results/0.5/layers.csv").read_text()
    assert "vision_tower" in layers and "language_model" in layers
    page = Path("report/predictions.html").read_text()
    assert page.count("data:image/") >= 6 and "What is" in page


def test_pictures_of_the_chosen_rows_are_kept_by_content(project: Callable[..., Path]) -> None:
    folder = project()
    run_stage("prepare")
    named = {name for split in SPLITS for name in picture_names(split)}
    assert {path.relative_to("artifacts/data").as_posix() for path in stored()} == named
    assert len(stored("train", "validation", "test")) == 40
    for path in stored():
        assert hashlib.sha256(path.read_bytes()).hexdigest().startswith(path.stem)
    for split in SPLITS:
        assert str(folder.parent) not in Path(f"artifacts/data/{split}/rows.jsonl").read_text()


def test_the_same_rows_at_another_place_give_the_same_bytes(
    project: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project()
    run_stage("prepare")
    first = Path("artifacts/data/train/rows.jsonl").read_bytes()
    other = tmp_path / "elsewhere" / "project"
    make_vision_project(other)
    monkeypatch.chdir(other)
    run_stage("prepare")
    assert Path("artifacts/data/train/rows.jsonl").read_bytes() == first


def test_a_broken_picture_is_named_or_left_out(project: Callable[..., Path]) -> None:
    folder = project(train=33, validation=4, test=6)
    broken = inputs(folder) / "images/7.png"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(ValueError, match="row 8.*cut short or corrupt.*data.skip_unreadable"):
        run_stage("prepare")
    assert not Path("artifacts/data").exists()
    params = load_params().model_dump(mode="json")
    params["data"]["skip_unreadable"] = True
    write_params(folder, params)
    run_stage("prepare")
    assert read_json(Path("results/prepare.json"))["unreadable"] == 1
    assert len(stored("train", "validation", "test")) == 43


def test_no_more_pictures_are_opened_than_rows_are_needed(project: Callable[..., Path]) -> None:
    folder = project(train=8, validation=0, test=2)
    run_stage("prepare")
    kept = {path.stem for path in stored()}
    for path in (inputs(folder) / "images").iterdir():  # the others are never looked at
        if hashlib.sha256(path.read_bytes()).hexdigest()[:32] not in kept:
            path.write_bytes(b"broken")
    run_stage("prepare")
    assert {path.stem for path in stored()} == kept


def test_a_source_of_its_own_for_the_test_rows(project: Callable[..., Path]) -> None:
    folder = project(train=30)
    source = inputs(folder)
    lines = [json.loads(line) for line in (source / "rows.jsonl").read_text().splitlines()]
    for number in (100, 101):
        save_picture(source / f"images/{number}.png", 28, 28, seed=number)
        lines.append({**lines[0], "image": f"{number}.png"})
    others = "".join(json.dumps(line) + "\n" for line in (lines[0], *lines[-2:]))
    (source / "test.jsonl").write_text(others)
    meta = read_json(source / "meta.json")
    meta["tiny"]["annotation"] = str(source / "test.jsonl")
    (source / "test.json").write_text(json.dumps(meta))
    params = load_params().model_dump(mode="json")
    params["data"] |= {"test_source": str(source / "test.json"), "test": 2, "train": 40}
    write_params(folder, params)
    run_stage("prepare")  # the row that also stands in the training source is left out
    assert len(picture_names("test")) == 2
    assert not {Path(name).name for name in picture_names("test")} & {
        Path(name).name for name in picture_names("train")
    }


def test_repeated_rows_stand_in_the_training_split_only(project: Callable[..., Path]) -> None:
    folder = project()
    meta = read_json(inputs(folder) / "meta.json")
    meta["tiny"]["repeat_time"] = 3
    (inputs(folder) / "meta.json").write_text(json.dumps(meta))
    run_stage("prepare")
    counts = read_json(Path("results/prepare.json"))["rows"]
    assert counts == {"train": 90, "validation": 4, "test": 6, "calibration": 8}
    assert len(set(picture_names("calibration"))) == 8

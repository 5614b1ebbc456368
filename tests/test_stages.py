"""The stages one after the other in one process, on a tiny model: what they leave behind."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from emloc.files import read_json, read_jsonl
from emloc.metrics import score
from emloc.models import load_model
from emloc.trainer import StepWatch
from tests.project import HEALING, make_project, run_stage, write_params

PLAIN = ("prepare", "calibrate", "teach", "direct", "baseline")
BY_RATIO = ("compress", "heal", "train", "correct", "evaluate")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which every stage ran."""
    folder = tmp_path_factory.mktemp("stages") / "project"
    params = make_project(folder) | HEALING
    write_params(folder, params)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("EMLOC_CACHE", str(folder / "cache"))
        for name in PLAIN:
            run_stage(name)
        for ratio in params["ratios"]:
            for name in BY_RATIO:
                run_stage(name, ratio)
        run_stage("report")
    return folder


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], Path]:
    """A fresh project to run stages in; sections given are updated in its params."""

    def make(changes: dict[str, Any]) -> Path:
        folder = tmp_path / "project"
        params = make_project(folder)
        for section, values in changes.items():
            params[section] = {**params[section], **values} if isinstance(values, dict) else values
        write_params(folder, params)
        monkeypatch.chdir(folder)
        monkeypatch.setenv("EMLOC_CACHE", str(tmp_path / "cache"))
        return folder

    return make


def test_splits_are_disjoint_and_calibration_rows_come_from_train(finished: Path) -> None:
    splits = {
        name: [
            json.dumps(row) for row in read_jsonl(finished / f"artifacts/data/{name}/rows.jsonl")
        ]
        for name in ("train", "validation", "test", "calibration")
    }
    assert [len(rows) for rows in splits.values()] == [30, 4, 6, 8]
    assert len({*splits["train"], *splits["validation"], *splits["test"]}) == 40
    assert set(splits["calibration"]) <= set(splits["train"])


def test_outs_hold_no_path_of_this_machine(finished: Path) -> None:
    for file in finished.glob("artifacts/**/*.json"):
        assert str(finished.parent) not in file.read_text(), file


def test_emulators_shrink_with_the_ratio_and_lose_more(finished: Path) -> None:
    sizes, losses = [], []
    for ratio in ("0.8", "0.5"):
        sizes.append(read_json(finished / f"results/{ratio}/compress.json")["emulator_bytes"])
        with open(finished / f"results/{ratio}/layers.csv", newline="") as file:
            losses.append(sum(float(row["loss"]) for row in csv.DictReader(file)))
    assert sizes[0] > sizes[1]
    assert losses[0] < losses[1]


def test_emulators_are_healed_at_their_size(finished: Path) -> None:
    for ratio in ("0.8", "0.5"):
        found = read_json(finished / f"results/{ratio}/heal.json")
        assert found["divergence_after"] != found["divergence_before"] > 0
        cut, healed = (
            finished / f"artifacts/{kind}/{ratio}/model.safetensors"
            for kind in ("emulators", "healed")
        )
        assert cut.stat().st_size == healed.stat().st_size
        assert cut.read_bytes() != healed.read_bytes()
    page = (finished / "report/report.md").read_text()
    assert "| heal " in page and "| teach " in page


def test_without_healing_the_emulator_is_the_one_that_was_cut(
    project: Callable[[dict[str, Any]], Path],
) -> None:
    folder = project({})
    for name in ("prepare", "calibrate", "teach"):
        run_stage(name)
    assert list((folder / "artifacts/teacher").iterdir()) == []
    for name in ("compress", "heal"):
        run_stage(name, 0.5)
    files = {
        kind: {
            path.name: path.read_bytes() for path in (folder / f"artifacts/{kind}/0.5").iterdir()
        }
        for kind in ("emulators", "healed")
    }
    assert files["emulators"] == files["healed"]
    assert read_json(folder / "results/0.5/heal.json") == {"steps": 0}


def test_every_way_is_scored_on_the_same_rows(finished: Path) -> None:
    test = [row["answer"] for row in read_jsonl(finished / "artifacts/data/test/rows.jsonl")]
    for ratio in ("0.8", "0.5"):
        metrics = read_json(finished / f"results/{ratio}/evaluate.json")
        assert set(metrics) == {"emulator-raw", "original-raw", "original-corrected"}
        for way, values in metrics.items():
            said = read_jsonl(finished / f"results/{ratio}/predictions/{way}.jsonl")
            assert [row["answer"] for row in said] == test
            names = [name for name in values if name != "loss"]
            assert names == ["exact_match", "normalized_match", "token_f1"]
            expected = score([row["prediction"] for row in said], [[a] for a in test], names)
            assert expected.items() <= values.items()


def test_where_the_weights_were_is_told_beside_the_cost(finished: Path) -> None:
    cost = read_json(finished / "results/0.5/evaluate.cost.json")
    baseline = read_json(finished / "results/baseline/baseline.cost.json")
    for weights, file in ((cost, "0.5/evaluate"), (baseline, "baseline/baseline")):
        ways = read_json(finished / f"results/{file}.json")
        assert weights["weights"] == dict.fromkeys(ways, {"cpu": 1.0})


def test_raw_and_corrected_adapters_differ_on_the_original(finished: Path) -> None:
    model = load_model(finished.parent / "project-inputs/model", dtype=torch.float32, device="cpu")
    logits = []
    for kind in ("raw", "corrected"):
        adapted = PeftModel.from_pretrained(model, str(finished / f"artifacts/adapters/0.5/{kind}"))
        with torch.no_grad():
            logits.append(adapted(torch.arange(8)[None]).logits)
        model = adapted.unload()
    assert (logits[0] - logits[1]).abs().max() > 1e-4


def test_the_report_names_every_row_and_its_pictures_are_there(finished: Path) -> None:
    page = (finished / "report/report.md").read_text()
    for text in (
        "original alone",
        "original + direct LoRA",
        "emulator + raw",
        "original + raw",
        "original + corrected",
        "0.8",
        "0.5",
        "artifacts/adapters/0.5/corrected",
    ):
        assert text in page
    for name in ("quality", "layers", "training", "costs"):
        assert (finished / f"report/{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({name}.png)" in page
    with open(finished / "report/quality.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["ratio"] for row in rows] == ["", "", *["0.8"] * 3, *["0.5"] * 3]


def test_no_checkpoint_is_left_after_training(finished: Path) -> None:
    assert not [path for path in (finished / ".emloc/checkpoints").iterdir() if path.is_dir()]


def test_a_stopped_training_goes_on_and_gives_the_same_adapter(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = make_project(tmp_path / "project")
    params["model"]["source"] = str(finished.parent / "project-inputs/model")
    write_params(tmp_path / "project", params)
    for name in ("artifacts", "results"):
        shutil.copytree(finished / name, tmp_path / "project" / name)
    monkeypatch.chdir(tmp_path / "project")
    adapter = Path("artifacts/adapters/0.5/raw/adapter_model.safetensors")
    expected = adapter.read_bytes()
    shutil.rmtree(adapter.parent)
    begun = []

    def stop_at_third_step(watch: StepWatch, args: Any, state: Any, control: Any, **_: Any) -> None:
        begun.append(state.global_step)
        if state.global_step == 3 and len(begun) == 3:
            raise KeyboardInterrupt
        step_end(watch, args, state, control)

    step_end = StepWatch.on_step_end
    monkeypatch.setattr(StepWatch, "on_step_end", stop_at_third_step)
    with pytest.raises(KeyboardInterrupt):
        run_stage("train", 0.5)
    assert not adapter.exists()
    run_stage("train", 0.5)
    assert begun == [1, 2, 3, 3, 4]
    assert adapter.read_bytes() == expected


def test_without_direct_the_report_has_no_upper_bound(
    project: Callable[[dict[str, Any]], Path],
) -> None:
    folder = project({"ratios": [0.5], "evaluate": {"direct": False}})
    for name in PLAIN:
        run_stage(name)
    for name in BY_RATIO:
        run_stage(name, 0.5)
    run_stage("report")
    assert "direct LoRA" not in (folder / "report/report.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibrate": {"samples": 31}}, "calibrate.samples is 31, but there are only 30"),
        ({"data": {"train": 3000}}, "3000"),
        ({"data": {"max_length": 8}}, "data.max_length"),
        ({"data": {"source": "nothing.jsonl"}}, "nothing.jsonl"),
        ({"model": {"source": "./nowhere"}}, "nowhere"),
    ],
)
def test_prepare_refuses_bad_input_and_leaves_nothing(
    project: Callable[[dict[str, Any]], Path], changes: dict[str, Any], message: str
) -> None:
    folder = project(changes)
    with pytest.raises(ValueError, match=message):
        run_stage("prepare")
    assert not (folder / "artifacts").exists()


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("calibrate", {"calibrate": {"targets": [".*nothing.*"]}}, "calibrate.targets: '.*nothing"),
        ("teach", {"teach": {"rows": 4, "top_k": 10**6}}, "top_k is 1000000"),
        (
            "compress",
            {"compress": {"targets": {".*nothing.*": "ratio"}}},
            "compress.targets: '.*no",
        ),
        ("compress", {"compress": {"targets": {".*": 0.95}}}, "calibrate.max_ratio"),
        ("train", {"train": {"lora": {"target_modules": "nothing"}}}, "target_modules"),
    ],
)
def test_a_stage_refuses_bad_input_and_leaves_nothing(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    params = make_project(tmp_path / "project")
    params["model"]["source"] = str(finished.parent / "project-inputs/model")
    for section, values in changes.items():
        params[section] |= values
    write_params(tmp_path / "project", params)
    for name in ("artifacts", "results"):
        (tmp_path / "project" / name).symlink_to(finished / name)
    before = {path: path.stat().st_mtime_ns for path in finished.glob("artifacts/*/*")}
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("EMLOC_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError) as raised:
        run_stage(stage, *([0.5] if stage in BY_RATIO else []))
    assert message in str(raised.value)
    assert {path: path.stat().st_mtime_ns for path in finished.glob("artifacts/*/*")} == before


def test_a_changed_original_is_noticed(project: Callable[[dict[str, Any]], Path]) -> None:
    folder = project({})
    run_stage("prepare")
    weights = folder.parent / "project-inputs/model/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors has changed since `prepare`"):
        run_stage("calibrate")

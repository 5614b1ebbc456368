"""Results read from dvc.lock: what is read, under which key, and what is refused."""

from __future__ import annotations

import copy
import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.results import (
    ResultError,
    flatten,
    group_of,
    key_of,
    read_branch,
    read_curve,
    read_samples,
    read_shared,
)
from flows.stages import ancestors, read_graph, read_lock
from tests.finished import WAYS, change_params, make_finished


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with results of two ratios."""
    folder = tmp_path_factory.mktemp("finished") / "project"
    make_finished(folder)
    return folder


@pytest.fixture
def project(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the current directory."""
    folder = tmp_path / "pro ject"
    shutil.copytree(finished, folder)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return folder


def entries_of(ratio: str) -> dict[str, Any]:
    graph, lock = read_graph(), read_lock()
    return copy.deepcopy({name: lock[name] for name in ancestors(graph, [f"evaluate@{ratio}"])})


def test_the_key_is_of_everything_and_the_group_of_what_all_ratios_share(project: Path) -> None:
    first, second = entries_of("0.8"), entries_of("0.5")
    assert key_of(first) != key_of(second)
    assert group_of(first) == group_of(second)
    reordered = dict(reversed(first.items()))
    assert key_of(reordered) == key_of(first)

    other = entries_of("0.8")
    other["train@0.8"]["outs"][0]["md5"] = "0" * 32
    assert key_of(other) != key_of(first)
    assert group_of(other) == group_of(first)


@pytest.mark.parametrize(
    "change",
    [
        lambda entries: entries["correct@0.8"]["params"]["params.yaml"].update({"correct": 1}),
        lambda entries: entries["train@0.8"]["deps"][-1].update({"md5": "0" * 32}),
        lambda entries: entries["evaluate@0.8"].update({"cmd": "python -m other 0.8"}),
        lambda entries: entries["calibrate"]["deps"][0].update({"md5": "0" * 32}),
    ],
    ids=["params", "code", "command", "data"],
)
def test_another_group_has_other_params_code_or_data(
    project: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    entries = entries_of("0.8")
    change(entries)
    assert group_of(entries) != group_of(entries_of("0.8"))


def test_flattening_keeps_mappings_whose_keys_are_no_names() -> None:
    tree = {"train": {"lora": {"r": 8}, "pattern": {}}, "targets": {r".*\.q": "ratio"}, "n": None}
    assert flatten(tree, separator=".") == {
        "train.lora.r": 8,
        "train.pattern": {},
        "targets": {r".*\.q": "ratio"},
        "n": None,
    }


def test_a_curve_has_no_points_for_empty_cells(tmp_path: Path) -> None:
    file = tmp_path / "train.csv"
    file.write_text("step,loss,eval_loss\n10,2.5,\n20,1.5,0.5\n")
    assert read_curve(file) == {"loss": [(10, 2.5), (20, 1.5)], "eval_loss": [(20, 0.5)]}
    file.write_text("name,loss\nlayer,1\n")
    assert read_curve(file) == {}


def test_samples_of_chats_show_the_turns_that_were_asked(tmp_path: Path) -> None:
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello")]
    messages = [{"role": role, "content": content} for role, content in turns]
    row = json.dumps({"messages": messages, "prediction": "Hey"}) + "\n"
    (tmp_path / "original.jsonl").write_text(row * 30)
    samples = read_samples(tmp_path, count=20)
    assert samples["prompt"] == ["system: Be brief.\nuser: Hi"] * 20
    assert (samples["answer"][0], samples["original"][0]) == ("Hello", "Hey")


def test_samples_of_rows_with_pictures_name_them(tmp_path: Path) -> None:
    parts = [{"type": "image", "image": "images/12ab.png"}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "a cat"}]
    row = {"messages": messages, "prediction": "a dog"}
    (tmp_path / "original.jsonl").write_text(json.dumps(row) + "\n")
    samples = read_samples(tmp_path)
    assert samples["prompt"] == ["user: [12ab.png] What is it?"]
    assert (samples["answer"], samples["original"]) == (["a cat"], ["a dog"])


def test_a_branch_is_what_its_files_and_dvc_lock_say(project: Path) -> None:
    branch = read_branch("0.5")
    scores = json.loads(Path("results/0.5/evaluate.json").read_text())
    for way in WAYS:
        assert branch.metrics[f"evaluate/{way}/exact_match"] == scores[way]["exact_match"]
    assert branch.metrics["system/train_seconds"] == 5.5
    assert branch.metrics["system/calibrate_peak_gib"] == 1
    assert "train/validation_loss" not in branch.metrics
    with open("results/0.5/train.csv", newline="") as file:
        rows = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
    assert branch.curves["train/curve/loss"] == rows
    assert branch.params["train.lora.r"] == "8"
    assert json.loads(branch.params["compress.targets"]) == {r".*\.layers\.\d+\..*": "ratio"}
    sections = {key.partition(".")[0] for key in branch.params}
    assert not sections & {"ratios", "mlflow", "device"}
    outs = {out["path"]: out["md5"] for entry in read_lock().values() for out in entry["outs"]}
    assert branch.hashes["emulator"] == outs["artifacts/emulators/0.5"]
    assert branch.hashes["adapter.corrected"] == outs["artifacts/adapters/0.5/corrected"]
    assert branch.hashes["data.test"] == outs["artifacts/data/test"]
    assert branch.machine == {"device": "cpu", "cpu": "a processor"}


def test_the_shared_results_are_of_no_ratio_and_of_the_same_group(project: Path) -> None:
    shared, branch = read_shared(), read_branch("0.8")
    assert (shared.group, shared.params) == (branch.group, branch.params)
    assert "baseline/original/loss" in shared.metrics
    assert "direct/curve/loss" in shared.curves
    assert not [key for key in shared.metrics if key.startswith(("train/", "evaluate/"))]
    assert {"adapter.direct", "report"} <= set(shared.hashes)
    assert "adapter.raw" not in shared.hashes


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda: change_params(lambda params: params["correct"].update(limit=1)),
            "correct in params.yaml is modified",
        ),
        (lambda: Path("results/0.5/train.csv").unlink(), "results/0.5/train.csv is deleted"),
        (lambda: Path("results/0.5/evaluate.json").write_text("{}"), "evaluate.json is modified"),
        (lambda: Path("tasks/train.py").write_text("x"), "tasks/train.py is modified"),
        (lambda: Path("dvc.lock").unlink(), r"no result of ratio 0.5 yet \(pretrain did not run\)"),
        (
            lambda: change_params(lambda params: params.update(ratios=[0.8])),
            "the ratios of params.yaml are 0.8",
        ),
    ],
)
def test_results_that_are_not_current_are_refused(
    project: Path, spoil: Callable[[], object], message: str
) -> None:
    read_branch("0.5")
    spoil()
    with pytest.raises(ResultError, match=message):
        read_branch("0.5")

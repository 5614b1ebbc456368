"""The plan on the command line and in a project: printed, written, and held by every stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from emloc import files
from emloc.devices import free_bytes
from emloc.files import read_json, writing
from emloc.plan.subject import load_subject
from emloc.plan.work import empty_pictures
from tasks import plan, stage
from tasks.budget import check, planner_of
from tasks.params import Params, load_params
from tests.internvl_original import SMALL, config, save_original
from tests.project import (
    HEALING,
    make_diffusion_project,
    make_project,
    make_vision_project,
    run_stage,
    write_params,
)
from tests.test_cli import emloc
from tests.tiny import save_tiny
from tests.tiny_diffusion import save_tiny_pipeline
from tests.tiny_vision import save_tiny_vision

RATIO = "--ratio 0.5"


def test_a_language_model_is_planned_from_its_config_alone(tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path / "model")
    (path / "model.safetensors").unlink()
    printed = emloc(f"plan {path} --memory 8GiB {RATIO} --tokens 40 --labels 10 --batch-size 2")
    assert "there is 8.00 GiB on" in printed
    assert "2 rows of 40 tokens at once" in printed
    for stage_name in ("calibrate", "train", "correct", "answer with", "direct LoRA"):
        assert f"\n| {stage_name}" in printed
    assert "The largest ratio whose training fits is 0.9." in printed
    least = emloc(f"plan {path} --memory 1MiB {RATIO} --tokens 40 --labels 10")
    assert "no emulator can be trained in 0.00 GiB: at ratio 0.01 it takes" in least


def test_a_gpu_that_is_not_here_can_be_planned_for(tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path / "model")
    line = f"plan {path} {RATIO} --tokens 40 --labels 10 --device xpu"
    printed = emloc(f"{line} --memory 8GiB")
    assert "8.00 GiB on xpu, of which 0.75 GiB goes to the runtime" in printed
    with pytest.raises(ValueError, match="xpu"):
        emloc(line)


def test_pictures_add_to_the_plan(tmp_path: Path) -> None:
    path = save_tiny_vision("internvl-llama", tmp_path / "model")
    model = load_subject(path).build(torch.float32)
    assert empty_pictures(model, 3)["pixel_values"][:2] == (3, 3)
    many = emloc(f"plan {path} --memory 8GiB {RATIO} --tokens 40 --labels 10 --tiles 400")
    none = emloc(f"plan {path} --memory 8GiB {RATIO} --tokens 40 --labels 10")
    assert (
        many.split("| calibrate")[1].split("\n")[0] != none.split("| calibrate")[1].split("\n")[0]
    )
    text = save_tiny("llama", tmp_path / "text")
    with pytest.raises(ValueError, match="3 pictures were asked for, but LlamaForCausalLM takes"):
        emloc(f"plan {text} --tiles 3")


def test_a_pipeline_is_planned_by_its_resolution(tmp_path: Path) -> None:
    path = save_tiny_pipeline("flux", tmp_path / "model")
    printed = emloc(f"plan {path} --memory 8GiB {RATIO} --batch-size 2 --resolution 32")
    assert "Training: 2 pictures at once" in printed
    assert "answer with" not in printed


def test_internvl_as_published_is_planned_before_it_is_converted(tmp_path: Path) -> None:
    path = tmp_path / "model"
    save_original(path, config("Qwen2ForCausalLM", SMALL))
    assert "The largest ratio" in emloc(f"plan {path} --memory 8GiB {RATIO} --tokens 40")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Params]:
    """Makes a project whose `memory.budget` is given, and goes there."""

    def make(budget: str | None, kind: Callable[[Path], dict] = make_project) -> Params:
        folder = tmp_path / "project"
        params = kind(folder)
        monkeypatch.chdir(folder)
        monkeypatch.setenv("EMLOC_CACHE", str(tmp_path / "cache"))
        write_params(folder, {**params, "memory": {"budget": budget}})
        return load_params()

    return make


def test_stages_write_their_planned_peak_beside_the_measured_one(project: Callable) -> None:
    project("16GiB")
    for name in ("prepare", "calibrate", "direct", "baseline"):
        run_stage(name)
    for name in ("compress", "heal", "train", "correct"):
        run_stage(name, 0.5)
    files = ["calibrate.cost", "baseline/baseline.cost", "0.5/train.cost", "0.5/correct.cost"]
    for file in files:
        cost = read_json(f"results/{file}.json")
        assert 0 < cost["planned_bytes"] < 2 * cost["peak_bytes"]
    assert read_json("results/0.5/compress.cost.json")["planned_bytes"] is None


@pytest.mark.parametrize("kind", [make_vision_project, make_diffusion_project])
def test_other_kinds_of_models_are_planned_by_their_rows(
    project: Callable, kind: Callable[[Path], dict]
) -> None:
    params = project("16GiB", kind)
    before = check(params, "train", 0.5)
    run_stage("prepare")
    after = check(params, "train", 0.5)
    assert before and after
    longest = planner_of(params).work.size
    assert longest < params.data.max_length * params.train.batch_size


def test_without_a_budget_no_stage_is_planned(
    project: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    project(None)
    monkeypatch.setattr("tasks.budget.check", lambda *_: pytest.fail("was planned"))
    run_stage("prepare")
    run_stage("calibrate")
    assert read_json("results/calibrate.cost.json")["planned_bytes"] is None


@pytest.mark.parametrize(
    ("name", "ratio", "knob"),
    [
        ("calibrate", None, "lower calibrate.samples"),
        ("train", 0.5, "lower train.batch_size or the ratio"),
        ("direct", None, "evaluate.direct to false"),
        ("correct", 0.5, "set device to cpu"),
    ],
)
def test_a_stage_that_does_not_fit_does_not_start(
    project: Callable, name: str, ratio: float | None, knob: str
) -> None:
    params = project("1MiB")
    shown = name if ratio is None else f"{name}@{ratio}"
    with pytest.raises(ValueError, match=f"{shown} is planned to take .* memory.budget") as raised:
        check(params, name, ratio)
    assert knob in str(raised.value) and "\n" not in str(raised.value)


def test_a_stage_that_fits_the_budget_but_not_what_is_free_does_not_start(
    project: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = project("16GiB")
    monkeypatch.setattr("tasks.budget.free_bytes", lambda _: 2**20)
    with pytest.raises(ValueError, match=r"0\.00 GiB is free: lower train\.batch_size"):
        check(params, "train", 0.5)


def test_the_chosen_ratio_is_written_and_comments_stay(project: Callable) -> None:
    project("16GiB")
    file = Path("params.yaml")
    content = yaml.safe_load(file.read_text())
    del content["ratios"]
    file.write_text("# mine\nratios: [0.8, 0.5]  # all of them\n" + yaml.safe_dump(content))
    plan.run(write=True)
    assert load_params().ratios == [0.9]
    assert file.read_text().startswith("# mine\nratios: [0.9]       # all of them\n")


def test_ratios_on_several_lines_are_left_alone(project: Callable) -> None:
    project("16GiB")
    before = Path("params.yaml").read_text()
    assert "ratios:\n- 0.8" in before
    with pytest.raises(ValueError, match=r"on one line: write ratios: \[0\.4\] yourself"):
        plan.write_ratio(0.4)
    assert Path("params.yaml").read_text() == before


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_running_out_of_memory_names_the_stage_and_what_to_change(
    project: Callable, error: Exception
) -> None:
    params = project(None)
    file = Path("results/train.cost.json")
    with (
        pytest.raises(ValueError, match="train ran out of memory on cpu, where .* is free"),
        stage.costing(file, params, "train", 0.5),
    ):
        raise error
    assert not file.exists()
    with pytest.raises(RuntimeError, match="another"), stage.costing(file, params, "train", 0.5):
        raise RuntimeError("another")


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="x will take .* GiB, but its disk has only"),
        writing(tmp_path / "x", size=2**60),
    ):
        pytest.fail("was begun")
    assert not list(tmp_path.iterdir())
    assert files.shutil.disk_usage(tmp_path).free < 2**60


def test_free_memory_is_a_part_of_what_there_is() -> None:
    assert 0 < free_bytes(torch.device("cpu")) < 2**44


@pytest.mark.parametrize("kind", [make_project, make_vision_project, make_diffusion_project])
def test_teaching_and_healing_are_planned(project: Callable, kind: Callable[[Path], dict]) -> None:
    project("16GiB", kind)
    write_params(Path.cwd(), yaml.safe_load(Path("params.yaml").read_text()) | HEALING)
    for name in ("prepare", "calibrate", "teach"):
        run_stage(name)
    for name in ("compress", "heal"):
        run_stage(name, 0.5)
    for file in ("teach", "0.5/heal"):
        cost = read_json(f"results/{file}.cost.json")
        assert 0 < cost["planned_bytes"] < 2 * cost["peak_bytes"]

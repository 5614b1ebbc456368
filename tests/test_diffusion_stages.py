"""All stages on tiny diffusion pipelines, from a folder of pictures to the contact sheet."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file

from emloc.diffusion.encoding import Encoded
from emloc.files import read_json, read_jsonl
from tasks.params import load_params
from tests.project import HEALING, make_diffusion_project, run_stage, write_params
from tests.tiny_vision import save_picture

PLAIN = ("prepare", "calibrate", "teach", "direct", "baseline")
BY_RATIO = ("compress", "heal", "train", "correct", "evaluate")
WAYS = ("emulator-raw", "original-raw", "original-corrected")
WEIGHTS = "pytorch_lora_weights.safetensors"


def run_all(ratios: list[float]) -> None:
    for name in PLAIN:
        run_stage(name)
    for ratio in ratios:
        for name in BY_RATIO:
            run_stage(name, ratio)
    run_stage("report")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a tiny Flux in which every stage ran."""
    folder = tmp_path_factory.mktemp("stages") / "project"
    params = make_diffusion_project(folder) | HEALING
    write_params(folder, params)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("EMLOC_CACHE", str(folder / "cache"))
        run_all(params["ratios"])
    return folder


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A fresh project to run stages in; sections given are updated in its params."""

    def make(name: str = "flux", **changes: dict[str, Any]) -> Path:
        folder = tmp_path / "project"
        params = make_diffusion_project(folder, name)
        for section, values in changes.items():
            params[section] |= values
        write_params(folder, params)
        monkeypatch.chdir(folder)
        monkeypatch.setenv("EMLOC_CACHE", str(tmp_path / "cache"))
        return folder

    return make


def test_every_way_draws_every_prompt_with_every_seed(finished: Path) -> None:
    names = {f"{prompt:02d}-{seed}.png" for prompt in (0, 1) for seed in (0, 1)}
    folders = [finished / f"results/{r}/predictions/{w}" for r in ("0.8", "0.5") for w in WAYS]
    folders += [finished / f"results/baseline/predictions/{way}" for way in ("original", "direct")]
    for folder in folders:
        assert {path.name for path in folder.iterdir()} == names
        assert all(Image.open(folder / name).size == (16, 16) for name in names)


def test_losses_are_at_the_same_noise(finished: Path) -> None:
    losses = read_json(finished / "results/0.8/evaluate.json")
    original = read_json(finished / "results/baseline/baseline.json")["original"]["loss"]
    for way in WAYS:
        assert losses[way].keys() == {"loss"}
        assert losses[way]["loss"] == pytest.approx(original, rel=0.5)
        assert losses[way]["loss"] != original


def test_the_report_has_a_contact_sheet(finished: Path) -> None:
    page = (finished / "report/report.md").read_text()
    assert "![What each model draws](pictures.png)" in page
    assert "predictions.html" not in page and "nats" not in page
    sheet = Image.open(finished / "report/pictures.png")
    assert sheet.width > 4 * 16 and sheet.height > 9 * 16
    for name in ("quality", "layers", "training", "costs"):
        assert f"({name}.png)" in page and (finished / f"report/{name}.png").exists()


def test_adapters_load_with_diffusers_alone_and_differ(finished: Path) -> None:
    model = finished.parent / "project-inputs/model"
    pictures = {}
    for kind in ("raw", "corrected"):
        folder = finished / f"artifacts/adapters/0.5/{kind}"
        pipeline = FluxPipeline.from_pretrained(model)
        pipeline.load_lora_weights(folder)
        pipeline.set_progress_bar_config(disable=True)
        drawn = pipeline(
            "a sks dog", height=16, width=16, num_inference_steps=2, guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0), output_type="pt",
        )  # fmt: skip
        pictures[kind] = drawn.images
    assert (pictures["raw"] - pictures["corrected"]).abs().max() > 1e-3


def test_pictures_while_training_lie_beside_the_adapter(finished: Path) -> None:
    sheet = Image.open(finished / "artifacts/adapters/0.5/raw/training.png")
    assert sheet.height > sheet.width / 2  # a strip after steps 2 and 4
    assert not [path for path in (finished / ".emloc/checkpoints").iterdir() if path.is_dir()]


def test_encodings_follow_the_rows(finished: Path) -> None:
    for split in ("train", "test", "calibration"):
        rows = read_jsonl(finished / f"artifacts/data/{split}/rows.jsonl")
        encoded = Encoded.load(finished / f"artifacts/data/{split}/encoded.safetensors")
        assert len(encoded) == len(rows) == 5
        assert encoded.means.shape == (5, 4, 8, 8)
        assert len(encoded.prompts) == 1


@pytest.mark.parametrize("name", ["sd3", "sdxl"])
@pytest.mark.slow
def test_other_families_go_through_all_stages(project: Callable[..., Path], name: str) -> None:
    folder = project(name)
    run_all([0.8, 0.5])
    scores = read_json(folder / "results/0.5/evaluate.json")
    assert all(0 < scores[way]["loss"] < 100 for way in WAYS)


def test_class_pictures_join_the_training_only(project: Callable[..., Path]) -> None:
    prior = {"prompt": "a dog", "count": 3, "steps": 1, "guidance_scale": 1.0}
    dreambooth = {"prompt": "a sks dog", "resolution": 16, "prior": prior}
    folder = project(data={"dreambooth": dreambooth})
    run_stage("prepare")
    counts = read_json(folder / "results/prepare.json")["rows"]
    assert counts == {"train": 8, "validation": 0, "test": 5, "calibration": 5}
    train = Encoded.load(folder / "artifacts/data/train/encoded.safetensors")
    assert train.prior.tolist() == [False] * 5 + [True] * 3
    assert len(train.prompts) == 2
    run_stage("calibrate")
    run_stage("compress", 0.5)
    run_stage("heal", 0.5)
    run_stage("train", 0.5)
    assert load_file(folder / f"artifacts/adapters/0.5/raw/{WEIGHTS}")


def test_class_pictures_of_a_folder(project: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "dogs"
    source.mkdir()
    save_picture(source / "0.png", 20, 20, seed=9)
    prior = {"prompt": "a dog", "count": 2, "source": str(source)}
    dreambooth = {"prompt": "a sks dog", "resolution": 16, "prior": prior}
    project(data={"dreambooth": dreambooth})
    with pytest.raises(ValueError, match="holds 1 pictures, but count is 2"):
        run_stage("prepare")


def test_pictures_of_the_subject_can_be_class_pictures_too(project: Callable[..., Path]) -> None:
    folder = project()
    source = str(folder.parent / "project-inputs/pictures")
    params = load_params().model_dump(mode="json")
    params["data"]["dreambooth"]["prior"] = {"prompt": "a dog", "count": 5, "source": source}
    write_params(folder, params)
    run_stage("prepare")
    train = Encoded.load(folder / "artifacts/data/train/encoded.safetensors")
    assert train.prior.tolist() == [False] * 5 + [True] * 5
    assert train.captions.tolist() == [0] * 5 + [1] * 5


def test_test_pictures_are_none_of_the_training_source(project: Callable[..., Path]) -> None:
    folder = project()
    source = str(folder.parent / "project-inputs/pictures")
    params = load_params().model_dump(mode="json")
    params["data"] |= {"test_source": source, "test": 2}
    write_params(folder, params)
    with pytest.raises(ValueError, match="there are 0 different rows"):
        run_stage("prepare")


def test_plain_svd_needs_no_samples(project: Callable[..., Path]) -> None:
    folder = project(calibrate={"samples": 0})
    run_stage("prepare")
    run_stage("calibrate")
    assert {
        entry["tokens"] for entry in read_json(Path("artifacts/factors/factors.json"))["modules"]
    } == {0}
    assert not read_jsonl(folder / "artifacts/data/calibration/rows.jsonl")


def test_captions_of_their_own_and_held_out_pictures(project: Callable[..., Path]) -> None:
    dreambooth = {"prompt": None, "resolution": 16}
    folder = project(data={"dreambooth": dreambooth, "test": 2})
    pictures = folder.parent / "project-inputs/pictures"
    with pytest.raises(ValueError, match="caption"):
        run_stage("prepare")
    lines = [{"file_name": f"{n}.png", "text": f"dog number {n}"} for n in range(5)]
    (pictures / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_stage("prepare")
    train, test = (
        {row["caption"] for row in read_jsonl(folder / f"artifacts/data/{split}/rows.jsonl")}
        for split in ("train", "test")
    )
    assert len(train) == 3 and len(test) == 2 and not train & test


def test_a_broken_picture_is_named_or_left_out(project: Callable[..., Path]) -> None:
    folder = project()
    broken = folder.parent / "project-inputs/pictures/3.png"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(ValueError, match="3.png.*data.skip_unreadable"):
        run_stage("prepare")
    assert not Path("artifacts/data").exists()
    params = load_params().model_dump(mode="json")
    params["data"]["skip_unreadable"] = True
    write_params(folder, params)
    run_stage("prepare")
    prepared = read_json(Path("results/prepare.json"))
    assert prepared["unreadable"] == 1 and prepared["rows"]["train"] == 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"dreambooth": None}}, "noise is set.*but data.dreambooth is null"),
        ({"evaluate": {"metrics": ["exact_match"]}}, "does not score pictures: take some of loss"),
        ({"evaluate": {"metrics": ["clip_i"]}}, "clip"),
        ({"train": {"prior_weight": -1}}, "prior_weight is -1"),
        ({"noise": {"weighting": "log"}}, "weighting is 'log'"),
        ({"noise": {"wieghting": "mode"}}, "no known key; did you mean weighting"),
    ],
)
def test_settings_that_do_not_fit(
    project: Callable[..., Path], changes: dict[str, Any], said: str
) -> None:
    project(**changes)
    with pytest.raises(ValueError, match=said):
        load_params()


def test_a_resolution_that_does_not_divide(project: Callable[..., Path]) -> None:
    project(data={"dreambooth": {"prompt": "a sks dog", "resolution": 18}})
    with pytest.raises(ValueError, match="18.*16|20"):
        run_stage("prepare")

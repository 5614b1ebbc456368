"""The command line on plain folders, from calibration to a merged checkpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from typer.testing import CliRunner

from emloc.__main__ import app
from emloc.files import read_jsonl
from emloc.models import load_model
from tests.project import ROOT, write_pictures, write_rows
from tests.tiny import save_tiny
from tests.tiny_diffusion import save_tiny_pipeline
from tests.tiny_vision import save_picture, save_tiny_vision

COMMANDS = (
    "calibrate", "compress", "train", "correct", "merge", "convert", "generate", "evaluate",
    "encode", "personalize", "draw",
)  # fmt: skip


def emloc(line: str) -> str:
    """Run a command line in this process; what it printed."""
    result = CliRunner().invoke(app, line.split())
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All commands but `generate`, one after the other, on a tiny model."""
    at = tmp_path_factory.mktemp("cli")
    save_tiny("qwen2", at / "model")
    write_rows(at / "rows.jsonl")
    data, model = f"--data {at}/rows.jsonl", f"--model {at}/model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMLOC_CACHE", str(at / "cache"))
        emloc(f"calibrate {at}/model {data} --samples 8 --dtype float32 --out {at}/factors")
        emloc(f"compress {at}/model --factors {at}/factors --ratio 0.5 --out {at}/emulator")
        emloc(f"train {at}/emulator {data} --steps 3 --precision float32 --alpha 8 --out {at}/raw")
        emloc(f"correct {at}/raw {model} --emulator {at}/emulator --out {at}/corrected")
        emloc(f"merge {at}/corrected {model} --dtype float32 --out {at}/merged")
    return at


def test_the_merged_checkpoint_equals_original_and_adapter(folder: Path) -> None:
    original = load_model(folder / "model", dtype=torch.float32, device="cpu")
    merged = load_model(folder / "merged", dtype=torch.float32, device="cpu")
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        alone = original(tokens).logits
        adapted = PeftModel.from_pretrained(original, str(folder / "corrected"))(tokens).logits
        torch.testing.assert_close(merged(tokens).logits, adapted, rtol=1e-4, atol=1e-4)
        assert (adapted - alone).abs().max() > 1e-3


def test_generate_answers_each_prompt(folder: Path) -> None:
    asked = "--prompt 3a --prompt 2b --max-new-tokens 4 --dtype float32"
    said = emloc(f"generate {folder}/model --adapter {folder}/corrected {asked}")
    assert said == emloc(f"generate {folder}/merged {asked}")
    assert said.count("\n") >= 2


def test_evaluate_writes_answers_and_prints_the_score(folder: Path) -> None:
    line = f"evaluate {folder}/model --data {folder}/rows.jsonl --dtype float32 --batch-size 8"
    options = "--max-new-tokens 4 --metric anls --metric exact_match"
    said = emloc(f"{line} {options} --adapter {folder}/corrected --out {folder}/answers.jsonl")
    rows = read_jsonl(folder / "answers.jsonl")
    assert len(rows) == 60 and all("prediction" in row for row in rows)
    expected = sum(row["prediction"] == row["answer"] for row in rows) / 60
    assert f"exact_match: {expected:.4f}" in said and "anls: 0." in said


def test_the_commands_take_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = tmp_path
    monkeypatch.setenv("EMLOC_CACHE", str(at / "cache"))
    save_tiny_vision("internvl-llama", at / "model")
    write_pictures(at, 8)
    data = f"--data {at}/meta.json --format internvl --max-patches 2"
    emloc(f"calibrate {at}/model {data} --samples 4 --target .*layer.* --out {at}/factors")
    emloc(f"compress {at}/model --factors {at}/factors --ratio 0.5 --out {at}/emulator")
    emloc(f"train {at}/emulator {data} --steps 2 --precision float32 --out {at}/raw")
    emloc(f"correct {at}/raw --model {at}/model --emulator {at}/emulator --out {at}/corrected")
    emloc(f"merge {at}/corrected --model {at}/model --dtype float32 --out {at}/merged")
    options = "--dtype float32 --max-new-tokens 5 --metric vqa_accuracy"
    said = emloc(f"evaluate {at}/merged {data} {options} --out {at}/answers.jsonl")
    assert "vqa_accuracy: " in said
    asked = f"--prompt What? --image {at}/images/1.png --max-new-tokens 5 --dtype float32"
    plugged = emloc(f"generate {at}/model --adapter {at}/corrected {asked}")
    assert plugged == emloc(f"generate {at}/merged {asked}")


def test_merging_into_an_emulator_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="name the original"):
        emloc(f"merge {folder}/raw --model {folder}/emulator --out {folder}/no")
    assert not (folder / "no").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    assert "--" in emloc(f"{command} --help")


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    line = f"correct raw --model {tmp_path}/none --emulator emulator --out out"
    done = subprocess.run(
        [sys.executable, "-m", "emloc", *line.split()], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: There is no model at")
    assert done.stderr.strip().count("\n") == 0


def test_the_commands_take_diffusion_pipelines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = tmp_path
    monkeypatch.setenv("EMLOC_CACHE", str(at / "cache"))
    save_tiny_pipeline("flux", at / "model")
    (at / "dog").mkdir()
    save_picture(at / "dog/0.png", 20, 24, seed=0)
    options = "--prompt dog --resolution 16 --max-length 16 --dtype float32"
    emloc(f"encode {at}/model --data {at}/dog {options} --out {at}/dog.safetensors")
    data, pipeline = f"--data {at}/dog.safetensors", f"--pipeline {at}/model"
    emloc(f"calibrate {at}/model {data} --samples 4 --dtype float32 --out {at}/factors")
    emloc(f"compress {at}/model --factors {at}/factors --ratio 0.5 --out {at}/emulator")
    options = "--steps 2 --precision float32 --alpha 8 --optimizer adamw_torch --learning-rate 0.05"
    emloc(f"personalize {at}/emulator {pipeline} {data} {options} --out {at}/raw")
    emloc(f"correct {at}/raw --model {at}/model --emulator {at}/emulator --out {at}/corrected")
    emloc(f"merge {at}/corrected --model {at}/model --dtype float32 --out {at}/merged")
    asked = "--prompt dog --prompt cat --seed 1 --steps 2 --resolution 16 --dtype float32"
    emloc(f"draw {at}/model --adapter {at}/corrected {asked} --out {at}/plugged")
    emloc(f"draw {at}/merged {asked} --out {at}/of-merged")
    emloc(f"draw {at}/model {asked} --out {at}/alone")
    for name in ("00-1.png", "01-1.png"):
        plugged, merged, alone = (
            np.asarray(Image.open(at / folder / name)).astype(int)
            for folder in ("plugged", "of-merged", "alone")
        )
        assert abs(plugged - merged).max() <= 2 < abs(plugged - alone).max()
    assert (at / "plugged/sheet.png").exists()
    for line in (
        f"generate {at}/model --prompt dog",
        f"train {at}/emulator --data {at}/rows.jsonl --out {at}/no",
        f"evaluate {at}/model --data {at}/rows.jsonl --out {at}/no",
    ):
        with pytest.raises(ValueError, match="is of a diffusion pipeline.*`personalize`"):
            emloc(line)


def test_plain_svd_takes_no_data_and_samples_need_some(folder: Path) -> None:
    emloc(f"calibrate {folder}/model --samples 0 --out {folder}/plain")
    with pytest.raises(ValueError, match="--samples is 64, but there is no --data"):
        emloc(f"calibrate {folder}/model --out {folder}/none")

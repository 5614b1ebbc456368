"""The same inputs give the same adapter, to the byte, also when the run was killed between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import nn

from emloc.settings import LoraSettings
from tests.tiny import tiny_model
from tests.training import as_bytes, make_rows, one_thread, train

__all__ = ["one_thread"]
ROOT = Path(__file__).parent.parent
SCRIPT = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from tests.test_resume import long_run
print(json.dumps(long_run(Path(sys.argv[1]), die_at=int(sys.argv[2]))["history"]))
"""
# 23 rows are 12 batches and 4 steps an epoch. Batch 27 is the third of accumulation in step 9, the
# first of epoch 3; the last checkpoints are then of steps 6 and 8 (the end of epoch 2).
# Batch 20 is the second in step 7, in the middle of epoch 2, with checkpoints of steps 4 and 6.
DEATHS = {"first step of an epoch": 27, "middle of an epoch": 20}


def long_run(folder: Path, die_at: int = 0) -> dict[str, Any]:
    """Three epochs with dropout, grouping and validation; kills its process at batch `die_at`."""
    model = tiny_model("llama", num_hidden_layers=3)
    seen = []

    def count(_module: nn.Module, args: Any) -> None:
        seen.append(model.training)
        if sum(seen) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    model.get_input_embeddings().register_forward_pre_hook(count)
    return train(
        model,
        folder,
        lora=LoraSettings(r=4, dropout=0.2, rank_pattern={"q_proj": 2, "v_proj": 3}),
        rows=make_rows(23),
        validation=make_rows(5, 1),
        steps=None,
        epochs=3,
        batch_size=2,
        accumulation=3,
        group_by_length=True,
        warmup=0.2,
        weight_decay=0.1,
        log_steps=5,
        eval_steps=3,
        save_steps=2,
        seed=7,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, int, str]]:
    """Folder, exit code and output of whole and killed runs, all started at once."""
    base = tmp_path_factory.mktemp("runs")
    plans = {"one": (0, "1"), "two": (0, "2")} | {name: (at, "3") for name, at in DEATHS.items()}
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(base / name), str(die_at)],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, (die_at, hash_seed) in plans.items()
    }
    results = {}
    for name, process in processes.items():
        output, errors = process.communicate(timeout=300)
        assert process.returncode in (0, -signal.SIGKILL), errors
        assert errors == ""  # nothing but the one line of output
        results[name] = (base / name, process.returncode, output)
    return results


def test_two_processes_write_the_same_bytes(runs: dict[str, tuple[Path, int, str]]) -> None:
    (one, code, history), (two, _, other_history) = runs["one"], runs["two"]
    assert code == 0 and history == other_history
    assert as_bytes(one) == as_bytes(two)


@pytest.mark.parametrize("damage", ["none", "unfinished", "cut off"])
@pytest.mark.parametrize("death", DEATHS)
def test_killed_run_ends_with_the_same_bytes(
    death: str, damage: str, runs: dict[str, tuple[Path, int, str]], tmp_path: Path
) -> None:
    killed, code, _ = runs[death]
    assert code == -signal.SIGKILL and not (killed / "adapter").exists()
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    found = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    last = {"first step of an epoch": 8, "middle of an epoch": 6}[death]
    assert found == [f"checkpoint-{last - 2}", f"checkpoint-{last}"]
    newest = tmp_path / "checkpoints" / f"checkpoint-{last}"
    if damage == "unfinished":
        for name in ("complete.json", "trainer_state.json", "rng_state.pth"):
            (newest / name).unlink()
    elif damage == "cut off":
        (newest / "optimizer.pt").write_bytes((newest / "optimizer.pt").read_bytes()[:100])
    result = long_run(tmp_path)
    assert json.dumps(result["history"]) == runs["one"][2].strip()
    assert as_bytes(tmp_path) == as_bytes(runs["one"][0])
    assert not (tmp_path / "checkpoints").exists()


def test_resume_does_not_start_over(runs: dict[str, tuple[Path, int, str]], tmp_path: Path) -> None:
    killed, _, _ = runs["first step of an epoch"]
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    weights_file = tmp_path / "checkpoints" / "checkpoint-8" / "adapter.safetensors"
    save_file({n: t + 1 for n, t in load_file(weights_file).items()}, weights_file)
    long_run(tmp_path)
    assert as_bytes(tmp_path) != as_bytes(runs["one"][0])  # so it went on from checkpoint 8


@pytest.mark.parametrize("change", ["rank", "steps"])
def test_checkpoint_of_another_run_is_refused(
    change: str, runs: dict[str, tuple[Path, int, str]], tmp_path: Path
) -> None:
    shutil.copytree(runs["middle of an epoch"][0], tmp_path, dirs_exist_ok=True)
    options = {"rank": dict(lora=LoraSettings(r=3), steps=50), "steps": dict(steps=5)}[change]
    with pytest.raises(ValueError, match="does not fit this run .*: delete that folder"):
        train(tiny_model("llama", num_hidden_layers=3), tmp_path, **options)
    assert not (tmp_path / "adapter").exists()


def test_foreign_files_beside_the_checkpoints_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    train(tiny_model("llama"), tmp_path, save_steps=2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["notes.txt"]

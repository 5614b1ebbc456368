"""Two processes learn what one does: the same rows a step, the same loss, the same adapter."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from emloc import finetune, loss, processes
from emloc.devices import pick_dtype
from emloc.processes import FILLER, Filled, StepShares, local_device, share
from emloc.settings import LoraSettings
from emloc.trainer import EpochOrder, StepWatch
from tests import training
from tests.tiny import NAMES, VOCAB_SIZE, tiny_model
from tests.together import together
from tests.training import as_bytes, make_rows, one_thread, save_emulator, weights

__all__ = ["one_thread"]
SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from tests import test_processes
for name in sys.argv[2:]:
    test_processes.WAYS[name](Path(sys.argv[1]) / name)
"""
BRIEF = dict(steps=2, epochs=None)  # without the step that leaves a process without rows
HALF = ("replicas, bfloat16", "sharded, bfloat16")
SAME = ["replicas", "sharded", "sharded, recomputed", "sharded, in chunks"]
TOGETHER = [*SAME, "sharded, interrupted", "each its own mean", *HALF]


def run(folder: Path, **changes: Any) -> dict[str, Any]:
    """Two epochs of 17 rows on an emulator, which the folder above holds; 3 steps an epoch, of 8,
    8 and 1 rows: in the last step a second process has nothing."""
    options: dict[str, Any] = dict(rows=make_rows(17), validation=make_rows(5, 1))
    options |= dict(steps=None, epochs=2, batch_size=2, accumulation=4, group_by_length=True)
    options |= dict(weight_decay=0.1, eval_steps=2, save_steps=2, seed=7)
    dtype = pick_dtype(changes.get("precision", "float32"))
    model = AutoModelForCausalLM.from_pretrained(folder.parent / "emulator", dtype=dtype)
    result = training.train(model, folder, **{**options, **changes})
    if processes.is_first():
        (folder / "result.json").write_text(json.dumps(result))
    return result


def sharded(folder: Path, **changes: Any) -> None:
    """The same with a half of the frozen weights in each process."""
    with pytest.MonkeyPatch.context() as patch:
        whole = finetune.finetune
        patch.setattr(training, "finetune", partial(whole, shard_on=torch.device("cpu")))
        patch.setattr(
            finetune, "shard_frozen", partial(count_pieces, finetune.shard_frozen, folder)
        )
        run(folder, **changes)


def count_pieces(shard: Any, folder: Path, model: nn.Module, device: torch.device) -> None:
    """Shard, and write down how much of the frozen weights was in this process before and after."""
    frozen = [sum(p.numel() for p in model.parameters() if not p.requires_grad)]
    shard(model, device)
    kept = [p for p in model.parameters() if not p.requires_grad]
    frozen.append(sum(p.to_local().numel() for p in kept))  # type: ignore[operator]
    folder.mkdir(exist_ok=True)
    (folder / f"pieces-{processes.number()}.json").write_text(json.dumps(frozen))


def own_means(folder: Path) -> None:
    """The wrong way: the loss is each process's own mean over labels, and these are averaged."""
    with pytest.MonkeyPatch.context() as patch:
        arguments = finetune.training_arguments

        def wrong(*args: Any, **options: Any) -> Any:
            made = arguments(*args, **options)
            made.average_tokens_across_devices = False
            return made

        patch.setattr(finetune, "training_arguments", wrong)
        run(folder, **BRIEF)


def with_dropout(folder: Path, die_at: int = 0) -> None:
    """With dropout, whose random numbers a checkpoint must hold; dies in pass `die_at`."""
    model, passes = tiny_model("llama"), []

    def die(_module: nn.Module, _args: Any) -> None:
        passes.append(model.training)
        if model.training and sum(passes) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    model.get_input_embeddings().register_forward_pre_hook(die)
    options: dict[str, Any] = dict(rows=make_rows(17), steps=9, batch_size=2, accumulation=4)
    training.train(model, folder, lora=LoraSettings(r=4, dropout=0.3), save_steps=2, **options)


def interrupted(folder: Path) -> None:
    """Stop after the fifth step, and go on from the checkpoint of the fourth."""
    with pytest.MonkeyPatch.context() as patch:
        step_end = StepWatch.on_step_end

        def stop(watch: StepWatch, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt
            step_end(watch, args, state, control)

        patch.setattr(StepWatch, "on_step_end", stop)
        with contextlib.suppress(KeyboardInterrupt):
            sharded(folder)
    assert not (folder / "adapter").exists() and (folder / "checkpoints/checkpoint-4").exists()
    sharded(folder)


def in_chunks(folder: Path) -> None:
    """With a loss that is computed in chunks where a batch has more than 8 labels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "LARGE", 8 * VOCAB_SIZE)
        sharded(folder)


def every_architecture(folder: Path) -> None:
    """A short training of each, whole and in pieces; the head is tied to the embeddings or not."""
    for name, tied in itertools.product(NAMES, (True, False)):
        for way, device in (("whole", None), ("pieces", torch.device("cpu"))):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(training, "finetune", partial(finetune.finetune, shard_on=device))
                model = tiny_model(name, tie_word_embeddings=tied)
                training.train(model, folder / f"{name} {tied}" / way, validation=make_rows(3, 1))


WAYS = {
    "replicas": run,
    "sharded": sharded,
    "sharded, recomputed": partial(sharded, gradient_checkpointing=True),
    "sharded, in chunks": in_chunks,
    "sharded, interrupted": interrupted,
    "each its own mean": own_means,
    # A sharded layer computes LoRA as peft does; a whole one would round otherwise.
    "replicas, bfloat16": partial(run, precision="bfloat16", fused=False),
    "sharded, bfloat16": partial(sharded, precision="bfloat16"),
    "dropout": with_dropout,
    "every architecture": every_architecture,
    # 17 rows are 2 + 2 + 1 passes an epoch in each of 2 processes, so step 5 has passes 8 and 9.
    "killed": partial(with_dropout, die_at=9),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of one run alone, and of several by two processes."""
    base = tmp_path_factory.mktemp("runs")
    save_emulator(base / "emulator")
    run(base / "alone")
    run(base / "alone, briefly", **BRIEF)
    for code, errors in together(SCRIPT, base, *TOGETHER):
        assert code == 0, errors
    return base


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def furthest(one: Path, other: Path) -> float:
    """The largest difference between two adapters' weights."""
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)


@pytest.mark.slow
@pytest.mark.parametrize("way", SAME)
def test_two_processes_train_the_adapter_of_one(way: str, runs: Path) -> None:
    assert furthest(runs / "alone", runs / way) < 1e-6  # measured: 8e-8, of weights up to 0.2
    files = [sorted(p.name for p in (runs / w / "adapter").iterdir()) for w in ("alone", way)]
    assert files[0] == files[1] and not (runs / way / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["replicas", "sharded"])
def test_two_processes_tell_the_history_of_one(way: str, runs: Path) -> None:
    mine, alone = result_of(runs / way), result_of(runs / "alone")
    for row, expected in zip(mine.pop("history"), alone.pop("history"), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)  # measured: 1e-7
    assert mine == alone  # the tokens, too: a batch that fills in does not count


@pytest.mark.slow
def test_a_mean_of_the_processes_own_means_would_be_another_adapter(runs: Path) -> None:
    assert furthest(runs / "alone, briefly", runs / "each its own mean") > 1e-3  # measured: 3e-2


@pytest.mark.slow
def test_pieces_of_bfloat16_weights_train_the_same_adapter_to_the_byte(runs: Path) -> None:
    assert as_bytes(runs / HALF[0]) == as_bytes(runs / HALF[1])
    assert {tensor.dtype for tensor in weights(runs / HALF[1]).values()} == {torch.float32}
    assert furthest(runs / HALF[1], runs / "sharded") > 1e-4  # so it was bfloat16


@pytest.mark.slow
def test_a_sharded_training_that_was_stopped_ends_with_the_same_bytes(runs: Path) -> None:
    assert as_bytes(runs / "sharded, interrupted") == as_bytes(runs / "sharded")


@pytest.mark.slow
def test_each_process_holds_half_of_the_frozen_weights(runs: Path) -> None:
    for number in range(2):
        whole, kept = json.loads((runs / "sharded" / f"pieces-{number}.json").read_text())
        assert 0.45 * whole < kept < 0.55 * whole  # measured: 0.5


@pytest.mark.slow
def test_every_architecture_trains_in_pieces_as_it_does_whole(tmp_path: Path) -> None:
    for code, errors in together(SCRIPT, tmp_path, "every architecture"):
        assert code == 0, errors
    folders = list((tmp_path / "every architecture").iterdir())
    assert len(folders) == 2 * len(NAMES)
    for folder in folders:
        assert as_bytes(folder / "whole") == as_bytes(folder / "pieces"), folder.name


@pytest.mark.slow
def test_two_processes_go_on_after_a_kill_and_end_with_the_same_bytes(tmp_path: Path) -> None:
    for code, errors in together(SCRIPT, tmp_path, "dropout"):
        assert code == 0, errors
    assert [code for code, _ in together(SCRIPT, tmp_path, "killed")] == [-signal.SIGKILL] * 2
    kept = sorted(path.name for path in (tmp_path / "killed/checkpoints").iterdir())
    assert kept == ["checkpoint-2", "checkpoint-4"]
    whole = tmp_path / "killed/checkpoints/checkpoint-4"
    assert {"rng_state_0.pth", "rng_state_1.pth", "complete.json"} <= {
        path.name for path in whole.iterdir()
    }
    (tmp_path / "dropout").rename(tmp_path / "expected")
    (tmp_path / "killed").rename(tmp_path / "dropout")
    for code, errors in together(SCRIPT, tmp_path, "dropout"):
        assert code == 0, errors
    assert as_bytes(tmp_path / "dropout") == as_bytes(tmp_path / "expected")


@pytest.mark.parametrize("rows", [1, 7, 16, 17, 23, 24])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (2, 4), (4, 3), (1, 12)])
@pytest.mark.parametrize("count", [2, 4])
def test_a_step_has_the_same_rows_however_many_processes_share_it(
    rows: int, batch_size: int, accumulation: int, count: int
) -> None:
    order = EpochOrder(list(range(rows)), batch_size * accumulation, by_length=True, seed=3)
    size, passes = share(batch_size, accumulation, count)
    assert size <= batch_size and size * passes * count == batch_size * accumulation
    shares = [StepShares(order, size, passes, count, number) for number in range(count)]
    for epoch in range(2):
        order.set_epoch(epoch)
        alone = list(order)
        batches = [list(one) for one in shares]
        assert {len(one) for one in batches} == {len(shares[0])}
        for step, start in enumerate(range(0, rows, batch_size * accumulation)):
            expected = alone[start : start + batch_size * accumulation]
            turn = slice(step * passes, (step + 1) * passes)
            seen = [row for one in batches for batch in one[turn] for row in batch]
            assert sorted(row for row in seen if row != FILLER) == sorted(expected)
        assert len(batches[0]) <= (step + 1) * passes


def test_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert local_device("auto") == torch.device("cuda:1") and chosen == [1]
    assert local_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        ValueError, match=r"3 processes .* has 2 device\(s\) of type cuda: start no"
    ):
        local_device("auto")


def test_rows_that_cannot_be_divided_are_refused() -> None:
    assert share(4, 3, 2) == (3, 2)
    with pytest.raises(ValueError, match=r"3 · 1, which cannot be divided among 2 processes: make"):
        share(3, 1, 2)


def test_a_batch_that_fills_in_is_a_short_row_without_labels() -> None:
    rows = make_rows(9)
    filled = Filled(rows)
    assert [filled[i] for i in range(len(filled))] == rows
    assert len(filled[FILLER]["input_ids"]) == min(len(row["input_ids"]) for row in rows)
    assert set(filled[FILLER]["labels"]) == {-100}
    assert all(set(row["labels"]) != {-100} for row in rows)

"""The plan of teaching and healing: what it predicts is what is allocated."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from emloc import distill
from emloc.distill import HealTrainer
from emloc.families.text import TextCodec
from emloc.fused import fused_lora
from emloc.heal import split_off
from emloc.loss import LossInChunks
from emloc.lowrank import LowRankLinear, replace_linears
from emloc.models import open_model
from emloc.optimize import training_arguments
from emloc.plan.jobs import Healing, Teaching
from emloc.plan.streamed import teach_peak
from emloc.plan.subject import empty_model
from emloc.plan.table import plan_text
from emloc.plan.tracking import AllocationTracker, bytes_of
from emloc.plan.work import Rows, TaughtRows
from emloc.settings import HealSettings
from emloc.streaming import Stream, find_units
from emloc.targets import BLOCKS, select
from emloc.teach import teach
from emloc.trainer import StepWatch
from tests.test_plan import CPU, ROWS, SHAPE, TOKENS, VOCABULARY, config, examples, planner
from tests.tiny import save_tiny, tiny_tokenizer

pytest_plugins = "tests.training"  # one thread
TOP_K = 16
RATIO = 0.5


@pytest.mark.parametrize("chunk", [2**24, 40 * VOCABULARY], ids=["whole", "chunks"])
def test_healing_takes_what_was_planned(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill, "CHUNK", chunk)
    settings = HealSettings(steps=3, batch_size=ROWS, rank=8)
    plan = planner(healing=Healing(TaughtRows(ROWS, TOKENS, top_k=TOP_K), settings))
    planned = plan.heal(RATIO)
    assert planned is not None
    ranks = plan.subject.ranks(RATIO, empty_model(config(), torch.float32))
    batch = taught_batch()
    with AllocationTracker() as tracker:
        model = AutoModelForCausalLM.from_config(config(), dtype=torch.float32)
        replace_linears(model, ranks)
        for module in model.modules():
            if isinstance(module, LowRankLinear):
                module.reset_parameters()
        _ = LossInChunks(model).possible
        adapted = split_off(model, settings)
        trainer = HealTrainer(
            adapted,
            training_arguments(settings.training(), 3, tmp_path / "checkpoints", model.device),
            examples(ROWS * 3),
            [],
            collator=lambda _: dict(batch),
            by_length=False,
            watch=StepWatch(100, None, False, False),
        )
        tracker.peak_bytes = 0  # of drawing the weights
        with fused_lora(adapted):
            trainer.train()
    assert planned.total == pytest.approx(tracker.peak_bytes, rel=0.05)


def taught_batch() -> dict[str, torch.Tensor]:
    """A batch as healing makes it, its last row padded."""
    ids, mask = torch.full((2, ROWS, TOKENS), 5), torch.ones(ROWS, TOKENS, dtype=torch.int64)
    ids[1, -1, -1], mask[-1, -1] = -100, 0
    positions = ROWS * (TOKENS - 1) - 1
    return {
        "input_ids": ids[0],
        "attention_mask": mask,
        "labels": ids[1],
        "taught_ids": torch.arange(TOP_K).repeat(positions, 1),
        "taught_logprobs": torch.full((positions, TOP_K), -3.0),
    }


def test_chunks_of_logits_take_less() -> None:
    plan = planner(healing=Healing(TaughtRows(ROWS, TOKENS, top_k=TOP_K), HealSettings()))
    whole = plan.heal(RATIO)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "CHUNK", 40 * VOCABULARY)
        chunked = plan.heal(RATIO)
    assert whole is not None and chunked is not None and chunked.total < whole.total


def test_the_largest_ratio_is_one_that_can_be_healed() -> None:
    """Healing takes more than training here, so that it decides."""
    rows = TaughtRows(4 * ROWS, TOKENS, top_k=TOP_K)
    plan = planner(healing=Healing(rows, HealSettings()))
    low, high = plan.heal(0.2), plan.heal(0.7)
    assert low is not None and high is not None and low.total > plan.train(0.9).total
    plan = replace(plan, budget_bytes=plan.runtime_bytes + (low.total + high.total) // 2)
    ratio = plan.largest_ratio()
    fitting, next_one = plan.heal(ratio), plan.heal(round(ratio + 0.05, 2))
    assert fitting is not None and fitting.total + plan.runtime_bytes <= plan.budget_bytes
    assert next_one is not None and next_one.total + plan.runtime_bytes > plan.budget_bytes
    with pytest.raises(ValueError, match=r"lower train\.batch_size and heal\.batch_size"):
        replace(plan, budget_bytes=plan.runtime_bytes + low.total // 2).largest_ratio()


def test_the_table_shows_teaching_and_healing_where_they_are_done() -> None:
    taught = TaughtRows(ROWS, TOKENS, top_k=TOP_K)
    plan = planner(
        teaching=Teaching(Rows(2, TOKENS), 4), healing=Healing(taught, HealSettings(rank=2))
    )
    shown = plan_text(plan, [RATIO], "cpu")
    assert "| teach " in shown and "| heal " in shown
    assert "The largest ratio whose healing and training fit is 0.9." in shown
    without = plan_text(planner(), [RATIO], "cpu")
    assert "| teach " not in without and "| heal " not in without


def test_teaching_takes_what_was_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The threads of all batches are tracked, and the weights that are read."""
    path = save_tiny("llama", tmp_path / "model", dtype=torch.float32, **SHAPE)
    planned = teach_peak(
        empty_model(config(), torch.float32), Rows(2, TOKENS), batches=4, device=CPU
    )
    opened = open_model(path, dtype=torch.float32)
    tracker = AllocationTracker()
    forward, read = opened.model.forward, Stream._read

    def tracked(*args: Any, **kwargs: Any) -> Any:
        with tracker:
            return forward(*args, **kwargs)

    def read_tracked(stream: Stream, unit: str) -> Any:
        with tracker:
            return read(stream, unit)

    opened.model.forward = tracked
    monkeypatch.setattr(Stream, "_read", read_tracked)
    lengths = (TOKENS, TOKENS - 1)
    rows = [{"input_ids": [5] * n, "labels": [5] * n} for n in lengths] * 4
    with tracker:
        teach(
            opened,
            rows,
            codec=TextCodec(tiny_tokenizer()),
            top_k=TOP_K,
            batch_size=2,
            wave=8,
            out=tmp_path / "taught",
        )
    assert 0.98 * tracker.peak_bytes < planned.total < 1.3 * tracker.peak_bytes


def test_a_cpu_holds_a_unit_and_the_one_that_is_read_ahead() -> None:
    model = empty_model(config(), torch.float32)
    planned = teach_peak(model, Rows(1, 2), batches=1, device=CPU)
    units = find_units(empty_model(config(), torch.float32))
    sizes = [bytes_of(unit) for name, unit in units.items() if name]
    assert planned.weights == max(a + b for a, b in pairwise(sizes))


def test_targets_of_all_linears_are_those_that_are_cut() -> None:
    model = empty_model(config(), torch.float32)
    names = select(model, [BLOCKS], where="x")
    assert set(planner().subject.ranks(RATIO, model)) == set(names)
    assert all(isinstance(module, nn.Linear) for module in names.values())

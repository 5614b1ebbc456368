"""The fidelity benchmark: its peers are what they claim to be, its figures and cells hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedModel

from benchmarks import peers
from benchmarks.fidelity import run
from benchmarks.fidelity_cells import Cell, Grid, found_cells
from benchmarks.fidelity_table import Outcome, gain_recovered, paired_interval, picture, table
from benchmarks.fidelity_tasks import Task, city_rows, encoded_splits
from benchmarks.fidelity_work import Work
from emloc.families.text import TextCodec
from emloc.generate import mean_loss, row_losses
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer
from tests.training import logits, make_rows, one_thread, train

__all__ = ["one_thread"]

FAMILIES = ("llama", "llama-tied", "qwen2", "qwen3")
RATIO = 0.5
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}


def pruning(model: PreTrainedModel, ratio: float = RATIO) -> peers.Pruning:
    codec = TextCodec(tiny_tokenizer())
    importances = peers.importance(model, codec, make_rows(6), batch_size=3)
    return peers.plan_pruning(model, importances, ratio)


def deltas(model: nn.Module) -> dict[str, Tensor]:
    """Layer name → s·B A of its LoRA."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def zeroed(model: PreTrainedModel, columns: Mapping[str, Tensor]) -> PreTrainedModel:
    """The model with some input features of some layers cut off."""
    with torch.no_grad():
        for name, places in columns.items():
            model.get_submodule(name).weight[:, places] = 0
    return model


def others(kept: Tensor, count: int) -> Tensor:
    return torch.tensor(sorted(set(range(count)) - set(kept.tolist())))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_is_the_original_without_the_pruned_heads_and_channels(family: str) -> None:
    model = tiny_model(family, **HEADS)
    plan = pruning(model)
    assert (plan.groups, plan.heads) == (3, 1)
    pruned = peers.prune(model, plan)
    cut_off = {}
    for block in range(2):
        layer = model.model.layers[block]
        queries = others(plan.queries[block], layer.self_attn.o_proj.in_features)
        cut_off[f"model.layers.{block}.self_attn.o_proj"] = queries
        cut_off[f"model.layers.{block}.mlp.down_proj"] = others(plan.channels[block], 64)
    whole = logits(model)
    assert_close(logits(pruned), logits(zeroed(model, cut_off)), rtol=1e-4, atol=1e-5)
    assert (whole - logits(pruned)).abs().max() > 0.01


@pytest.mark.parametrize("family", ("llama", "qwen2"))
def test_a_recovered_adapter_adds_what_it_added_to_the_pruned_model(
    family: str, tmp_path: Path
) -> None:
    original = tiny_model(family, **HEADS)
    plan = pruning(original)
    pruned = peers.prune(original, plan)
    train(pruned, tmp_path)
    peers.recover(tmp_path / "adapter", original, plan, tmp_path / "recovered")
    small = deltas(pruned)
    full = deltas(PeftModel.from_pretrained(original, tmp_path / "recovered"))
    assert full.keys() == small.keys()
    assert len(full) == 14
    for name, delta in full.items():
        block, part = int(name.split(".")[2]), name.rpartition(".")[2]
        rows, columns = plan.sides(block, part)
        rows = torch.arange(delta.shape[0]) if rows is None else rows
        columns = torch.arange(delta.shape[1]) if columns is None else columns
        assert delta.shape != small[name].shape
        assert small[name].abs().max() > 1e-4
        assert_close(delta[rows][:, columns], small[name])
        delta[rows[:, None], columns] = 0
        assert not delta.any()


def test_pruning_spares_what_the_loss_depends_on() -> None:
    model = tiny_model("llama")
    dead = {
        "model.layers.0.self_attn.o_proj": torch.arange(8, 16),  # the second of four heads
        "model.layers.0.mlp.down_proj": torch.arange(10, 25),
    }
    plan = pruning(zeroed(model, dead), 0.7)
    assert (plan.groups, plan.heads) == (2, 1)
    assert plan.queries[0].tolist()[:8] == list(range(8))
    assert not set(plan.channels[0].tolist()) & set(range(10, 25))
    assert set(plan.channels[1].tolist()) & set(range(10, 25))


@pytest.mark.parametrize("ratio", (0.8, 0.6, 0.4))
def test_peers_have_the_parameters_of_the_ratio(ratio: float) -> None:
    model = tiny_model("llama", num_hidden_layers=10)
    whole = peers.block_parameters(model)
    short, kept = peers.drop_blocks(model, ratio)
    assert peers.block_parameters(short) == pytest.approx(ratio * whole)
    assert len(kept) == 10 * ratio
    pruned = peers.prune(model, pruning(model, ratio))
    channels = 3 * 32 * 10  # one of each block
    assert abs(peers.block_parameters(pruned) - ratio * whole) <= channels / 2


def test_kept_blocks_are_evenly_spread() -> None:
    assert peers.kept_blocks(30, 0.1) == [0, 14, 29]
    assert peers.kept_blocks(4, 0.1) == [0]
    for ratio in (0.8, 0.6, 0.4):
        kept = peers.kept_blocks(30, ratio)
        assert (kept[0], kept[-1], len(kept)) == (0, 29, round(30 * ratio))
        gaps = np.diff(kept)
        assert gaps.min() > 0
        assert gaps.max() - gaps.min() <= 1


def test_dropped_blocks_pass_on_and_the_others_get_their_adapter_back(tmp_path: Path) -> None:
    original = tiny_model("qwen2", num_hidden_layers=5)
    before = logits(original)
    short, kept = peers.drop_blocks(original, 0.6)
    assert kept == [0, 2, 4]
    plain = logits(short)
    train(short, tmp_path)
    peers.restore_blocks(tmp_path / "adapter", original, kept, tmp_path / "restored")
    small = deltas(short)
    adapted = PeftModel.from_pretrained(original, tmp_path / "restored")
    full = deltas(adapted)
    assert len(full) == len(small) == 21
    for name, delta in full.items():
        parts = name.split(".")
        parts[2] = str(kept.index(int(parts[2])))
        assert delta.abs().max() > 1e-4
        assert_close(delta, small[".".join(parts)])
    assert not torch.allclose(logits(adapted), before, atol=1e-3)
    with torch.no_grad():  # a block without output is one that is passed by
        for block in (1, 3):
            layer = original.model.layers[block]
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    assert_close(logits(adapted), logits(short), rtol=1e-4, atol=1e-5)
    with adapted.disable_adapter():
        assert_close(logits(adapted), plain, rtol=1e-4, atol=1e-5)


def test_a_model_without_blocks_like_llama_s_is_refused() -> None:
    with pytest.raises(ValueError, match="has no blocks like Llama's"):
        peers.blocks_of(tiny_model("phi3"))


def test_losses_of_rows_make_up_the_mean_loss() -> None:
    model, codec, rows = tiny_model("llama"), TextCodec(tiny_tokenizer()), make_rows(5)
    losses = row_losses(model, codec, rows, batch_size=2)
    for row, (loss, tokens) in zip(rows, losses, strict=True):
        assert tokens == sum(label != -100 for label in row["labels"])
        assert loss / tokens == pytest.approx(mean_loss(model, codec, [row], batch_size=1))
    mean = sum(loss for loss, _ in losses) / sum(tokens for _, tokens in losses)
    assert mean == pytest.approx(mean_loss(model, codec, rows, batch_size=5))


def test_gain_recovered() -> None:
    assert gain_recovered(0.5, zero=0.25, direct=0.75) == 0.5
    assert gain_recovered(0.25, zero=0.25, direct=0.75) == 0
    assert gain_recovered(0.125, zero=0.25, direct=0.75) == -0.25
    assert gain_recovered(1.0, zero=3.0, direct=0.5) == 0.8  # losses
    assert gain_recovered(0.5, zero=0.25, direct=0.25) is None


def outcome(correct: Any, losses: Any) -> Outcome:
    return Outcome(np.asarray(correct, float), np.asarray(losses, float), np.ones(len(correct)))


def test_an_interval_covers_a_known_difference_of_paired_rows() -> None:
    draw = np.random.default_rng(1)
    hard = draw.normal(size=400)
    one = outcome(draw.random(400) < 0.7, hard + 0.5 + 0.1 * draw.normal(size=400))
    other = outcome(draw.random(400) < 0.5, hard)
    low, high = paired_interval(one, other, Outcome.match)
    assert 0 < low < 0.2 < high < 0.4
    low, high = paired_interval(one, other, Outcome.loss)
    assert 0.45 < low < 0.5 < high < 0.55  # unpaired, its width would be some 0.28
    assert paired_interval(one, other, Outcome.loss) == (low, high)
    assert paired_interval(other, one, Outcome.loss) == pytest.approx((-high, -low))
    constant = replace(other, losses=other.losses + 0.25)
    assert paired_interval(constant, other, Outcome.loss) == pytest.approx((0.25, 0.25))
    with pytest.raises(ValueError, match="400 rows and the other 1"):
        paired_interval(one, outcome([1], [1]), Outcome.match)


def test_a_name_on_two_continents_is_no_row() -> None:
    countries = {"FR": {"continentcode": "EU"}, "US": {"continentcode": "NA"}}
    places = [("Paris", "FR"), ("Lyon", "FR"), ("Paris", "US"), ("Lyon", "FR"), ("Nowhere", "XX")]
    entries = [{"name": name, "countrycode": code} for name, code in places]
    assert city_rows(entries, countries) == [
        {"prompt": "On which continent is Lyon?\n", "answer": "Europe"}
    ]


def test_splits_have_no_row_in_common() -> None:
    rows = [{"prompt": f"{number}\n", "answer": str(number)} for number in range(160)]
    task = Task("numbers", lambda: rows, {"train": 20, "validation": 4, "test": 8})
    splits = encoded_splits(task, TextCodec(tiny_tokenizer(), chat_template=False))
    sizes = {name: len(examples) for name, examples in splits.items()}
    assert sizes == {"train": 20, "validation": 4, "test": 8, "held": 128}
    answers = [example["answer"] for examples in splits.values() for example in examples]
    assert len(set(answers)) == 160


GRID = Grid(
    tasks=["codespell"],
    ratios=[0.5],
    methods=["svd", "raw", "paper", "offsite", "loram"],
    seeds=[0],
    split="test",
    steps=2,
    rows=4,
)


def tiny_work(folder: Path) -> Work:
    original = save_tiny("llama", folder / "original")
    rows = [{**row, "answer": "?"} for row in make_rows(12)]
    splits = {"train": rows[:8], "validation": [], "test": rows[8:]}
    return Work("tiny", "rows", original, splits, 2, folder / "cache", torch.device("cpu"))


def test_cells_are_run_once_and_the_table_lists_what_is_missing(tmp_path: Path) -> None:
    cells, begun = tmp_path / "cells", []

    def prepare(task: str) -> Work:
        begun.append(task)
        return tiny_work(tmp_path)

    assert run(GRID, prepare, cells) == GRID.cells()
    assert len(GRID.cells()) == 7
    assert len(list((tmp_path / "cache").glob("trained-*"))) == 5  # raw and paper share one
    stamps = {file: file.read_bytes() for file in cells.iterdir()}
    assert run(GRID, prepare, cells) == []
    assert {file: file.read_bytes() for file in cells.iterdir()} == stamps
    assert begun == ["codespell"]

    done = found_cells(cells, GRID)
    losses = {cell.method: content["losses"] for cell, content in done.items()}
    assert all(len(values) == 4 for values in losses.values())
    assert len({tuple(values) for values in losses.values()}) == 7
    kept = {cell.method: content["kept"] for cell, content in done.items()}
    assert kept["direct"] == 1
    assert {method: kept[method] for method in GRID.methods} == pytest.approx(
        dict.fromkeys(GRID.methods, 0.5), abs=0.05
    )

    gone = Cell("codespell", "raw", 0.5, 0, "test")
    (cells / f"{gone.name}.json").unlink()
    wider = replace(GRID, seeds=[0, 1])
    text = table(wider, found_cells(cells, wider))
    assert "- codespell, raw: 0.5 (seed 0), 0.5 (seed 1)\n" in text
    assert "- codespell, direct: (seed 1)\n" in text
    assert "- easy-vqa: " in text
    assert "zero:" not in text
    assert run(GRID, prepare, cells) == [gone]
    picture(GRID, found_cells(cells, GRID), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_means_and_corrections_are_over_what_all_tasks_have() -> None:
    grid = replace(GRID, tasks=["codespell", "cities"], ratios=[0.5], methods=[])

    def content(correct: Sequence[int]) -> dict[str, Any]:
        losses = [2.0 - entry for entry in correct]
        return {"correct": list(correct), "losses": losses, "tokens": [1] * 4, "kept": 0.5}

    done = {}
    for task, ours in (("codespell", [1, 1, 0, 0]), ("cities", [1, 1, 1, 1])):
        for method, correct in (("zero", [0] * 4), ("direct", [1] * 4)):
            done[Cell(task, method, None, 0, "test")] = content(correct)
        done[Cell(task, "heal+alloc", 0.5, 0, "test")] = content([1, 1, 0, 0])
        done[Cell(task, "ours", 0.5, 0, "test")] = content(ours)
    done[Cell("cities", "loram", 0.5, 0, "test")] = content([1, 0, 0, 0])  # and not of codespell
    lines = [[part.strip() for part in line.split("|")] for line in table(grid, done).splitlines()]
    assert ["", "ours", "0.5", "75.0%", "75.0%", ""] in lines
    assert ["", "heal+alloc", "0.5", "50.0%", "50.0%", ""] in lines
    assert not any(line[1:3] == ["loram", "0.5"] and len(line) == 6 for line in lines)
    none, half = ("+0.0 [+0.0, +0.0]", "+0.000 [+0.000, +0.000]"), ("+50.0", "-0.500")
    assert ["", "codespell", "0.5", *none, ""] in lines
    (cities,) = (line for line in lines if line[1:3] == ["cities", "0.5"])
    assert all(cell.startswith(shown) for cell, shown in zip(cities[3:5], half, strict=True))
    alone = table(replace(grid, tasks=["cities"]), done)
    assert "mean over tasks" not in alone and "### ours − heal+alloc" in alone


def test_cells_with_other_settings_do_not_count(tmp_path: Path) -> None:
    grid = replace(GRID, methods=[])
    run(grid, lambda task: tiny_work(tmp_path), tmp_path / "cells")
    assert len(found_cells(tmp_path / "cells", grid)) == 2
    assert not found_cells(tmp_path / "cells", replace(grid, steps=3))
    assert not found_cells(tmp_path / "cells", replace(grid, rows=3))


def test_what_cannot_be_asked_for_is_named() -> None:
    for changes, message in (
        ({"tasks": ["x"]}, "the task 'x' is unknown: take some of codespell"),
        ({"methods": ["x"]}, "the method 'x' is unknown"),
        ({"split": "train"}, "the split 'train' is unknown"),
        ({"ratios": [1.0]}, "a ratio is 1.0"),
        ({"rows": 1001}, "rows is 1001, but the test split of codespell has 1000"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(GRID, **changes)

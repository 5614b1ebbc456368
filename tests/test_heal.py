"""Healing: what the original says is kept as it is, and brings an emulator nearer to it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

from emloc import distill
from emloc.calibrate import calibrate
from emloc.distill import sum_of_divergences
from emloc.emulator import cut, plan_ranks
from emloc.factor_files import FactorFiles
from emloc.families.text import TextCodec
from emloc.heal import heal, hold_out, split_off, write_healed
from emloc.lowrank import ranks_of
from emloc.models import load_model, open_model
from emloc.plan.tracking import AllocationTracker
from emloc.settings import HealSettings
from emloc.targets import BLOCKS, select
from emloc.teach import Targets, divergence, taught_labels, teach
from tests.tiny import VOCAB_SIZE, save_tiny, tiny_tokenizer
from tests.training import logits, make_rows, one_thread

__all__ = ["one_thread"]

SETTINGS = HealSettings(steps=30, rank=3, batch_size=8, learning_rate=3e-3)
ROWS = 64
FLOAT = torch.float32


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec(tiny_tokenizer())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, codec: TextCodec) -> Path:
    """An original, its emulator at half its size, and what it says to 16 rows."""
    folder = tmp_path_factory.mktemp("made")
    path = save_tiny("llama", folder / "original")
    opened = open_model(path, dtype=FLOAT)
    linears = select(opened.model, [BLOCKS], where="targets")
    calibrate(opened, [], linears=linears, max_ratio=0.9, out=folder / "factors", dtype=FLOAT)
    factors = FactorFiles(folder / "factors")
    plan = plan_ranks(factors, dict.fromkeys(factors.modules, 0.5))
    again = open_model(path, dtype=FLOAT)
    cut(path, again, factors, plan, out=folder / "emulator", base_name="someone/original")
    teach_tiny(folder, codec, folder / "targets")
    return folder


def teach_tiny(folder: Path, codec: TextCodec, out: Path, **changes: Any) -> Targets:
    options: dict[str, Any] = dict(top_k=64, batch_size=3, wave=20) | changes
    opened = open_model(folder / "original", dtype=FLOAT)
    teach(opened, make_rows(ROWS), codec=codec, out=out, **options)
    return Targets(out)


def heal_tiny(made: Path, codec: TextCodec, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return heal(
        made / "emulator",
        make_rows(ROWS),
        Targets(made / "targets"),
        codec=codec,
        settings=replace(SETTINGS, **changes),
        out=tmp_path / "healed",
        checkpoints=tmp_path / "checkpoints",
    )


@pytest.mark.parametrize("wave", [3, 64, 100])
def test_what_is_kept_is_what_the_original_says(
    made: Path, codec: TextCodec, tmp_path: Path, wave: int
) -> None:
    targets = teach_tiny(made, codec, tmp_path / "targets", wave=wave, top_k=VOCAB_SIZE)
    model = load_model(made / "original", dtype=FLOAT, device="cpu")
    for number, row in enumerate(make_rows(ROWS)):
        with torch.no_grad():
            said = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        ids, logprobs = targets.row(number)
        assert len(ids) == len(row["input_ids"]) - 1
        torch.testing.assert_close(logprobs, said.log_softmax(-1).gather(-1, ids))
        assert float(divergence(said, ids, logprobs).abs().max()) < 1e-5


def test_the_divergence_of_all_tokens_is_torch_s(codec: TextCodec) -> None:
    draw = torch.Generator().manual_seed(0)
    mine, other = (torch.randn(5, 40, generator=draw) for _ in range(2))
    logprobs, ids = other.log_softmax(-1).topk(40)
    wanted = nn.functional.kl_div(
        mine.log_softmax(-1), other.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(divergence(mine, ids, logprobs), wanted, atol=1e-4, rtol=1e-4)
    fewer = divergence(mine, ids[:, :5], logprobs[:, :5])
    assert (fewer < wanted).all() and (fewer > 0).all()


def test_pictures_are_not_taught() -> None:
    config = type("Config", (), {"image_token_id": 7})()
    assert taught_labels(config, {"input_ids": [7, 7, 4, 5, 7]}) == [-100, -100, 4, 5, -100]


def test_a_lora_of_the_last_directions_leaves_the_emulator_as_it_is(made: Path) -> None:
    model = load_model(made / "emulator", dtype=FLOAT, device="cpu")
    before, ranks = logits(model), ranks_of(model)
    adapted = split_off(model, SETTINGS)
    torch.testing.assert_close(logits(adapted), before)
    assert all(ranks[n] - k == min(3, ranks[n] // 2) for n, k in ranks_of_base(adapted).items())


def ranks_of_base(adapted: Any) -> dict[str, int]:
    ranks = ranks_of(adapted.get_base_model())
    return {name.removesuffix(".base_layer"): rank for name, rank in ranks.items()}


def test_healed_factors_are_the_emulator_with_its_lora(made: Path, tmp_path: Path) -> None:
    model = load_model(made / "emulator", dtype=FLOAT, device="cpu")
    adapted = split_off(model, SETTINGS)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    wanted = logits(adapted)
    write_healed(made / "emulator", adapted, tmp_path / "healed")
    healed = load_model(tmp_path / "healed", dtype=FLOAT, device="cpu")
    torch.testing.assert_close(logits(healed), wanted)
    assert not torch.allclose(
        wanted, logits(load_model(made / "emulator", dtype=FLOAT, device="cpu"))
    )
    assert ranks_of(healed) == ranks_of(load_model(made / "emulator", dtype=FLOAT, device="cpu"))


@pytest.mark.parametrize("count", [8, 9, 64])
def test_rows_held_out_are_not_taught(count: int) -> None:
    taught, held = hold_out(range(count))
    assert held and len(held) == -(-count // 8)
    assert sorted([*taught, *held]) == list(range(count))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_few_rows_are_all_measured(count: int) -> None:
    taught, held = hold_out(range(count))
    assert list(held) == list(range(count)) and taught


def test_healing_brings_rows_that_it_never_saw_nearer(
    made: Path, codec: TextCodec, tmp_path: Path
) -> None:
    result = heal_tiny(made, codec, tmp_path)
    assert result["divergence_after"] < 0.9 * result["divergence_before"]
    assert result["trained_parameters"] > 0 and result["history"][-1]["step"] == 30
    assert not (tmp_path / "checkpoints").exists()
    names = {p.name for p in (made / "emulator").iterdir()}
    assert {p.name for p in (tmp_path / "healed").iterdir()} == names
    old, new = (
        load_file(f / "model.safetensors") for f in (made / "emulator", tmp_path / "healed")
    )
    assert {n: (t.shape, t.dtype) for n, t in old.items()} == {
        n: (t.shape, t.dtype) for n, t in new.items()
    }
    changed = {n for n in old if not torch.equal(old[n], new[n])}
    assert changed and all("mlp" in n or "self_attn" in n for n in changed)


def test_healing_is_the_same_each_time_and_in_chunks(
    made: Path, codec: TextCodec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []
    for name in "ab":
        heal_tiny(made, codec, tmp_path / name, steps=3)
        files.append((tmp_path / name / "healed" / "model.safetensors").read_bytes())
    assert files[0] == files[1]
    monkeypatch.setattr(distill, "CHUNK", 5 * VOCAB_SIZE)
    heal_tiny(made, codec, tmp_path / "c", steps=3)
    whole, parts = (load_file(tmp_path / n / "healed" / "model.safetensors") for n in "ac")
    for key, tensor in whole.items():
        torch.testing.assert_close(parts[key], tensor, atol=1e-4, rtol=1e-3)


def test_a_healed_emulator_is_written_without_a_second_copy(made: Path, tmp_path: Path) -> None:
    with AllocationTracker() as tracker:
        adapted = split_off(load_model(made / "emulator", dtype=FLOAT, device="cpu"), SETTINGS)
        before = tracker.live_bytes
        write_healed(made / "emulator", adapted, tmp_path / "healed")
    factors = [layer.base_layer for layer in adapted.modules() if isinstance(layer, LoraLayer)]
    assert factors and not any(len(f.weight) + len(f.weight_in) for f in factors)
    stored = sum(file.stat().st_size for file in (tmp_path / "healed").glob("*.safetensors"))
    assert tracker.peak_bytes < before + 0.8 * stored


def test_logits_are_computed_in_chunks_before_and_after_as_well(
    made: Path, codec: TextCodec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []

    def counting(head: nn.Module, hidden: torch.Tensor, *targets: torch.Tensor) -> torch.Tensor:
        counts.append(len(hidden))
        return sum_of_divergences(head, hidden, *targets)

    monkeypatch.setattr(distill, "sum_of_divergences", counting)
    heal_tiny(made, codec, tmp_path, steps=3)
    held = ROWS // 8 // SETTINGS.batch_size
    assert len(counts) == held + 3 + held


def test_fewer_rows_at_once_heal_the_same(made: Path, codec: TextCodec, tmp_path: Path) -> None:
    """The rows have lengths of their own, so that a mean of means would be another."""
    for name, rows in (("whole", 8), ("parts", 2)):
        options = {"steps": 3, "batch_size": rows, "accumulation": 8 // rows}
        heal_tiny(made, codec, tmp_path / name, **options)
    whole, parts = (
        load_file(tmp_path / n / "healed" / "model.safetensors") for n in ("whole", "parts")
    )
    for key, tensor in whole.items():
        torch.testing.assert_close(parts[key], tensor, atol=1e-4, rtol=1e-3)


def test_bad_input_is_refused_and_leaves_nothing(
    made: Path, codec: TextCodec, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="top_k is 0, but it must be from 1"):
        teach_tiny(made, codec, tmp_path / "targets", top_k=0)
    with pytest.raises(ValueError, match="to other rows than these"):
        heal(
            made / "emulator",
            make_rows(ROWS, seed=5),
            Targets(made / "targets"),
            codec=codec,
            settings=SETTINGS,
            out=tmp_path / "healed",
            checkpoints=tmp_path / "checkpoints",
        )
    with pytest.raises(ValueError, match="loss became|grad_norm became"):
        heal_tiny(made, codec, tmp_path, learning_rate=1e30)
    assert not (tmp_path / "healed").exists() and not (tmp_path / "targets").exists()

"""A model spread over memory and disk answers as the whole one does, with and without LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import emloc.offload as offload
from emloc.families.text import TextCodec
from emloc.files import write_json
from emloc.generate import generate_answers, mean_loss
from emloc.models import load_model
from emloc.offload import add_adapter, device_of, shares, spread_over
from tasks import layout
from tasks.params import load_params
from tasks.report import spread_weights
from tests.built import build
from tests.test_generate import ROWS
from tests.test_streaming import DENSE
from tests.test_vision_streaming import FAMILIES, make_family
from tests.tiny import save_tiny, tiny_tokenizer

CODEC = TextCodec(tiny_tokenizer())
PARTS = {"none": 0.01, "half": 0.5, "most": 0.8}  # of the weights, in memory


def load(path: Path, part: float | None = None, **options: Any) -> Any:
    """A model whole, or with a budget that a part of its weights fits."""
    if part is not None:
        size = offload._weight_bytes(path, torch.float32)
        budget = int(size * part / offload.WEIGHTS_SHARE)
        options = {"offload": True, "budget_bytes": budget, **options}
    return load_model(path, dtype=torch.float32, device="cpu", **options)


def results(model: nn.Module, codec: Any = CODEC, rows: Any = None) -> tuple[list[str], float]:
    rows = codec.encode(rows or ROWS, max_length=4000, source="test")
    said = generate_answers(model, codec, rows, batch_size=2, max_new_tokens=6)
    return said, mean_loss(model, codec, rows, batch_size=2)


def held_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters() if not p.is_meta)


def save_adapter(base: Path, folder: Path, **options: Any) -> Path:
    """An adapter of random weights, as peft saves it."""
    torch.manual_seed(1)
    settings: dict[str, Any] = {"r": 4, "target_modules": "all-linear", **options}
    model = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key or "modules_to_save" in key:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("name", DENSE)
def test_answers_are_those_of_the_whole_model(name: str, part: float, tmp_path: Path) -> None:
    folder = save_tiny(name, tmp_path / "model")
    model = load(folder, part)
    assert results(model) == results(load(folder))  # to the bit
    where = shares(model)
    assert "disk" in where and sum(where.values()) == pytest.approx(1, abs=1e-3)
    whole = held_bytes(load(folder))
    assert held_bytes(model) == pytest.approx(where.get("cpu", 0) * whole, abs=1e-4 * whole)
    assert where.get("cpu", 0) <= part
    assert device_of(model) == torch.device("cpu")  # where model.device can be meta


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_an_adapter_works_on_top(
    name: str, part: float, options: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_tiny(name, tmp_path / "model")
    adapter = save_adapter(folder, tmp_path / "adapter", **options)
    model = load(folder, part)
    before = held_bytes(model)
    adapted = add_adapter(model, adapter)
    assert results(adapted) == results(add_adapter(load(folder), adapter)) != results(load(folder))
    assert shares(model)["disk"] > 0
    assert model.hf_device_map
    if not options:
        lora = sum(p.nbytes for n, p in adapted.named_parameters() if "lora_" in n)
        assert held_bytes(adapted) == before + lora  # peft moved nothing else


@pytest.mark.parametrize("name", FAMILIES)
def test_a_vision_language_model_with_an_adapter_is_the_same_spread(
    name: str, tmp_path: Path
) -> None:
    family = make_family(name, tmp_path)
    adapter = save_adapter(family.folder, tmp_path / "adapter")
    whole = add_adapter(load(family.folder), adapter)
    model = load(family.folder, 0.6)
    assert shares(model)["disk"] > 0
    spread = add_adapter(model, adapter)
    assert results(spread, family.codec, family.rows) == results(whole, family.codec, family.rows)


def test_an_emulator_can_be_spread(tmp_path: Path) -> None:
    built = build("llama", tmp_path)
    model = load(built.emulator, 0.7)
    assert shares(model)["disk"] > 0
    assert results(model) == results(load(built.emulator))


def test_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny("llama", tmp_path / "model", max_shard_size="20KB")
    adapter = save_adapter(folder, tmp_path / "adapter")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "here"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    results(add_adapter(load(folder, 0.3), adapter))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_what_fits_or_may_not_be_spread_is_whole(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    fits = load(folder, 1.01)
    asked = load(folder, 0.1, offload=False)  # training, say
    for model in (fits, asked, load(folder, offload=True)):
        assert shares(model) == {"cpu": 1.0}
        assert not any(p.is_meta for p in model.parameters())
        assert not hasattr(model, "_hf_hook")


def test_half_the_bytes_are_enough_in_half_the_precision(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    cpu = torch.device("cpu")
    size = offload._weight_bytes(folder, torch.bfloat16)
    assert 2 * size == offload._weight_bytes(folder, torch.float32)
    budget = int(1.1 * size / offload.WEIGHTS_SHARE)
    assert spread_over(folder, torch.bfloat16, cpu, budget) is None
    assert spread_over(folder, torch.float32, cpu, budget) is not None


@pytest.mark.parametrize(("device", "place"), [("cuda:1", 1), ("cuda", 3), ("mps", "mps")], ids=str)
def test_an_accelerator_comes_first_then_memory(
    device: str, place: int | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny("llama", tmp_path)
    free = {"cpu": 10**9, "cuda": 50_000, "mps": 50_000}
    monkeypatch.setattr(offload, "free_bytes", lambda d: free[d.type])
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)

    def spread(budget: int | None) -> dict[int | str, int] | None:
        return spread_over(folder, torch.float32, torch.device(device), budget)

    memory = {} if device == "mps" else {"cpu": 800_000_000}  # there it is the same memory
    assert spread(10_000) == {place: 8_000, **memory}
    assert spread(10**9) == spread(None) == {place: 40_000, **memory}  # no more than is free


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_that_is_none_is_refused(budget: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"the memory budget is {budget} bytes.*positive"):
        load(save_tiny("llama", tmp_path), offload=True, budget_bytes=budget)


def test_the_report_tells_what_did_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = load_params()
    monkeypatch.chdir(tmp_path)
    weights = {"original-raw": {"cuda:0": 0.6, "cpu": 0.4}, "emulator-raw": {"cuda:0": 1.0}}
    for folder in (layout.BASELINE, *map(layout.results, params.ratios)):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "evaluate.cost.json", {"seconds": 1})  # as of an older run
    write_json(layout.BASELINE / "baseline.cost.json", {"weights": {"original": {"disk": 1.0}}})
    write_json(layout.results(params.ratios[0]) / "evaluate.cost.json", {"weights": weights})
    assert spread_weights(params) == [
        "Weights of original alone while it was scored: 100% disk.",
        f"Weights of original + raw {params.ratios[0]} while it was scored: 60% cuda:0, 40% cpu.",
    ]

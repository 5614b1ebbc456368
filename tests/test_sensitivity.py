"""Sensitivities are what torch's own gradients say, whatever the batches, and leave no trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from emloc import loss as losses
from emloc.families import Codec, load_codec
from emloc.families.text import TextCodec
from emloc.models import load_model
from emloc.sensitivity import sensitivities
from emloc.targets import select
from tests.built import BLOCKS, build
from tests.tiny import tiny_model, tiny_tokenizer
from tests.tiny_vision import conversation, save_picture, save_tiny_vision
from tests.training import make_rows

Sensitivities = Callable[..., dict[str, float]]


def by_autograd(
    model: PreTrainedModel, examples: Sequence[Any], codec: Codec, names: Sequence[str]
) -> dict[str, float]:
    """Row by row, so without padding: gradients of the summed cross entropy by torch."""
    modules = dict(model.named_modules())
    outputs: dict[str, Tensor] = {}
    handles = [
        modules[name].register_forward_hook(
            lambda _module, _inputs, output, name=name: outputs.update({name: output})
        )
        for name in names
    ]
    sums, tokens = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    model.requires_grad_(True)
    for example in examples:
        batch = codec.collate([example], side="right")
        labels = batch.pop("labels")[0, 1:]
        logits = model(**batch).logits[0, :-1]
        total = nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
        found = torch.autograd.grad(total, [outputs[name] for name in names], allow_unused=True)
        for name, gradient in zip(names, found, strict=True):
            if gradient is not None:
                sums[name] += float(gradient.square().sum()) / gradient.shape[-1]
                tokens[name] += gradient[..., 0].numel()
    model.requires_grad_(False)
    for handle in handles:
        handle.remove()
    return {name: sums[name] / max(1, tokens[name]) for name in names}


def text() -> tuple[PreTrainedModel, list[Any], Codec, list[str]]:
    model = tiny_model("llama")
    names = list(select(model, [BLOCKS], where="targets"))
    return model, make_rows(7), TextCodec(tiny_tokenizer()), names


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_language_model_s_are_those_of_its_rows_one_by_one(
    checkpointing: bool, batch_size: int
) -> None:
    model, rows, codec, names = text()
    options: dict[str, Any] = dict(batch_size=batch_size, checkpointing=checkpointing)
    found = sensitivities(model, rows, codec=codec, names=names, **options)
    expected = by_autograd(model, rows, codec, names)
    assert list(found) == names
    assert found == pytest.approx(expected, rel=1e-4)  # 2e-6
    assert max(found.values()) > 2 * min(found.values()) > 0
    assert found == sensitivities(model, rows, codec=codec, names=names, **options)


@pytest.mark.parametrize("family", ["internvl-llama", "qwen2_5_vl", "llava"])
def test_those_of_a_vision_tower_come_from_the_answers_as_well(family: str, tmp_path: Path) -> None:
    model = load_model(save_tiny_vision(family, tmp_path), dtype=torch.float32, device="cpu")
    rows = []
    for number, size in enumerate([(28, 28), (60, 30), (30, 60)]):
        save_picture(tmp_path / f"{number}.png", *size, seed=number)
        rows.append(conversation(f"{number}.png", question="What is it?" * (number + 1)))
    codec = load_codec(tmp_path, root=tmp_path)
    examples = codec.encode(rows, max_length=2000, source="rows")
    names = list(select(model, [r".*(layers?|blocks)\.\d+\..*"], where="targets"))
    found = sensitivities(model, examples, codec=codec, names=names, batch_size=3)
    expected = by_autograd(model, examples, codec, names)
    seeing = [name for name in names if "vision" in name or "visual" in name]
    assert 0 < len(seeing) < len(names)
    assert found == pytest.approx(expected, rel=1e-3)
    assert found[seeing[0]] > 0


def test_an_emulator_s_low_rank_layers_have_some_too(tmp_path: Path) -> None:
    made = build("qwen2", tmp_path)
    model = load_model(made.emulator, dtype=torch.float32, device="cpu")
    codec, names, rows = load_codec(made.emulator), list(made.factors.modules), make_rows(4)
    found = sensitivities(model, rows, codec=codec, names=names, batch_size=2)
    assert found == pytest.approx(by_autograd(model, rows, codec, names), rel=1e-4)


def test_a_loss_in_chunks_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows, codec, names = text()
    whole = sensitivities(model, rows, codec=codec, names=names, batch_size=3)
    monkeypatch.setattr(losses, "LARGE", 1)
    assert sensitivities(model, rows, codec=codec, names=names, batch_size=3) == pytest.approx(
        whole, rel=1e-4
    )


def test_the_model_is_left_as_it_was() -> None:
    model, rows, codec, names = text()
    model.train()
    learnt = model.get_parameter("model.norm.weight")
    model.requires_grad_(False)
    learnt.requires_grad = True
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sensitivities(model, rows, codec=codec, names=names)
    assert all(module.training for module in model.modules())
    assert [p for p in model.parameters() if p.requires_grad] == [learnt]
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    for module in model.modules():
        assert "forward" not in vars(module) and not module._forward_hooks


def test_rows_without_labels_do_not_count_and_some_must_have_one() -> None:
    model, rows, codec, names = text()
    silent = [{**row, "labels": [-100] * len(row["labels"])} for row in rows]
    found = sensitivities(model, [*silent, *rows], codec=codec, names=names)
    assert found == sensitivities(model, rows, codec=codec, names=names)
    with pytest.raises(ValueError, match="none of 7 rows has a label, but sensitivity needs"):
        sensitivities(model, silent, codec=codec, names=names)


def test_a_layer_that_never_runs_or_a_gradient_that_is_not_finite_is_named() -> None:
    model, rows, codec, names = text()
    model.model.layers[1].unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"layers\.1\.unused was not used by any row"):
        sensitivities(model, rows, codec=codec, names=["model.layers.1.unused", *names])
    nn.init.constant_(model.model.layers[1].mlp.up_proj.weight, torch.inf)
    with pytest.raises(ValueError, match=r"the gradient at model\.\S+ is not finite"):
        sensitivities(model, rows, codec=codec, names=names)

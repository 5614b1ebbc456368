"""The loss in chunks: the same number and the same gradient, and only where a model allows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, PreTrainedModel

from emloc import loss
from emloc.loss import LossInChunks, chunked_cross_entropy
from tests.tiny import VOCAB_SIZE, draw_weights, tiny_model
from tests.training import train, weights

SHAPE: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
)  # fmt: skip
MODELS = ("llama", "llama-tied", "qwen3", "gemma3", "phi3", "gpt-neox")


@pytest.fixture(autouse=True)
def _always_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "LARGE", 0)


def ids_and_labels(rows: int = 3, tokens: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, VOCAB_SIZE, (rows, tokens), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :7] = -100
    return ids, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_cross_entropy_and_its_gradient(dtype: torch.dtype) -> None:
    """In bfloat16 a token's loss is rounded: 2e-3 of the sum was seen, 2e-3 of the gradient."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(70, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(500, 16, generator=generator).to(dtype)
    labels = torch.randint(500, (70,), generator=generator)
    labels[::9] = -100
    plain = nn.functional.cross_entropy(
        (hidden.float() @ weight.float().T), labels, reduction="sum"
    )
    (wanted,) = torch.autograd.grad(plain, hidden)
    total = chunked_cross_entropy(hidden, weight, labels)
    (gradient,) = torch.autograd.grad(total, hidden)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, plain, rtol=tolerance, atol=0)
    assert (gradient - wanted).norm() < tolerance * wanted.norm()
    assert not gradient[::9].any()


def check_that_chunks_change_nothing(model: Any) -> None:
    ids, labels = ids_and_labels()
    plain = model(input_ids=ids, labels=labels, use_cache=False)
    chunks = LossInChunks(model)
    assert chunks.wanted(1)
    with chunks.applied():
        other = model(input_ids=ids, labels=labels, use_cache=False)
    assert other.logits.shape[-1] == model.config.hidden_size  # no logits at all
    torch.testing.assert_close(other.loss, plain.loss, rtol=1e-5, atol=0)
    again = model(input_ids=ids, labels=labels, use_cache=False)
    torch.testing.assert_close(again.logits, plain.logits)  # and the model is as it was
    assert again.loss == plain.loss


@pytest.mark.parametrize("name", MODELS)
def test_a_models_own_forward_gives_the_same_loss_without_logits(name: str) -> None:
    check_that_chunks_change_nothing(tiny_model(name).requires_grad_(False))


def scaled_model(config: Any) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(config)
    draw_weights(model, 0)
    return model.eval().requires_grad_(False)


def test_a_model_that_scales_its_logits_gets_the_same_loss() -> None:
    check_that_chunks_change_nothing(scaled_model(CohereConfig(logit_scale=0.25, **SHAPE)))


def test_a_model_that_caps_its_logits_keeps_its_own_loss() -> None:
    config = Gemma2Config(final_logit_softcapping=1000.0, head_dim=8, **SHAPE)
    assert not LossInChunks(scaled_model(config)).wanted(1)
    config.final_logit_softcapping = None
    assert LossInChunks(scaled_model(config)).wanted(1)


def test_a_head_with_a_bias_or_that_is_trained_keeps_its_own_loss() -> None:
    model: Any = tiny_model("llama")
    model.lm_head.requires_grad_(True)
    assert not LossInChunks(model).wanted(1)
    model.requires_grad_(False)
    assert LossInChunks(model).wanted(1)
    model.lm_head.bias = nn.Parameter(torch.zeros(VOCAB_SIZE), requires_grad=False)
    assert not LossInChunks(model).wanted(1)


def test_few_logits_are_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "LARGE", 10 * VOCAB_SIZE)
    model = tiny_model("llama").requires_grad_(False)
    assert not LossInChunks(model).wanted(10)
    assert LossInChunks(model).wanted(11)


def test_training_in_chunks_ends_with_the_same_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest difference seen is 4e-6, after 4 steps at a learning rate of 1e-2."""
    applied: list[bool] = []
    wanted = LossInChunks.wanted

    def watch(chunks: LossInChunks, labels: int) -> bool:
        applied.append(wanted(chunks, labels))
        return applied[-1]

    monkeypatch.setattr(LossInChunks, "wanted", watch)
    history = train(tiny_model("llama"), tmp_path / "chunks", accumulation=2)["history"]
    assert all(applied)
    monkeypatch.setattr(loss, "LARGE", 2**26)
    plain = train(tiny_model("llama"), tmp_path / "plain", accumulation=2)["history"]
    assert not applied[-1]
    losses = [[row["loss"] for row in rows] for rows in (history, plain)]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-5, atol=0)
    mine, others = weights(tmp_path / "chunks"), weights(tmp_path / "plain")
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, others[name], rtol=0, atol=1e-4)

"""LoRA settings: what is refused, and that what is allowed arrives in peft and in the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from emloc.lora import add_lora, check_lora_config
from emloc.settings import LoraSettings
from tests.tiny import tiny_model
from tests.training import logits, one_thread, save_emulator, train, weights

__all__ = ["one_thread"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(r=0), "r is 0"),
        (dict(alpha=0), "alpha is 0"),
        (dict(dropout=1.0), "dropout is 1.0"),
        (dict(target_modules=[]), "target_modules"),
        (dict(target_modules=""), "target_modules"),
        (dict(target_modules="(q_proj"), "no valid regex"),
        (dict(use_rslora="no"), "use_rslora"),
        (dict(rank_pattern={"q_proj": 0}), r"rank_pattern\['q_proj'\] is 0"),
        (dict(alpha_pattern={"q_proj": -1}), r"alpha_pattern\['q_proj'\] is -1"),
        (dict(modules_to_save="norm"), "modules_to_save is 'norm'"),
        (dict(init="pissa"), "init is 'pissa'.*'gaussian'"),
    ],
)
def test_bad_lora_settings_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraSettings(**change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(use_dora=True), "DoRA needs the full weight"),
        (dict(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
        (dict(init_lora_weights="olora"), "init_lora_weights is 'olora'"),
        (dict(init_lora_weights="orthogonal"), "init_lora_weights is 'orthogonal'"),
        (dict(init_lora_weights=False), "init_lora_weights is False"),
        (dict(lora_bias=True), "lora_bias is True"),
        (dict(bias="all"), "bias is 'all'"),
        (dict(target_parameters=["weight"]), "target_parameters"),
        (dict(layer_replication=[(0, 1)]), "layer_replication"),
        (dict(trainable_token_indices=[1]), "trainable_token_indices"),
        (dict(use_qalora=True), "use_qalora"),
        (dict(target_modules=["embed_tokens"]), "matches 'model.embed_tokens', a Embedding"),
        (dict(target_modules=["self_attn"]), "a LlamaAttention, but"),
        (dict(target_modules=["q_proj", "qproj"]), r"has 'qproj', .*q_proj \(2\)"),
        (dict(target_modules=r"model\.layer\..*"), r"matches no module .*down_proj \(2\)"),
        (dict(target_modules="q_proj"), "matches no module"),
        (dict(target_modules="lm_head"), "shares its weight"),
        (dict(rank_pattern={"qproj": 2}), "rank_pattern has 'qproj'"),
        (dict(alpha_pattern={"q_proj": 2, ".*_proj": 3}), "2 entries that match"),
        (dict(modules_to_save=["head"], target_modules=["q_proj"]), None),
        (dict(modules_to_save=["heads"]), "modules_to_save has 'heads'"),
    ],
)
def test_lora_that_an_emulator_cannot_train_is_refused(
    options: dict[str, Any], message: str | None
) -> None:
    config = LoraConfig(**{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})
    model = tiny_model("llama-tied")
    if message is None:
        assert len(check_lora_config(model, config)) == 2
        return
    with pytest.raises(ValueError, match=message):
        check_lora_config(model, config)


def test_compressed_module_cannot_be_saved_whole(tmp_path: Path) -> None:
    emulator = AutoModelForCausalLM.from_pretrained(save_emulator(tmp_path / "emulator"))
    for ending in ("up_proj", "layers.0"):
        with pytest.raises(ValueError, match="is compressed in this emulator"):
            check_lora_config(emulator, LoraSettings(modules_to_save=[ending]).config())


def test_saved_modules_are_trained_and_travel_with_the_adapter(tmp_path: Path) -> None:
    lora = LoraSettings(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = tiny_model("llama")
    train(model, tmp_path, lora=lora, save_steps=2)
    assert any("lm_head" in name for name in weights(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model))


def test_second_adapter_on_a_model_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    train(model, tmp_path)
    with pytest.raises(ValueError, match="already has an adapter"):
        train(model, tmp_path)


def test_ranks_scales_and_start_follow_the_settings() -> None:
    lora = LoraSettings(
        r=4, alpha=6, use_rslora=True, init="gaussian", rank_pattern={r"layers\.0\..*q_proj": 2}
    )
    adapted = add_lora(tiny_model("llama"), lora, base_name="x", seed=1)
    layers = adapted.get_base_model().model.layers
    assert [layer.self_attn.q_proj.r["default"] for layer in layers] == [2, 4]
    scalings = [layer.self_attn.q_proj.scaling["default"] for layer in layers]
    assert scalings == pytest.approx([6 / 2**0.5, 6 / 4**0.5])
    again = add_lora(tiny_model("llama"), lora, base_name="x", seed=1).state_dict()
    other = add_lora(tiny_model("llama"), lora, base_name="x", seed=2).state_dict()
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"
    assert torch.equal(adapted.state_dict()[key], again[key])
    assert not torch.equal(again[key], other[key])
    assert not any("lm_head.lora" in name for name in again)

"""Which layers are chosen and at what ratio; each mistake is named."""

from __future__ import annotations

import re

import pytest
from torch import nn

from emloc.targets import ratios_for, select
from tests.tiny import tiny_model

BLOCKS = r"model\.layers\..*"


def reference_names() -> list[str]:
    """Names of linear layers as in InternVL2.5-8B: 24 vision blocks, 32 language blocks."""
    vision = [
        f"vision_model.encoder.layers.{n}.{part}"
        for n in range(24)
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    language = [
        f"language_model.model.layers.{n}.{part}"
        for n in range(32)
        for part in ("attention.wqkv", "attention.wo")
        + tuple(f"feed_forward.w{number}" for number in (1, 2, 3))
    ]
    return [*vision, *language, "mlp1.1", "mlp1.3", "language_model.output"]


def test_select_keeps_the_model_s_order_and_needs_full_matches() -> None:
    model = tiny_model("llama")
    chosen = select(model, [r".*down_proj", r".*q_proj"], where="calibrate.targets")
    assert list(chosen) == [
        f"model.layers.{n}.{part}" for n in (0, 1) for part in ("self_attn.q_proj", "mlp.down_proj")
    ]
    assert all(isinstance(linear, nn.Linear) for linear in chosen.values())
    with pytest.raises(ValueError, match="must match a full name, such as .*q_proj"):
        select(model, ["q_proj"], where="calibrate.targets")


def test_select_names_an_invalid_or_idle_pattern() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=re.escape("calibrate.targets holds '(', which is no")):
        select(model, ["("], where="calibrate.targets")
    with pytest.raises(ValueError, match="'.*qq_proj' matches none of the model's 15 linear"):
        select(model, [BLOCKS, ".*qq_proj"], where="calibrate.targets")


def test_select_refuses_a_tied_head_and_takes_an_untied_one() -> None:
    with pytest.raises(ValueError, match="lm_head, which shares its weight with another module"):
        select(tiny_model("llama-tied"), [".*"], where="calibrate.targets")
    assert "lm_head" in select(tiny_model("llama"), [".*"], where="calibrate.targets")


def test_select_refuses_gpt2_whose_layers_are_no_linears() -> None:
    """Its blocks are made of transformers' Conv1D, which is not `nn.Linear`."""
    with pytest.raises(ValueError, match="matches none of the model's 1 linear layers"):
        select(tiny_model("gpt2"), [r"transformer\.h\..*"], where="calibrate.targets")


def test_first_full_match_wins() -> None:
    names = [f"layers.{n}.{part}" for n in (0, 1) for part in ("q", "k")]
    targets = {r"layers\.0\..*": 0.3, r".*\.q": "ratio"}
    assert ratios_for(names, targets, 0.7, where="compress.targets") == {
        "layers.0.q": 0.3,
        "layers.0.k": 0.3,
        "layers.1.q": 0.7,
    }
    turned = dict(reversed(targets.items()))
    assert ratios_for(names, turned, 0.7, where="compress.targets")["layers.0.q"] == 0.7


@pytest.mark.parametrize("value", [0, 1, 1.0, -0.2, 2, "ratios", None, [0.4], True])
def test_value_that_is_no_ratio_is_named(value: object) -> None:
    with pytest.raises(ValueError, match=re.escape(f"compress.targets: '.*' is {value!r}")):
        ratios_for(["a"], {".*": value}, 0.5, where="compress.targets")  # type: ignore[dict-item]


def test_target_that_matches_nothing_or_is_invalid_is_named() -> None:
    with pytest.raises(ValueError, match=r"'b' matches none of the 1 calibrated layers.*like a"):
        ratios_for(["a"], {"a": 0.5, "b": 0.5}, 0.5, where="compress.targets")
    with pytest.raises(ValueError, match="no valid regex"):
        ratios_for(["a"], {"[": 0.5}, 0.5, where="compress.targets")


def test_the_reference_s_config_can_be_written() -> None:
    targets = {
        "vision_model.*layers.*": 0.4,
        "language_model.*layers(?!.*31.feed_forward.w2)(.+)": "ratio",
    }
    names = reference_names()
    chosen = ratios_for(names, targets, 0.4, where="compress.targets")
    assert set(chosen.values()) == {0.4}
    assert set(names) - set(chosen) == {
        "language_model.model.layers.31.feed_forward.w2",
        "mlp1.1",
        "mlp1.3",
        "language_model.output",
    }

"""The low-rank layer is a linear layer, and only fitting ranks of known layers are accepted."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from emloc.lowrank import METHOD, EmlocQuantizer, LowRankLinear, register, replace_linears
from tests.tiny import tiny_model


def test_low_rank_linear_multiplies_its_factors() -> None:
    torch.manual_seed(0)
    layer = LowRankLinear(6, 4, 2, dtype=torch.float64)
    nn.init.normal_(layer.bias)
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    expected = x @ (layer.weight @ layer.weight_in).T + layer.bias
    torch.testing.assert_close(layer(x), expected)
    assert isinstance(layer, nn.Linear)
    assert "rank=2" in repr(layer)


@pytest.mark.parametrize("rank", [0, 5, -1])
def test_rank_that_does_not_fit_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank is {rank}, but a 4×6 layer takes"):
        LowRankLinear(6, 4, rank)


def test_ranks_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="'model.nothing' is in the emulator's ranks"):
        replace_linears(tiny_model("llama"), {"model.nothing": 2})


def test_refusal_leaves_the_layer_and_replacing_keeps_its_place() -> None:
    model = tiny_model("qwen2")
    before = model.model.layers[0].self_attn.q_proj
    replace_linears(model, {"model.layers.0.self_attn.q_proj": 3})
    after = model.model.layers[0].self_attn.q_proj
    assert isinstance(after, LowRankLinear)
    assert (after.in_features, after.out_features) == (before.in_features, before.out_features)
    assert after.bias is not None
    assert after.weight.dtype == before.weight.dtype
    with pytest.raises(ValueError, match="rank is 99, but a 32×32 layer takes"):
        replace_linears(model, {"model.layers.1.self_attn.q_proj": 99})


def test_fresh_weights_have_the_spread_of_a_linear_s() -> None:
    torch.manual_seed(0)
    layer, usual = LowRankLinear(256, 256, 64), nn.Linear(256, 256)
    spread = float((layer.weight @ layer.weight_in).detach().std())
    assert spread == pytest.approx(float(usual.weight.detach().std()), rel=0.1)


def test_registering_again_changes_nothing() -> None:
    register()
    assert AUTO_QUANTIZER_MAPPING[METHOD] is EmlocQuantizer

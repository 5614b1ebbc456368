"""Streamed statistics are those of a plain forward, and the factors on disk follow from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel

from emloc.calibrate import calibrate
from emloc.factor_files import FactorFiles
from emloc.files import sha256
from emloc.models import open_model
from emloc.moments import Moments
from emloc.streaming import Stream
from emloc.targets import select
from emloc.weights import OpenedModel
from tests.opened import open_module, open_tiny, unequal_batches
from tests.test_streaming import DENSE
from tests.tiny import tiny_model

BLOCKS = [r".*layers\.\d+\..*"]
LINEAR = [name for name in DENSE if name != "gpt2"]


def run(
    opened: OpenedModel,
    out: Path,
    batches: list[dict[str, Tensor]] | None = None,
    *,
    patterns: list[str] | None = None,
    **options: Any,
) -> FactorFiles:
    if patterns is None:
        patterns = BLOCKS
    linears = select(opened.model, patterns, where="calibrate.targets")
    settings: dict[str, Any] = {"max_ratio": 0.8, "dtype": torch.float32, **options}
    batches = unequal_batches() if batches is None else batches
    calibrate(opened, batches, linears=linears, out=out, **settings)
    return FactorFiles(out)


def streamed_moments(opened: OpenedModel, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    stream = Stream(opened, "cpu")
    linears = select(opened.model, BLOCKS, where="targets")
    moments = Moments(linears, lambda _: batches[stream.current]["attention_mask"])
    taken: dict[str, Any] = {}

    def take(unit: str, _: nn.Module) -> None:
        names = [name for name in linears if name.startswith(f"{unit}.")]
        taken.update(moments.take(names))

    with moments.hooked():
        stream.run(batches, on_unit=take)
    return taken


def plain_moments(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    running: dict[str, Tensor] = {}
    linears = select(model, BLOCKS, where="targets")
    moments = Moments(linears, lambda _: running["attention_mask"])
    with moments.hooked(), torch.no_grad():
        for batch in batches:
            running = batch
            model(**batch)
    return moments.take(list(linears))


def unpadded_inputs(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Inputs (n×i, float64) of each linear, every row run for itself without padding."""
    seen: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]).double())

        return keep

    linears = select(model, BLOCKS, where="targets")
    handles = [m.register_forward_pre_hook(hook(name)) for name, m in linears.items()]
    with torch.no_grad():
        for batch in batches:
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                model(input_ids=ids[mask.bool()][None])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def loss(weight: Tensor, factors: FactorFiles, name: str, rank: int, x: Tensor) -> float:
    outer, inner = factors.cut(name, rank)
    gap = weight.detach().double() - outer.double() @ inner.double()
    return float((x @ gap.T).square().sum())


def optimum(weight: Tensor, x: Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(x @ weight.detach().double().T)[rank:].square().sum())


@pytest.mark.parametrize("name", LINEAR)
def test_streamed_sums_equal_a_plain_run_s(name: str, tmp_path: Path) -> None:
    batches = unequal_batches()
    streamed = streamed_moments(open_tiny(name, tmp_path), batches)
    plain = plain_moments(tiny_model(name), batches)
    assert list(streamed) == list(plain)
    for key, (leader, moment) in streamed.items():
        assert leader == plain[key][0]
        assert moment.tokens == plain[key][1].tokens == 28
        torch.testing.assert_close(moment.total, plain[key][1].total, rtol=0, atol=0)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", LINEAR)
def test_sums_are_those_of_the_tokens_without_padding(name: str, side: str, tmp_path: Path) -> None:
    batches = unequal_batches(side=side)
    if side == "left":  # where the position of a token is not taken from the mask
        for batch in batches:
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    sums = streamed_moments(open_tiny(name, tmp_path), batches)
    model = tiny_model(name, dtype=torch.float64)
    for key, x in unpadded_inputs(model, batches).items():
        leader, moment = sums[key]
        assert x.shape[0] == moment.tokens
        seen = x if moment.of_inputs else x @ model.get_submodule(key).weight.T
        expected = seen.T @ seen
        error = (moment.total.double() - expected).norm() / expected.norm()
        assert error < 1e-5, key  # measured: 8e-7, the rounding of a float32 forward


def test_a_missing_mask_would_show(tmp_path: Path) -> None:
    """The counterpart of the test above: padding does change the sums."""
    batches = unequal_batches()
    with_mask = streamed_moments(open_tiny("llama", tmp_path), batches)
    x = unpadded_inputs(tiny_model("llama", dtype=torch.float64), [
        {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])} for batch in batches
    ])  # fmt: skip
    key = "model.layers.0.self_attn.q_proj"
    expected = x[key].T @ x[key]
    assert (with_mask[key][1].total.double() - expected).norm() > 0.1 * expected.norm()


def test_padding_is_left_out_of_opt() -> None:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=300, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, pad_token_id=1,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    sums = plain_moments(model, unequal_batches())
    assert len(sums) == 6
    assert {moment.tokens for _, moment in sums.values()} == {28}


class Flat(nn.Module):
    """Flattens its tokens before a linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 6)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.fc(x.reshape(-1, 4))


def test_flattened_tokens_are_masked(tmp_path: Path) -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    opened = open_module(Flat(), tmp_path / "model")
    batch = {"x": torch.randn(2, 3, 4), "attention_mask": mask}
    factors = run(opened, tmp_path / "out", [batch], patterns=["fc"])
    assert factors.modules["fc"]["tokens"] == 3


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_factors_are_optimal_for_every_layer(name: str, tmp_path: Path) -> None:
    batches = unequal_batches(lengths=((40, 30), (25, 50)))
    factors = run(open_tiny(name, tmp_path / "model"), tmp_path / "out", batches)
    model = tiny_model(name, dtype=torch.float64)
    inputs = unpadded_inputs(model, batches)
    assert set(factors.modules) == set(inputs)
    for key, x in inputs.items():
        weight = model.get_submodule(key).weight
        for rank in (1, factors.modules[key]["rank"] // 2):
            best = optimum(weight, x, rank)
            assert loss(weight, factors, key, rank, x) == pytest.approx(best, rel=1e-6), key


@pytest.mark.parametrize(
    "patterns",
    [[r".*[kv]_proj"], [r".*q_proj", r".*k_proj"], [r".*(gate|up)_proj"], [r".*v_proj"]],
    ids=["k and v", "q and k", "gate and up", "v"],
)
def test_layers_that_share_a_wide_input_keep_their_own_sums(
    patterns: list[str], tmp_path: Path
) -> None:
    """Here k, v, gate and up have fewer outputs than inputs, and q has as many."""
    batches = unequal_batches(lengths=((40, 30), (25, 50)))
    shape = {"intermediate_size": 24}
    opened = open_tiny("llama", tmp_path / "model", **shape)
    factors = run(opened, tmp_path / "out", batches, patterns=patterns)
    model = tiny_model("llama", dtype=torch.float64, **shape)
    inputs = unpadded_inputs(model, batches)
    for key in factors.modules:
        weight = model.get_submodule(key).weight
        best = optimum(weight, inputs[key], 4)
        assert loss(weight, factors, key, 4, inputs[key]) == pytest.approx(best, rel=1e-6), key


def test_an_input_that_several_layers_see_is_summed_once(tmp_path: Path) -> None:
    sums = streamed_moments(open_tiny("llama", tmp_path), unequal_batches())
    leaders = {key.removeprefix("model.layers.1."): leader for key, (leader, _) in sums.items()}
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    for part in "qkv":
        assert leaders[f"self_attn.{part}_proj"] == f"{attention}.q_proj"
    assert leaders["mlp.up_proj"] == leaders["mlp.gate_proj"] == f"{mlp}.gate_proj"
    assert leaders["self_attn.o_proj"] == f"{attention}.o_proj"
    assert not sums[f"{mlp}.down_proj"][1].of_inputs
    assert sums[f"{mlp}.down_proj"][1].total.shape == (32, 32)


def test_bfloat16_with_large_biases_stays_optimal(tmp_path: Path) -> None:
    """A bias of 50 leaves 0.25 of a bfloat16 output's precision; y is therefore computed anew."""
    model = tiny_model("qwen2", dtype=torch.bfloat16)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("proj.bias"):
                parameter.copy_(50 * torch.randn(parameter.shape).sign())
    model.save_pretrained(tmp_path / "model")
    batches = unequal_batches(lengths=((40, 30), (25, 50)))
    opened = open_model(tmp_path / "model", dtype=torch.bfloat16)
    key = "model.layers.0.self_attn.k_proj"  # has fewer outputs than inputs, and a bias
    factors = run(opened, tmp_path / "out", batches, patterns=[r".*k_proj"])
    linear = model.get_submodule(key).requires_grad_(False)
    seen: list[tuple[Tensor, Tensor]] = []
    handle = linear.register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
    mask = []
    with torch.no_grad():
        for batch in batches:
            model(**batch)
            mask.append(batch["attention_mask"].bool())
    handle.remove()
    x = torch.cat([x[m].double() for (x, _), m in zip(seen, mask, strict=True)])
    rounded = torch.cat(
        [(y[m] - linear.bias).double() for (_, y), m in zip(seen, mask, strict=True)]
    )
    rank = 8
    best = optimum(linear.weight, x, rank)
    assert loss(linear.weight, factors, key, rank, x) == pytest.approx(best, rel=1e-6)
    vectors = torch.linalg.eigh(rounded.T @ rounded).eigenvectors.flip(1)[:, :rank]
    weight = linear.weight.double()
    naive = float((x @ (weight - vectors @ (vectors.T @ weight)).T).square().sum())
    assert naive > 1.001 * best  # the module's own output, bias subtracted, would not do


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    for number in (1, 2):
        run(open_tiny("qwen3", tmp_path / f"model{number}"), tmp_path / f"out{number}")
    first, second = (
        {path.name: sha256(path) for path in (tmp_path / f"out{number}").iterdir()}
        for number in (1, 2)
    )
    assert first == second
    assert len(first) == 3


def test_every_weight_is_read_once_and_the_rest_never(tmp_path: Path) -> None:
    opened = open_tiny("llama", tmp_path / "model")
    run(opened, tmp_path / "out")
    assert set(opened.store.reads.values()) == {1}
    assert "lm_head.weight" not in opened.store.reads


def test_without_samples_the_factors_are_the_plain_svd(tmp_path: Path) -> None:
    factors = run(open_tiny("llama", tmp_path / "model"), tmp_path / "out", [])
    model = tiny_model("llama", dtype=torch.float64)
    for key, entry in factors.modules.items():
        assert entry["tokens"] == 0
        weight = model.get_submodule(key).weight.detach()
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        outer, inner = factors.cut(key, 3)
        torch.testing.assert_close(
            (outer @ inner).double(), (u[:, :3] * s[:3]) @ vh[:3], rtol=0, atol=1e-6
        )
        torch.testing.assert_close(factors.eigenvalues(key), s.square(), rtol=1e-6, atol=1e-9)

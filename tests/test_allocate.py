"""Ranks shared out under one budget: exact, within bounds, and as good as trying all of them."""

from __future__ import annotations

import itertools
import math
import random
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from emloc.allocate import FLOOR, allocate, relative_weights, weighted_loss
from emloc.emulator import plan_ranks
from emloc.factor_files import FactorFiles
from emloc.factors import loss_kept, rank_for
from emloc.files import write_json
from emloc.targets import swept
from tests.built import Built, build

MAX_RATIO = 0.8


def write_factors(folder: Path, layers: Mapping[str, tuple[int, int, Tensor]]) -> FactorFiles:
    """Factor files of layers (o, i, eigenvalues), without the factors."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {f"{name}.eigenvalues": e.clone() for name, (_, _, e) in layers.items()}
    save_file(values, folder / "f")
    modules = [
        {"name": name, "out_features": o, "in_features": i, "rank": rank_for(MAX_RATIO, o, i)}
        | {"tokens": 9, "file": "f"}
        for name, (o, i, _) in layers.items()
    ]
    write_json(
        folder / "factors.json", {"modules": modules, "max_ratio": MAX_RATIO, "dtype": "float32"}
    )
    return FactorFiles(folder)


@st.composite
def cases(draw: st.DrawFn, *, equal: bool = False) -> dict[str, Any]:
    """A few layers with a ratio and a weight each; with `equal` their ranks cost the same."""
    draws = random.Random(draw(st.integers(0, 2**32)))
    one = (draws.randint(4, 12), draws.randint(4, 12))
    layers, ratios, weights = {}, {}, {}
    for name in "abcd"[: draw(st.integers(2, 3 if equal else 4))]:
        o, i = one if equal else (draws.randint(4, 12), draws.randint(4, 12))
        o, i = draws.choice([(o, i), (i, o)])
        power = draw(st.sampled_from([0, 1, 4]))  # 0: all equal
        values = sorted((draws.random() ** power for _ in range(min(o, i))), reverse=True)
        layers[name] = (o, i, torch.tensor(values, dtype=torch.float64))
        ratios[name] = draw(st.sampled_from([0.4, 0.6, 0.8]))
        weights[name] = draw(st.sampled_from([0.0, 0.3, 1.0, 7.0]))
    return {"layers": layers, "ratios": ratios, "weights": weights}


class Case:
    """A case with its files, the bounds of its ranks, and its budget."""

    def __init__(self, folder: str, case: dict[str, Any]) -> None:
        layers, self.ratios, self.weights = case["layers"], case["ratios"], case["weights"]
        self.factors = write_factors(Path(folder), layers)
        self.cost = {name: o + i for name, (o, i, _) in layers.items()}
        self.uniform = {name: rank_for(self.ratios[name], *layers[name][:2]) for name in layers}
        self.cap = {name: rank_for(MAX_RATIO, *layers[name][:2]) for name in layers}
        self.floor = {name: max(1, math.ceil(FLOOR * rank)) for name, rank in self.uniform.items()}

    def spent(self, ranks: Mapping[str, int]) -> int:
        return sum(self.cost[name] * rank for name, rank in ranks.items())

    def loss(self, ranks: Mapping[str, int]) -> float:
        return weighted_loss(self.factors, ranks, self.weights)

    def least(self) -> float:
        """The least loss of all ranks within the bounds and the budget."""
        every = [range(self.floor[name], self.cap[name] + 1) for name in self.cost]
        plans = (dict(zip(self.cost, ranks, strict=True)) for ranks in itertools.product(*every))
        return min(
            self.loss(plan) for plan in plans if self.spent(plan) <= self.spent(self.uniform)
        )


@given(cases())
@settings(max_examples=60, deadline=None)
def test_the_budget_is_spent_within_the_bounds_and_never_worse_than_uniform(
    case: dict[str, Any],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = Case(folder, case)
        ranks = allocate(made.factors, made.ratios, made.weights)
        assert list(ranks) == list(made.ratios)
        assert all(made.floor[name] <= ranks[name] <= made.cap[name] for name in ranks)
        left = made.spent(made.uniform) - made.spent(ranks)
        growing = [made.cost[name] for name in ranks if ranks[name] < made.cap[name]]
        assert 0 <= left < min(growing, default=math.inf)
        assert made.loss(ranks) <= made.loss(made.uniform) * (1 + 1e-12)
        assert ranks == allocate(made.factors, made.ratios, made.weights)


@given(cases(equal=True))
@settings(max_examples=30, deadline=None)
def test_ranks_that_cost_the_same_are_shared_out_optimally(case: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = Case(folder, case)
        ranks = allocate(made.factors, made.ratios, made.weights)
        assert made.loss(ranks) == pytest.approx(made.least(), rel=1e-9, abs=1e-12)


@given(cases())
@settings(max_examples=60, deadline=None)
def test_ranks_that_cost_differently_miss_the_optimum_by_less_than_one_rank_s_gain(
    case: dict[str, Any],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = Case(folder, case)
        ranks = allocate(made.factors, made.ratios, made.weights)
        gains = [
            made.weights[name] * float(made.factors.eigenvalues(name)[rank])
            for name, rank in ranks.items()
            if rank < made.cap[name]
        ]
        assert made.loss(ranks) <= made.least() + max(gains, default=0.0) + 1e-9


def test_gains_are_counted_for_each_parameter(tmp_path: Path) -> None:
    """A rank of the wide layer gains twice as much and takes four times the parameters."""
    flat = torch.ones(16, dtype=torch.float64)
    layers = {"wide": (16, 112, 2 * flat), "narrow": (16, 16, flat)}
    factors = write_factors(tmp_path, layers)
    ranks = allocate(factors, {"wide": 0.6, "narrow": 0.3}, dict.fromkeys(layers, 1.0))
    assert ranks == {"wide": 7, "narrow": 6}  # of 8 and 2: the narrow one is at its cap


def test_without_weights_each_error_is_relative_to_the_layer_s_own_output(tmp_path: Path) -> None:
    falling = torch.arange(32, 0, -1, dtype=torch.float64)
    layers = {
        name: (32, 32, scale * falling)
        for name, scale in {"small": 1, "large": 1000, "dead": 0}.items()
    }
    factors = write_factors(tmp_path, layers)
    ranks = allocate(factors, dict.fromkeys(layers, 0.5))
    assert ranks == {"small": 11, "large": 11, "dead": 2}  # of 8 each; 2 is the floor
    weights = relative_weights(factors)
    assert weights["dead"] == 0
    relative = sum(loss_kept(factors.eigenvalues(name), rank) for name, rank in ranks.items())
    assert weighted_loss(factors, ranks, weights) == pytest.approx(relative)
    absolute = allocate(factors, dict.fromkeys(layers, 0.5), dict.fromkeys(layers, 1.0))
    assert absolute["large"] > ranks["large"]


def test_equal_layers_stay_equal(tmp_path: Path) -> None:
    flat = torch.ones(16, dtype=torch.float64)
    factors = write_factors(tmp_path, {name: (16, 32, flat) for name in "abcd"})
    assert set(allocate(factors, dict.fromkeys("abcd", 0.5)).values()) == {rank_for(0.5, 16, 32)}


def test_what_cannot_be_allocated_is_named(tmp_path: Path) -> None:
    factors = write_factors(tmp_path, {"a": (8, 8, torch.ones(8, dtype=torch.float64))})
    with pytest.raises(ValueError, match="a is to be cut at ratio 0.9, but was calibrated up to"):
        allocate(factors, {"a": 0.9})
    with pytest.raises(ValueError, match="the weight of a is None"):
        allocate(factors, {"a": 0.5}, {})
    for weight in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"the weight of a is {weight}, but must be"):
            allocate(factors, {"a": 0.5}, {"a": weight})
    assert allocate(factors, {}) == {}


def test_hundreds_of_layers_take_seconds(tmp_path: Path) -> None:
    values = torch.logspace(0, -6, 3000, dtype=torch.float64)
    shapes = [(3000, 3000), (9000, 3000), (3000, 12000)]
    layers = {str(n): (*shapes[n % 3], values ** (1 + n / 300)) for n in range(300)}
    factors = write_factors(tmp_path, layers)
    started = time.perf_counter()
    ranks = allocate(factors, dict.fromkeys(layers, 0.5))
    assert time.perf_counter() - started < 5  # 0.3 s
    assert ranks["0"] > ranks["297"]  # the one's eigenvalues fall slower


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build("llama", tmp_path_factory.mktemp("llama"))


def test_a_plan_takes_the_ranks_it_is_given(built: Built) -> None:
    ratios = dict.fromkeys(built.factors.modules, 0.5)
    uniform, ranks = plan_ranks(built.factors, ratios), allocate(built.factors, ratios)
    assert ranks != {layer.name: layer.rank for layer in uniform}
    first = next(iter(ratios))
    some = {name: rank for name, rank in ranks.items() if name != first}
    plan = plan_ranks(built.factors, ratios, ranks=some)
    assert plan[0] == uniform[0]
    for layer in plan[1:]:
        assert layer.rank == ranks[layer.name]
        assert layer.kept == layer.rank * (layer.out_features + layer.in_features)
        assert layer.loss == loss_kept(built.factors.eigenvalues(layer.name), layer.rank)
    weights = relative_weights(built.factors)
    before = {layer.name: layer.rank for layer in uniform}
    # 2.4 against 2.9 on random weights
    assert weighted_loss(built.factors, ranks, weights) < 0.95 * weighted_loss(
        built.factors, before, weights
    )


def test_layers_with_a_ratio_of_their_own_are_not_swept() -> None:
    targets: dict[str, float | str] = {"b": 0.3, ".*": "ratio"}
    assert swept("abc", targets, where="targets") == ["a", "c"]
    assert swept("b", {"b": 0.3}, where="targets") == []

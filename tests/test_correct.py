"""The correction makes original + corrected adapter equal emulator + raw adapter where it can.

Letters: o out features, i in features, k rank of the emulator, r LoRA rank, s LoRA scaling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from emloc.correct import correct_layer

OUT, IN, RANK, R = 10, 14, 4, 5  # o, i, k, r
WEIGHTS = "adapter_model.safetensors"


@dataclass
class Layer:
    """One layer of everything, in float64: W and its bias, the emulator's factors, A, B and s."""

    weight: Tensor
    bias: Tensor
    emulated: tuple[Tensor, Tensor]
    a: Tensor
    b: Tensor
    scaling: float

    def raw_on_emulator(self, x: Tensor) -> Tensor:
        outer, inner = self.emulated
        return x @ (outer @ inner + self.scaling * self.b @ self.a).T + self.bias

    def on_original(self, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        return x @ (self.weight + self.scaling * b @ a).T + self.bias

    def correct(self, limit: float | None) -> tuple[Tensor, Tensor, float, float]:
        return correct_layer(
            self.a, self.b, self.weight, self.emulated, scaling=self.scaling, limit=limit
        )

    def row_space(self) -> Tensor:
        """Inputs (n×i) in A's row space."""
        return torch.randn(20, self.a.shape[0], dtype=torch.float64) @ self.a

    def outside(self) -> Tensor:
        """Inputs (n×i) orthogonal to A's rows."""
        x = torch.randn(20, self.a.shape[1], dtype=torch.float64)
        return x - x @ torch.linalg.pinv(self.a) @ self.a


def make(kind: str = "full", *, alpha: float = 16, rslora: bool = False, r: int = R) -> Layer:
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    a, b = random(r, IN), random(OUT, r)
    if kind == "zero row":
        a[1] = 0
    elif kind == "duplicate rows":
        a[2] = a[0]
    elif kind == "zero":
        a.zero_()
    scaling = alpha / (r**0.5 if rslora else r)
    return Layer(
        random(OUT, IN), 50 * random(OUT), (random(OUT, RANK), random(RANK, IN)), a, b, scaling
    )


def inputs(layer: Layer, tokens: int = 200) -> Tensor:
    """Correlated inputs (n×i): what A does not see can be told from what it does."""
    torch.manual_seed(1)
    mixing = torch.randn(IN, IN, dtype=torch.float64)
    return torch.randn(tokens, IN, dtype=torch.float64) @ mixing


def weighted(
    layer: Layer, x: Tensor, *, damping: float = 0.0, limit: float | None = None
) -> tuple[Tensor, Tensor]:
    """A' and B'' of the activation-weighted correction for inputs (n×i)."""
    basis = torch.linalg.svd(layer.a.T, full_matrices=False).U
    projected = basis.T @ x.T @ x
    a, b, _, _ = correct_layer(
        layer.a, layer.b, layer.weight, layer.emulated, scaling=layer.scaling, limit=limit,
        projected=projected, damping=damping,
    )  # fmt: skip
    return a, b


def error(layer: Layer, a: Tensor, b: Tensor, x: Tensor) -> float:
    return float((layer.on_original(a, b, x) - layer.raw_on_emulator(x)).square().sum())


def test_the_weighted_correction_is_the_least_squares_one() -> None:
    layer = make()
    x = inputs(layer)
    a, b = weighted(layer, x, damping=1e-12)
    outer, inner = layer.emulated
    wanted = x @ (outer @ inner - layer.weight).T  # (n, o), to be told from Qᵀx
    best = torch.linalg.lstsq(x @ a.T, wanted).solution.T  # (o, r)
    rotated = layer.b @ layer.a @ a.T  # B' on the basis
    torch.testing.assert_close(b, rotated + best / layer.scaling)
    plain = layer.correct(None)
    assert error(layer, a, b, x) < 0.9 * error(layer, *plain[:2], x)


def test_a_strong_damping_and_even_inputs_give_the_papers_correction() -> None:
    layer = make()
    a, b, _, _ = layer.correct(None)
    strong = weighted(layer, inputs(layer), damping=1e9)
    torch.testing.assert_close(strong[1], b, atol=1e-5, rtol=1e-5)
    even = weighted(layer, 7 * torch.eye(IN, dtype=torch.float64), damping=0.01)
    torch.testing.assert_close(even, (a, b))


@pytest.mark.parametrize("kind", ["full", "zero row", "duplicate rows", "zero"])
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_few_tokens_and_missing_directions_stay_finite(kind: str, tokens: int) -> None:
    layer = make(kind)
    x = inputs(layer, tokens)
    a, b = weighted(layer, x, damping=0.01)
    assert a.isfinite().all() and b.isfinite().all()
    plain_a, plain_b, _, _ = layer.correct(None)
    if tokens == 0:
        torch.testing.assert_close((a, b), (plain_a, plain_b))
    else:
        assert error(layer, a, b, x) <= error(layer, plain_a, plain_b, x) + 1e-6


CASES = [
    ("full", {"alpha": R}),
    ("full", {"alpha": 3 * R}),
    ("full", {"alpha": 2}),
    ("full", {"rslora": True}),
    ("full", {"r": IN + 2}),  # more rows than inputs
    ("zero row", {}),
    ("duplicate rows", {"rslora": True}),
]


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_identity_on_the_row_space(kind: str, options: dict[str, Any]) -> None:
    layer = make(kind, **options)
    a, b, _, clamped = layer.correct(None)
    x = layer.row_space()
    expected = layer.raw_on_emulator(x)
    # measured 1e-15 of the largest output, which is about 100
    torch.testing.assert_close(layer.on_original(a, b, x), expected, rtol=1e-11, atol=1e-11)
    assert (layer.on_original(layer.a, layer.b, x) - expected).abs().max() > 1  # was not so before
    assert clamped == 0
    assert (a.shape, b.shape) == (layer.a.shape, layer.b.shape)
    assert a.dtype == b.dtype == torch.float64


@pytest.mark.parametrize(("kind", "options"), [case for case in CASES if case[1] != {"r": IN + 2}])
def test_outside_the_row_space_the_original_is_alone(kind: str, options: dict[str, Any]) -> None:
    layer = make(kind, **options)
    a, b, _, _ = layer.correct(None)
    x = layer.outside()
    expected = x @ layer.weight.T + layer.bias
    assert x.norm() > 1
    torch.testing.assert_close(layer.on_original(a, b, x), expected, rtol=1e-11, atol=1e-11)


def test_adapter_that_is_all_zero_stays_so() -> None:
    layer = make("zero")
    a, b, size, clamped = layer.correct(3.0)
    assert float((b @ a).abs().max()) == 0
    assert (size, clamped) == (0, 0)


@pytest.mark.parametrize("kind", ["full", "duplicate rows"])
@pytest.mark.parametrize("limit", [0.05, 0.2, 0.5])
def test_clamp_obeys_its_limit_in_every_direction(limit: float, kind: str) -> None:
    layer = make(kind, alpha=4)
    layer.b *= torch.linspace(0.2, 3, R)  # so that some directions are clamped and some are not
    a, b, _, clamped = layer.correct(limit)
    own = layer.b @ layer.a @ a.T  # B', from the basis A' alone
    gap = (layer.weight - layer.emulated[0] @ layer.emulated[1]) @ a.T  # D
    taken = layer.scaling * (own - b)  # what was taken out, in the outputs' size
    used = (layer.a @ a.T).norm(dim=0) > 1e-9
    assert used.sum() == (R if kind == "full" else R - 1)
    factor = (limit * (layer.scaling * own).abs().mean(0) / gap.abs().mean(0)).clamp_max(1)
    expected = gap * torch.where(used, factor, 0)
    torch.testing.assert_close(taken, expected, rtol=1e-9, atol=1e-10)
    bound = limit * (layer.scaling * own).abs().mean(0)
    assert bool((taken.abs().mean(0) <= bound * (1 + 1e-9) + 1e-9).all())
    assert clamped == pytest.approx(float((factor[used] < 1).double().mean()))
    assert clamped > 0


def test_wide_limit_clamps_nothing_and_a_tight_one_leaves_the_raw_adapter() -> None:
    layer = make()
    free, wide = layer.correct(None), layer.correct(1e9)
    torch.testing.assert_close(wide[1], free[1], rtol=0, atol=0)
    a, b, size, clamped = layer.correct(1e-9)
    torch.testing.assert_close(b @ a, layer.b @ layer.a, rtol=1e-7, atol=1e-7)
    assert clamped == 1
    assert size == free[2] > 0.1


def test_float32_adapters_stay_float32() -> None:
    layer = make()
    a, b, _, _ = correct_layer(
        layer.a.float(), layer.b.float(), layer.weight.bfloat16(), layer.emulated,
        scaling=layer.scaling, limit=3.0,
    )  # fmt: skip
    assert a.dtype == b.dtype == torch.float32

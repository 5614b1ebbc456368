"""The factors reach the Eckart-Young optimum, are nested, and predict their own loss.

The reference is a float64 SVD of W X: the best rank-k stand-in loses the sum of the squared
singular values from k on. Letters: o out features, i in features, k rank, n tokens.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emloc.factors import (
    Factors,
    factorize_from_inputs,
    factorize_from_outputs,
    loss_kept,
    plain_factors,
    rank_for,
    root_of,
)

SHAPES = [(24, 40), (40, 40), (64, 40)]
TOLERANCE = 1e-6  # measured: 4e-11 from float32 moments, 1e-15 from float64 ones


def make(
    o: int, i: int, n: int, *, decay: float, seed: int = 0, rank: int | None = None
) -> tuple[Tensor, Tensor]:
    """W (o×i) and X (i×n) in float32; the spread of X falls by 10^decay over its directions."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(o, i, generator=generator) * i**-0.5
    mix = torch.linalg.qr(torch.randn(i, i, generator=generator)).Q
    spread = torch.logspace(0, -decay, i)
    if rank is not None:
        spread[rank:] = 0
    return weight, (mix * spread) @ torch.randn(i, n, generator=generator)


def loss(weight: Tensor, stand_in: Tensor, x: Tensor) -> float:
    return float(((weight.double() - stand_in.double()) @ x.double()).square().sum())


def optimum(weight: Tensor, x: Tensor, rank: int) -> float:
    singular = torch.linalg.svdvals(weight.double() @ x.double())
    return float(singular[rank:].square().sum())


def energy(weight: Tensor, x: Tensor) -> float:
    return float((weight.double() @ x.double()).square().sum())


def product(factors: Factors, rank: int) -> Tensor:
    return factors.out[:rank].T @ factors.in_[:rank]


def factorize(weight: Tensor, x: Tensor, rank: int, dtype: torch.dtype) -> Factors:
    """As calibration does it: sums in `dtype`, over the inputs if o ≥ i, else over the outputs."""
    x = x.to(dtype)
    if weight.shape[0] >= weight.shape[1]:
        return factorize_from_inputs(weight, root_of(x @ x.T), rank)
    y = weight.to(dtype) @ x
    return factorize_from_outputs(weight, y @ y.T, rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0], ids=["even", "falling", "steep"])
@pytest.mark.parametrize(("o", "i"), SHAPES)
def test_loss_is_the_optimum(o: int, i: int, decay: float, dtype: torch.dtype) -> None:
    weight, x = make(o, i, 4 * i, decay=decay)
    factors = factorize(weight, x, min(o, i) // 2, dtype)
    for rank in (1, 5, min(o, i) // 2):
        best = optimum(weight, x, rank)
        assert loss(weight, product(factors, rank), x) == pytest.approx(best, rel=TOLERANCE)


@pytest.mark.parametrize(("o", "i"), SHAPES)
def test_tail_below_the_precision_of_the_moments_costs_nothing_that_matters(o: int, i: int) -> None:
    """Spread over 6 decades (moments over 12): the tail drowns in float32 noise of the sums."""
    weight, x = make(o, i, 4 * i, decay=6.0)
    factors = factorize(weight, x, min(o, i) // 2, torch.float32)
    for rank in (3, min(o, i) // 2):
        excess = loss(weight, product(factors, rank), x) - optimum(weight, x, rank)
        assert excess <= 1e-8 * energy(weight, x)  # measured: 5e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("o", "i"), SHAPES)
def test_fewer_tokens_than_features(o: int, i: int, dtype: torch.dtype) -> None:
    n = 10
    weight, x = make(o, i, n, decay=0.5)
    factors = factorize(weight, x, 16, dtype)
    best = optimum(weight, x, 6)
    assert loss(weight, product(factors, 6), x) == pytest.approx(best, rel=TOLERANCE)
    rest = 1e-12 if dtype == torch.float32 else 1e-24
    for rank in (n, 16):  # from rank n on nothing is lost
        assert loss(weight, product(factors, rank), x) <= rest * energy(weight, x)


@pytest.mark.parametrize(("o", "i"), SHAPES)
def test_zero_moment_gives_finite_orthonormal_factors(o: int, i: int) -> None:
    weight, x = make(o, i, 8, decay=0.0)
    factors = factorize(weight, torch.zeros_like(x), 7, torch.float32)
    assert not factors.eigenvalues.any()
    assert loss_kept(factors.eigenvalues, 3) == 0.0
    torch.testing.assert_close(factors.out @ factors.out.T, torch.eye(7, dtype=torch.float64))
    torch.testing.assert_close(factors.in_, factors.out @ weight.double())


@pytest.mark.parametrize("decay", [0.5, 2.0])
@pytest.mark.parametrize(("o", "i"), SHAPES)
def test_cut_equals_a_direct_decomposition(o: int, i: int, decay: float) -> None:
    weight, x = make(o, i, 4 * i, decay=decay)
    wide = factorize(weight, x, 20, torch.float64)
    direct = factorize(weight, x, 9, torch.float64)
    # Same subspace: the projectors agree whatever the signs; measured 1e-15.
    torch.testing.assert_close(
        wide.out[:9].T @ wide.out[:9], direct.out.T @ direct.out, rtol=0, atol=1e-12
    )
    torch.testing.assert_close(product(wide, 9), product(direct, 9), rtol=0, atol=1e-12)
    assert loss(weight, product(wide, 9), x) == pytest.approx(
        loss(weight, product(direct, 9), x), rel=1e-12
    )


@pytest.mark.parametrize(("o", "i"), SHAPES)
def test_loss_kept_predicts_the_relative_loss(o: int, i: int) -> None:
    weight, x = make(o, i, 4 * i, decay=1.0)
    factors = factorize(weight, x, 20, torch.float32)
    assert factors.eigenvalues.shape == (min(o, i),)
    assert bool((factors.eigenvalues.diff() <= 0).all())
    for rank in (1, 8, 20):
        true = loss(weight, product(factors, rank), x) / energy(weight, x)
        assert loss_kept(factors.eigenvalues, rank) == pytest.approx(
            true, rel=1e-5
        )  # measured 8e-7


@settings(max_examples=25, deadline=None)
@given(
    o=st.integers(1, 24),
    i=st.integers(1, 24),
    n=st.integers(1, 40),
    used=st.integers(1, 24),
    share=st.floats(0.01, 1.0),
    seed=st.integers(0, 1000),
)
def test_any_shape_reaches_the_optimum(
    o: int, i: int, n: int, used: int, share: float, seed: int
) -> None:
    weight, x = make(o, i, n, decay=1.0, seed=seed, rank=used)
    rank = max(1, int(share * min(o, i)))
    factors = factorize(weight, x, rank, torch.float64)
    assert factors.out.shape == (rank, o)
    assert factors.in_.shape == (rank, i)
    best = optimum(weight, x, rank)
    floor = 1e-13 * energy(weight, x)
    assert loss(weight, product(factors, rank), x) <= best * (1 + TOLERANCE) + floor
    torch.testing.assert_close(
        factors.out @ factors.out.T, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-10
    )


def test_optimum_test_can_fail() -> None:
    """The plain SVD, which knows nothing of the activations, misses the optimum by far."""
    weight, x = make(24, 40, 160, decay=2.0)
    plain = product(plain_factors(weight, 8), 8)
    assert loss(weight, plain, x) > 1.5 * optimum(weight, x, 8)


@pytest.mark.parametrize(("o", "i"), SHAPES)
def test_plain_factors_are_the_truncated_svd(o: int, i: int) -> None:
    weight, _ = make(o, i, 1, decay=0.0)
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    expected = (u[:, :8] * s[:8]) @ vh[:8]
    factors = plain_factors(weight, 8)
    torch.testing.assert_close(product(factors, 8), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(factors.eigenvalues, s.square())


def test_inputs_and_outputs_give_the_same_factors() -> None:
    weight, x = make(24, 40, 160, decay=1.0)
    x = x.double()
    y = weight.double() @ x
    from_outputs = factorize_from_outputs(weight, y @ y.T, 8)
    from_inputs = factorize_from_inputs(weight, root_of(x @ x.T), 8)
    torch.testing.assert_close(
        product(from_inputs, 8), product(from_outputs, 8), rtol=0, atol=1e-12
    )


def test_root_is_a_root_even_of_a_singular_moment() -> None:
    _, x = make(4, 40, 10, decay=0.5)
    moment = x.double() @ x.double().T
    root = root_of(moment)
    torch.testing.assert_close(root @ root.T, moment, rtol=0, atol=1e-12)


@given(ratio=st.floats(1e-4, 0.9999), o=st.integers(1, 10_000), i=st.integers(1, 10_000))
def test_rank_keeps_at_most_the_ratio(ratio: float, o: int, i: int) -> None:
    rank = rank_for(ratio, o, i)
    assert 1 <= rank <= min(o, i)
    if rank > 1:
        assert rank * (o + i) <= ratio * o * i * (1 + 1e-12)
    assert (rank + 1) * (o + i) > ratio * o * i * (1 - 1e-12)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_ratio_outside_its_range_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        rank_for(ratio, 8, 8)

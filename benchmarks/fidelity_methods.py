"""The methods of the fidelity benchmark: each makes, at a ratio, an adapter for the original.

- `zero`: the original alone; `direct`: LoRA on the original, what all others try to come near
- `svd`: plain SVD of the weights, no calibration, no correction
- `paper`: EMLoC (arXiv 2506.12015): calibrated, the same ratio everywhere, correction with λ = 3
- `raw`: the same training without the correction
- `weighted`: the same training with the activation-weighted correction, λ = 1
- `alloc`, `relative`: ranks by sensitivity, or by relative loss; no correction
- `heal`: healed before the training, no correction
- `heal+alloc`: healed, with the better of the two allocations; no correction
- `ours`: the same, the correction chosen by held-out loss
- `offsite`, `loram`: see `benchmarks.peers`

All calls to what the method adds to the paper are in this module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks import peers
from benchmarks.fidelity_work import BATCH_SIZE, Work, kept_share, ratios_of
from emloc.allocate import allocate
from emloc.factor_files import FactorFiles
from emloc.files import writing
from emloc.heal import heal
from emloc.models import open_model
from emloc.sensitivity import sensitivities
from emloc.settings import HealSettings
from emloc.teach import Targets, teach

LIMIT = 3.0  # λ of the paper
WEIGHTED_LIMIT = 1.0
LIMITS = (1.0, 3.0)  # that `ours` tries
OURS_BY_SENSITIVITY = True  # the allocation of `ours`
SENSITIVITY_ROWS = 64
TAUGHT_ROWS = 1024
TOP_K = 64
REFERENCES = ("zero", "direct")
PEERS = ("offsite", "loram")


@dataclass(frozen=True)
class Made:
    """What a method made.

    Attributes:
        adapter: for the original; None for none.
        kept: share of the parameters of the blocks' linear layers in what was trained on.
    """

    adapter: Path | None
    kept: float


def zero(work: Work, ratio: float | None, seed: int) -> Made:
    """Nothing."""
    return Made(None, 1.0)


def direct(work: Work, ratio: float | None, seed: int) -> Made:
    """LoRA on the original."""
    return Made(work.fit("original", seed, work.load), 1.0)


def emulated(work: Work, factors: Path, emulator: Path, seed: int, **correction: Any) -> Made:
    """LoRA on an emulator, corrected if options of the correction are given."""
    adapter = work.fit(emulator.name, seed, lambda: work.load(emulator))
    if correction:
        adapter = work.corrected(adapter, emulator, **correction)
    return Made(adapter, kept_share(emulator, factors))


def uniform(
    work: Work, ratio: float, seed: int, *, calibrated: bool = True, **correction: Any
) -> Made:
    """The same ratio everywhere."""
    factors = work.factors(calibrated=calibrated)
    return emulated(work, factors, work.emulator(factors, ratio), seed, **correction)


def allocated(work: Work, ratio: float, seed: int, *, by_sensitivity: bool) -> Made:
    """Ranks of their own for the layers."""
    factors = work.factors(calibrated=True)
    ranks = ranks_for(work, factors, ratio, by_sensitivity=by_sensitivity)
    return emulated(work, factors, work.emulator(factors, ratio, ranks), seed)


def ranks_for(work: Work, factors: Path, ratio: float, *, by_sensitivity: bool) -> dict[str, int]:
    """Layer name → rank, of the uniform emulator's size."""
    files = FactorFiles(factors)
    ratios = ratios_of(files, ratio)
    if not by_sensitivity:
        return allocate(files, ratios)
    model = work.load(work.emulator(factors, ratio))
    rows = work.calibration[:SENSITIVITY_ROWS]
    weights = sensitivities(
        model, rows, codec=work.codec, names=list(ratios), batch_size=BATCH_SIZE
    )
    return allocate(files, ratios, weights)


def healed(work: Work, emulator: Path) -> Path:
    """A healed copy of an emulator."""
    rows = work.splits["train"][:TAUGHT_ROWS]
    settings = HealSettings()

    def learn(out: Path) -> None:
        opened = open_model(work.original, dtype=torch.float32)
        options = {"codec": work.codec, "top_k": TOP_K, "batch_size": BATCH_SIZE}
        teach(opened, rows, **options, wave=len(rows), out=out, device=work.device)

    targets = work.cached("targets", {"rows": len(rows), "top_k": TOP_K}, learn)

    def build(out: Path) -> None:
        heal(
            emulator,
            rows,
            Targets(targets),
            codec=work.codec,
            settings=settings,
            out=out,
            checkpoints=work.cache / "checkpoints" / out.name,
            device=work.device,
        )

    options = {"emulator": emulator.name, "targets": targets.name, "heal": asdict(settings)}
    return work.cached("healed", options, build)


def heal_only(work: Work, ratio: float, seed: int) -> Made:
    """Healed, not corrected."""
    factors = work.factors(calibrated=True)
    return emulated(work, factors, healed(work, work.emulator(factors, ratio)), seed)


def heal_alloc(work: Work, ratio: float, seed: int) -> Made:
    """Ranks of their own, and healed; not corrected."""
    factors = work.factors(calibrated=True)
    return emulated(work, factors, _best_emulator(work, factors, ratio), seed)


def ours(work: Work, ratio: float, seed: int) -> Made:
    """All of it."""
    factors = work.factors(calibrated=True)
    emulator = _best_emulator(work, factors, ratio)
    raw = work.fit(emulator.name, seed, lambda: work.load(emulator))
    candidates = [raw] + [
        work.corrected(raw, emulator, limit=limit, weighted=weighted)
        for weighted in (False, True)
        for limit in LIMITS
    ]
    losses = [work.held_out_loss(adapter) for adapter in candidates]
    best = min(zip(losses, range(len(losses)), strict=True))[1]  # of equals the first
    return Made(candidates[best], kept_share(emulator, factors))


def _best_emulator(work: Work, factors: Path, ratio: float) -> Path:
    """Healed, with the better allocation."""
    ranks = ranks_for(work, factors, ratio, by_sensitivity=OURS_BY_SENSITIVITY)
    return healed(work, work.emulator(factors, ratio, ranks))


def offsite(work: Work, ratio: float, seed: int) -> Made:
    """Dropped blocks."""
    original = work.load()
    count = len(peers.blocks_of(original)[1])
    kept = peers.kept_blocks(count, ratio)
    adapter = work.fit(
        f"blocks {kept}",
        seed,
        lambda: peers.drop_blocks(original, ratio)[0],
        lambda trained, out: peers.restore_blocks(trained, original, kept, out),
    )
    return Made(adapter, len(kept) / count)


def loram(work: Work, ratio: float, seed: int) -> Made:
    """Pruned heads and channels."""
    original = work.load()
    rows = work.calibration

    def build(out: Path) -> None:
        found = peers.importance(original, work.codec, rows, batch_size=BATCH_SIZE)
        with writing(out) as file:
            save_file(found, file)

    importances = work.cached("importance", {"rows": len(rows)}, build)
    plan = peers.plan_pruning(original, load_file(importances), ratio)
    pruned = peers.prune(original, plan)
    kept = peers.block_parameters(pruned) / peers.block_parameters(original)
    adapter = work.fit(
        f"pruned by {importances.name} to {plan.groups}, {plan.heads}, {len(plan.channels[0])}",
        seed,
        lambda: pruned,
        lambda trained, out: peers.recover(trained, original, plan, out),
    )
    return Made(adapter, kept)


METHODS: Mapping[str, Callable[[Work, Any, int], Made]] = {
    "zero": zero,
    "direct": direct,
    "svd": partial(uniform, calibrated=False),
    "paper": partial(uniform, limit=LIMIT),
    "raw": uniform,
    "weighted": partial(uniform, weighted=True, limit=WEIGHTED_LIMIT),
    "alloc": partial(allocated, by_sensitivity=True),
    "relative": partial(allocated, by_sensitivity=False),
    "heal": heal_only,
    "heal+alloc": heal_alloc,
    "ours": ours,
    "offsite": offsite,
    "loram": loram,
}

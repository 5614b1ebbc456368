"""Emulators: cut from an original and its factors at any ratio, saved as native checkpoints.

- `plan_ranks`: what a cut will keep of each layer, and the loss that predicts
- `cut`: write the checkpoint, shard by shard, never more than one shard in memory
- `table`: the plan as text

An emulator folder is a transformers checkpoint: config.json with a `quantization_config` of method
"emloc", safetensors shards, and the original's tokenizer. Of a diffusion pipeline, it is a
checkpoint of the denoiser alone, as diffusers writes it. `import emloc` makes both loadable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from emloc.checkpoint import (
    DENOISER_WEIGHTS,
    WEIGHTS,
    copy_companions,
    is_denoiser,
)
from emloc.diffusion.pipelines import denoiser_folder, is_pipeline
from emloc.factor_files import FactorFiles
from emloc.factors import loss_kept, rank_for
from emloc.files import read_json, write_json, writing
from emloc.lowrank import EmlocConfig
from emloc.shards import Piece, write_shards
from emloc.weights import LastFile, OpenedModel


@dataclass(frozen=True)
class LayerPlan:
    """What a cut keeps of one layer.

    Attributes:
        rank: k.
        parameters, kept: of the original's weight, and of the two factors.
        loss: predicted Σ‖Wx − W_E x‖² / Σ‖Wx‖² over the calibration tokens.
    """

    name: str
    out_features: int
    in_features: int
    ratio: float
    rank: int
    parameters: int
    kept: int
    loss: float


def plan_ranks(
    factors: FactorFiles, ratios: Mapping[str, float], *, ranks: Mapping[str, int] | None = None
) -> list[LayerPlan]:
    """Rank, size and predicted loss of each layer to cut.

    Args:
        factors: what calibrate wrote.
        ratios: layer name → ratio, from `targets.ratios_for`.
        ranks: layer name → rank in place of the ratio's, from `allocate.allocate`.

    Raises:
        ValueError: a ratio is not in (0, 1) or above the calibration's largest one.
    """
    plan = []
    for name, ratio in ratios.items():
        shape = factors.modules[name]
        o, i = shape["out_features"], shape["in_features"]
        rank = rank_for(ratio, o, i)
        if ratio > factors.max_ratio:
            raise ValueError(
                f"{name} is to be cut at ratio {ratio}, but was calibrated up to "
                f"{factors.max_ratio}: raise calibrate.max_ratio or lower the ratio."
            )
        rank = (ranks or {}).get(name, rank)
        loss = loss_kept(factors.eigenvalues(name), rank)
        plan.append(LayerPlan(name, o, i, ratio, rank, o * i, rank * (o + i), loss))
    return plan


def cut(
    original: Path | str,
    opened: OpenedModel,
    factors: FactorFiles,
    plan: Sequence[LayerPlan],
    *,
    out: Path | str,
    base_name: str,
    max_shard_size: int | str = "2GB",
    progress: bool = False,
) -> dict[str, Any]:
    """Write an emulator checkpoint.

    What is not in the plan is copied as it is stored. Keys are those of the original's files, so
    that transformers maps both to the model in the same way.

    Args:
        original: folder of the original, a model or a diffusion pipeline.
        opened: the same, opened.
        factors: its factors.
        plan: from `plan_ranks`.
        out: folder to create.
        base_name: what the emulator and its adapters call the original.
        max_shard_size: bytes or a text such as "2GB"; about as much memory is needed.
        progress: show a progress bar over the tensors.

    Returns:
        `emulator_bytes`, `original_bytes`, `emulator_parameters`, `original_parameters` and
        `layers`, the plan as dictionaries.

    Raises:
        ValueError: the original's config.json says that it is quantised already, or the disk has
            no room for the emulator.
    """
    original = denoiser_folder(original) if is_pipeline(original) else Path(original)
    of_diffusers = is_denoiser(original)
    config = read_json(original / "config.json")
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ValueError(
            f"the original is quantised already (method {method!r}), and an emulator is cut from "
            "full weights: name the unquantised checkpoint as model.source."
        )
    whole = stored_pieces(opened)
    pieces = dict(whole)
    for layer in plan:
        key = opened.store.locations[f"{layer.name}.weight"].key
        del pieces[key]
        pieces |= _factor_pieces(key, factors, layer)
    ranks = {layer.name: layer.rank for layer in plan}
    quantization = EmlocConfig(ranks=ranks, base_model=base_name).to_dict()
    size = sum(piece.like.nbytes for piece in pieces.values())
    with writing(out, size=size) as folder:
        folder.mkdir()
        write_shards(
            folder,
            pieces,
            max_shard_size=max_shard_size,
            progress="compress" if progress else None,
            weights=DENOISER_WEIGHTS if of_diffusers else WEIGHTS,
        )
        if not of_diffusers:
            copy_companions(original, folder)
        write_json(folder / "config.json", {**config, "quantization_config": quantization})
    return {
        "emulator_bytes": size,
        "original_bytes": sum(piece.like.nbytes for piece in whole.values()),
        "emulator_parameters": sum(piece.like.numel() for piece in pieces.values()),
        "original_parameters": sum(piece.like.numel() for piece in whole.values()),
        "layers": [asdict(layer) for layer in plan],
    }


def stored_pieces(opened: OpenedModel) -> dict[str, Piece]:
    """All tensors of the original's files by key; files are mapped, not read."""
    pieces: dict[str, Piece] = {}
    files = LastFile()
    for file in sorted({location.file for location in opened.store.locations.values()}):
        for key in files.open(file).keys():
            pieces[key] = Piece(files.read(file, key).to("meta"), partial(files.read, file, key))
    return pieces


def _factor_pieces(key: str, factors: FactorFiles, layer: LayerPlan) -> dict[str, Piece]:
    """The two tensors that stand in for the weight stored at `key`."""
    meta = partial(torch.empty, dtype=factors.dtype, device="meta")
    return {
        key: Piece(
            meta(layer.out_features, layer.rank),
            partial(factors.weight, layer.name, layer.rank),
        ),
        f"{key}_in": Piece(
            meta(layer.rank, layer.in_features),
            partial(factors.weight_in, layer.name, layer.rank),
        ),
    }


def table(plan: Sequence[LayerPlan]) -> str:
    """The plan as a text table, one line a layer."""
    width = max((len(layer.name) for layer in plan), default=5)
    lines = [f"{'layer':<{width}}  {'out×in':>12}  {'rank':>6}  {'kept':>6}  {'loss':>9}"]
    for layer in plan:
        shape = f"{layer.out_features}×{layer.in_features}"
        lines.append(
            f"{layer.name:<{width}}  {shape:>12}  {layer.rank:>6}  "
            f"{layer.kept / layer.parameters:>6.1%}  {layer.loss:>9.2e}"
        )
    return "\n".join(lines)

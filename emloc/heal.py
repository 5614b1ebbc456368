"""Heal an emulator before the task: bring its answers nearer to the original's, at the same size.

The last directions of every low-rank layer become a LoRA, which is trained until the emulator's
next tokens are distributed like the original's (knowledge distillation, arXiv 1503.02531), and
goes back into the factors. So the emulator keeps its ranks and stays a plain emulator, and training
needs no more memory than that of an adapter.

- `heal`: train and write the healed emulator
- `split_off`, `fold`: the layers' last directions to a LoRA, and back

Letters: o out features, i in features, k rank, s directions that are trained.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from emloc.checkpoint import DENOISER_WEIGHTS, WEIGHTS, copy_companions, is_denoiser
from emloc.devices import pick_dtype
from emloc.distill import HealTrainer, collate, mean_divergence, with_targets
from emloc.emulator import stored_pieces
from emloc.families import Codec
from emloc.files import writing
from emloc.fused import fused_lora
from emloc.lora import add_lora
from emloc.lowrank import LowRankLinear
from emloc.models import load_model, open_model
from emloc.optimize import history, training_arguments
from emloc.resume import agreed_checkpoint, remove_checkpoints
from emloc.settings import HealSettings, LoraSettings
from emloc.shards import Piece, write_shards
from emloc.teach import Targets
from emloc.trainer import StepWatch

T = TypeVar("T")
_HELD_OUT = 8  # one row in so many measures what healing does and is not trained on


def heal(
    emulator: Path | str,
    examples: Sequence[Mapping[str, Any]],
    targets: Targets,
    *,
    codec: Codec,
    settings: HealSettings,
    out: Path | str,
    checkpoints: Path | str,
    device: torch.device | str = "cpu",
    max_shard_size: int | str = "2GB",
    progress: bool = False,
) -> dict[str, Any]:
    """Write a healed emulator; the one that was cut is not changed.

    Args:
        emulator: folder of an emulator.
        examples: those that `targets` were taken of, in their order. One row in eight is held out.
        targets: of the original.
        codec: the one that encoded the examples.
        settings: how to train; at least one step.
        out: folder to create.
        checkpoints: folder for resuming, which must belong to just these inputs.
        device: where to train.
        max_shard_size: bytes or a text such as "2GB".
        progress: show a bar with the loss.

    Returns:
        `history` (see `emloc.finetune`), `trained_parameters`, and `divergence_before` and
        `divergence_after`, in nats a token of the rows held out.

    Raises:
        ValueError: examples and targets do not belong together, or the loss became NaN or
            infinite. `out` is not written then.
    """
    emulator = Path(emulator)
    model = load_model(emulator, dtype=pick_dtype(settings.precision), device=device)
    model.requires_grad_(False)  # so that the logits can be computed chunk by chunk from the start
    rows = with_targets(model.config, examples, targets)
    taught, held = hold_out(rows)
    collated = partial(collate, codec, targets)
    measure = partial(mean_divergence, rows=held, collate=collated, size=settings.batch_size)
    before = measure(model)
    adapted = split_off(model, settings)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    curve = _train(adapted, taught, collated, settings, Path(checkpoints), progress)
    after = measure(adapted)
    write_healed(emulator, adapted, out, max_shard_size=max_shard_size)
    remove_checkpoints(Path(checkpoints))
    return {
        "history": curve,
        "trained_parameters": trained,
        "divergence_before": before,
        "divergence_after": after,
    }


def hold_out(rows: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    """The rows to train on, and one in eight held out of them; of fewer, all are measured."""
    taught = [row for place, row in enumerate(rows) if place % _HELD_OUT]
    return taught or rows, rows[::_HELD_OUT] if len(rows) >= _HELD_OUT else rows


def split_off(
    model: Any, settings: HealSettings, *, attach: Callable[[Any, LoraSettings], Any] | None = None
) -> Any:
    """Turn the last directions of each low-rank layer into a LoRA with scaling 1.

    Args:
        model: an emulator, changed in place; its outputs stay the same to rounding.
        settings: how many directions.
        attach: puts a LoRA of a shape on the model; None for `add_lora`.

    Returns:
        What `attach` returns: peft's model.
    """
    layers = {n: m for n, m in model.named_modules() if type(m) is LowRankLinear and m.rank > 1}
    tails = {}
    for name, layer in layers.items():
        kept = layer.rank - min(settings.rank, layer.rank // 2)
        tails[name] = layer.weight_in.data[kept:].clone(), layer.weight.data[:, kept:].clone()
        layer.weight_in.data = layer.weight_in.data[:kept]  # views: nothing is there twice
        layer.weight.data = layer.weight.data[:, :kept]
        layer.rank = kept
    others = {n: len(a) for n, (a, _) in tails.items() if len(a) != settings.rank}
    pattern = {re.escape(name): rank for name, rank in others.items()}
    lora = LoraSettings(
        r=settings.rank,
        alpha=settings.rank,
        target_modules=list(tails),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
    )
    adapted = (attach or partial(_attach, seed=settings.seed))(model, lora)
    for name, layer in _loras(adapted).items():
        a, b = tails[name]
        layer.lora_A["default"].weight.data.copy_(a)
        layer.lora_B["default"].weight.data.copy_(b)
    return adapted


def _attach(model: Any, lora: LoraSettings, *, seed: int) -> Any:
    return add_lora(model, lora, base_name=model.config.name_or_path, seed=seed)


def fold(layer: LoraLayer, factor: str) -> Tensor:
    """A low-rank layer's `weight` (o×k) or `weight_in` (k×i), in float32, with its LoRA as the last
    directions.

    Args:
        layer: of peft, on a `LowRankLinear`.
        factor: "weight" or "weight_in".
    """
    base = cast(LowRankLinear, layer.base_layer)
    a, b = (
        cast(nn.Linear, part["default"]).weight.detach().float()
        for part in (layer.lora_A, layer.lora_B)
    )
    if factor == "weight_in":
        return torch.cat([base.weight_in.float(), a])
    return torch.cat([base.weight.float(), layer.scaling["default"] * b], dim=1)


def write_healed(
    emulator: Path | str,
    adapted: nn.Module,
    out: Path | str,
    *,
    max_shard_size: int | str = "2GB",
) -> None:
    """Copy an emulator with the LoRA of `split_off` in its factors, which keep ranks and dtype.

    Args:
        emulator: folder of the one that was cut.
        adapted: what `split_off` made of it. Each layer loses its factors once they are folded, so
            that the model is never there twice; it is of no use afterwards.
        out: folder to create.
        max_shard_size: bytes or a text such as "2GB".

    Raises:
        ValueError: the disk has no room for it.
    """
    emulator = Path(emulator)
    opened = open_model(emulator, dtype=torch.float32)
    pieces = stored_pieces(opened)
    for name, layer in _loras(adapted).items():
        for factor in ("weight", "weight_in"):
            key = opened.store.locations[f"{name}.{factor}"].key
            like = pieces[key].like
            pieces[key] = Piece(like, partial(_folded, layer, factor, like.dtype))
    size = sum(piece.like.nbytes for piece in pieces.values())
    weights = DENOISER_WEIGHTS if is_denoiser(emulator) else WEIGHTS
    with writing(out, size=size) as folder:
        folder.mkdir()
        write_shards(folder, pieces, max_shard_size=max_shard_size, weights=weights)
        if not is_denoiser(emulator):
            copy_companions(emulator, folder)
        shutil.copyfile(emulator / "config.json", folder / "config.json")


def _folded(layer: LoraLayer, factor: str, dtype: torch.dtype) -> Tensor:
    """A layer's folded factor, in place of its own one, which is given up."""
    folded = fold(layer, factor).to("cpu", dtype)
    own = getattr(layer.base_layer, factor)
    own.data = own.new_empty(0)
    return folded


def _loras(model: nn.Module) -> dict[str, Any]:
    """Layer name in the model without its LoRA → the layer with it."""
    base = _base(model)
    return {name: m for name, m in base.named_modules() if isinstance(m, LoraLayer)}


def _base(model: Any) -> Any:
    """The model that has the LoRA inside, without what peft puts around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _train(
    adapted: Any,
    rows: Sequence[Mapping[str, Any]],
    collator: Any,
    settings: HealSettings,
    checkpoints: Path,
    progress: bool,
) -> list[dict[str, Any]]:
    """Train the LoRA; the rows of the curve."""
    model = adapted.get_base_model()
    training = settings.training()
    watch = StepWatch(settings.save_steps, None, False, progress)
    trainer = HealTrainer(
        adapted,
        training_arguments(training, settings.steps, checkpoints, model.device),
        rows,
        [],
        collator=collator,
        by_length=False,
        watch=watch,
    )
    use_cache, model.config.use_cache = getattr(model.config, "use_cache", None), False
    try:
        with fused_lora(adapted):
            trainer.train(resume_from_checkpoint=agreed_checkpoint(checkpoints, settings.steps))
    finally:
        watch.close()
        model.config.use_cache = use_cache
    return history(trainer.state.log_history, training.log_steps, settings.steps)

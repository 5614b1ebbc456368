"""Train a LoRA on a model with transformers' Trainer, resumable to the bit on a CPU.

- `finetune`: trains, and saves the adapter in one go at the end
- a killed run goes on from its last whole checkpoint and ends like one that was not killed
- several processes that run it together share the rows of each step; see `emloc.processes`
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from emloc.families import Codec
from emloc.fused import fused_lora
from emloc.lora import add_lora, save_adapter
from emloc.optimize import history, pick_optimizer, training_arguments
from emloc.processes import is_first, shard_frozen
from emloc.resume import agreed_checkpoint, remove_checkpoints
from emloc.settings import LoraSettings, TrainSettings
from emloc.trainer import LoraTrainer, StepWatch


def finetune(
    model: PreTrainedModel,
    train: Sequence[Mapping[str, Any]],
    validation: Sequence[Mapping[str, Any]],
    *,
    codec: Codec,
    lora: LoraSettings,
    settings: TrainSettings,
    base_name: str,
    out: str | os.PathLike[str],
    checkpoints: str | os.PathLike[str],
    progress: bool = True,
    shard_on: torch.device | None = None,
) -> dict[str, Any]:
    """Train a LoRA on `model` where it is, and write the adapter to the folder `out`.

    Args:
        model: an emulator or any other language or vision-language model; it keeps the LoRA
            afterwards.
        train: examples as the codec gives them; a label of -100 is not learnt.
        validation: examples for the validation loss (a mean over labels); may be empty.
        codec: makes batches of the examples.
        lora: the adapter's shape.
        settings: how to train.
        base_name: what the adapter shall name as its base: the original.
        out: the adapter's folder; it appears when all is done.
        checkpoints: folder for resuming, which must belong to just these inputs; its checkpoints
            go at the end.
        progress: show a bar with the loss.
        shard_on: with several processes, the device to put this one's pieces of the frozen weights
            on (the model is on the CPU then); None keeps the model whole where it is.

    Returns:
        `history` (rows with step, loss, learning_rate, grad_norm and, where validated, eval_loss),
        `trainable_parameters`, `steps` and `tokens` (trained on, padding left out).

    Raises:
        ValueError: a setting does not fit the model, a row has no label, the loss became NaN or
            infinite, or a checkpoint belongs to another run. `out` is not written then.
    """
    _check_rows("training", train, needed=True)
    _check_rows("validation", validation, needed=settings.eval_steps is not None)
    device, use_cache = shard_on or model.device, getattr(model.config, "use_cache", None)
    total = settings.total_steps(len(train))
    folder = Path(checkpoints)
    arguments = training_arguments(settings, total, folder, device)
    adapted = add_lora(model, lora, base_name=base_name, seed=settings.seed)
    if shard_on is not None:
        shard_frozen(model, shard_on)
    shown = progress and is_first()
    watch = StepWatch(settings.save_steps, settings.eval_steps, bool(validation), shown)
    trainer = LoraTrainer(
        adapted,
        arguments,
        train,
        validation,
        collator=partial(codec.collate, side="right"),
        by_length=settings.group_by_length,
        watch=watch,
        optimizer=pick_optimizer(settings),
    )
    try:
        with fused_lora(adapted) if settings.fused else contextlib.nullcontext():
            trainer.train(resume_from_checkpoint=agreed_checkpoint(folder, total))
    finally:
        watch.close()
        if use_cache is not None:
            model.config.use_cache = use_cache
    if is_first():
        save_adapter(adapted, out)
        remove_checkpoints(folder)
    return {
        "history": history(trainer.state.log_history, settings.log_steps, total),
        "trainable_parameters": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        "steps": total,
        "tokens": int(trainer.state.num_input_tokens_seen),
    }


def _check_rows(name: str, rows: Sequence[Mapping[str, Any]], *, needed: bool) -> None:
    if needed and not rows:
        raise ValueError(f"there are no {name} rows, but at least one is needed: add some.")
    for number, row in enumerate(rows):
        if all(label == -100 for label in row["labels"][1:]):
            raise ValueError(
                f"{name} row {number} (counted from 0) has no label to learn from: leave it out or "
                "give it an answer."
            )

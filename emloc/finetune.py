"""Train a LoRA on a model with transformers' Trainer, resumable to the bit on a CPU.

- `finetune`: trains, and saves the adapter in one go at the end
- a killed run goes on from its last whole checkpoint and ends like one that was not killed
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from emloc.families import Codec
from emloc.lora import add_lora, save_adapter
from emloc.settings import LoraSettings, TrainSettings
from emloc.trainer import LoraTrainer, StepWatch, last_checkpoint, remove_checkpoints


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

    Returns:
        `history` (rows with step, loss, learning_rate, grad_norm and, where validated, eval_loss),
        `trainable_parameters`, `steps` and `tokens` (trained on, padding left out).

    Raises:
        ValueError: a setting does not fit the model, a row has no label, the loss became NaN or
            infinite, or a checkpoint belongs to another run. `out` is not written then.
    """
    _check_rows("training", train, needed=True)
    _check_rows("validation", validation, needed=settings.eval_steps is not None)
    device, use_cache = model.device, getattr(model.config, "use_cache", None)
    total = settings.total_steps(len(train))
    folder = Path(checkpoints)
    arguments = _arguments(settings, total, folder, device)
    adapted = add_lora(model, lora, base_name=base_name, seed=settings.seed)
    watch = StepWatch(settings.save_steps, settings.eval_steps, bool(validation), progress)
    trainer = LoraTrainer(
        adapted,
        arguments,
        train,
        validation,
        collator=partial(codec.collate, side="right"),
        by_length=settings.group_by_length,
        watch=watch,
    )
    try:
        trainer.train(resume_from_checkpoint=last_checkpoint(folder, total))
    finally:
        watch.close()
        if use_cache is not None:
            model.config.use_cache = use_cache
    save_adapter(adapted, out)
    remove_checkpoints(folder)
    return {
        "history": _history(trainer.state.log_history, settings.log_steps, total),
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


def _arguments(
    settings: TrainSettings, total: int, folder: Path, device: torch.device
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=total,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=math.ceil(settings.warmup * total),
        weight_decay=settings.weight_decay,
        optim=settings.optimizer,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.precision == "bfloat16",
        activation_checkpointing=settings.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        seed=settings.seed,
        use_cpu=device.type == "cpu",
        logging_steps=1,  # the history is put together from single steps, so it can be resumed
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        save_strategy="no",  # `StepWatch` decides when to save and validate
        remove_unused_columns=False,
        dataloader_pin_memory=device.type != "cpu",
        dataloader_num_workers=settings.workers,
        disable_tqdm=True,
        report_to="none",
    )
    mine = arguments.device
    if (mine.type, mine.index or 0) != (device.type, device.index or 0):
        raise ValueError(
            f"the model is on {device}, but training would run on {mine}: move the model there, or "
            "make its device the only visible one."
        )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # never spread a batch over several GPUs
    return arguments


def _history(log: list[dict[str, Any]], every: int, total: int) -> list[dict[str, Any]]:
    """Rows of every `every` steps: the loss is their mean, the other numbers the last step's."""
    rows: dict[int, dict[str, Any]] = {}
    losses: list[float] = []
    for entry in log:
        step = entry["step"]
        if "eval_loss" in entry:
            rows.setdefault(step, {"step": step})["eval_loss"] = entry["eval_loss"]
        elif "loss" in entry:
            losses.append(entry["loss"])
            if step % every == 0 or step == total:
                row = {name: entry[name] for name in ("learning_rate", "grad_norm")}
                rows[step] = {"step": step, "loss": sum(losses) / len(losses), **row}
                losses = []
    return [rows[step] for step in sorted(rows)]

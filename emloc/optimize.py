"""What a training of any kind of model asks of transformers' Trainer.

- `training_arguments`: the Trainer's own, from `TrainSettings`
- `pick_optimizer`: Prodigy, which the Trainer does not know; plain words for a missing package
- `state_bytes`: what an optimizer keeps of each trained number
- `history`: the rows of a training's curve
"""

from __future__ import annotations

import math
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from emloc.processes import count, share
from emloc.settings import TrainSettings

PRODIGY = "prodigy"
_BITSANDBYTES = re.compile(r".*(bnb|8bit|32bit).*|paged_.*|ademamix")


def pick_optimizer(settings: TrainSettings) -> tuple[type[Any], dict[str, Any]] | None:
    """The optimizer's class and arguments, or None for one that the Trainer makes itself.

    Prodigy is set up as in diffusers' DreamBooth scripts.

    Raises:
        ValueError: the package of the optimizer is not installed.
    """
    if settings.optimizer == PRODIGY:
        need_package("prodigyopt", "optimizer", settings.optimizer)
        options: dict[str, Any] = dict(betas=(0.9, 0.999), beta3=None, eps=1e-8, decouple=True)
        options |= dict(use_bias_correction=True, safeguard_warmup=True, lr=settings.learning_rate)
        from prodigyopt import Prodigy

        return Prodigy, options
    if _BITSANDBYTES.fullmatch(settings.optimizer):
        need_package("bitsandbytes", "optimizer", settings.optimizer)
    return None


def state_bytes(optimizer: str) -> int:
    """Bytes of state that an optimizer keeps for each trained number, which is in float32; those of
    two moments for an optimizer that is not known here."""
    if optimizer in ("sgd", "adafactor"):  # the second keeps rows and columns
        return 0
    if optimizer == PRODIGY:
        return 16  # two moments, the start and the sum that finds the step size
    return 2 if "8bit" in optimizer else 8


def need_package(
    package: str, setting: str, value: str, otherwise: str = "choose another optimizer"
) -> None:
    """Make sure that the optional package which a setting's value needs is installed.

    Raises:
        ValueError: it is not; `otherwise` is what else to do.
    """
    if find_spec(package) is None:
        raise ValueError(
            f"{setting} is {value!r}, which needs the package {package}, but that is not "
            f"installed: install it (pip install {package}) or {otherwise}."
        )


def training_arguments(
    settings: TrainSettings,
    total: int,
    folder: Path,
    device: torch.device,
    *,
    checkpointing: bool | None = None,
    counts_tokens: bool = True,
) -> TrainingArguments:
    """The Trainer's arguments.

    Args:
        settings: how to train.
        total: optimizer steps.
        folder: of the checkpoints.
        device: where the model is.
        checkpointing: whether the Trainer shall switch gradient checkpointing on; None as the
            settings say.
        counts_tokens: whether batches have tokens to count.

    Raises:
        ValueError: training would run on another device than the model's.
    """
    recompute = settings.gradient_checkpointing if checkpointing is None else checkpointing
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
        optim="sgd" if settings.optimizer == PRODIGY else settings.optimizer,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.precision == "bfloat16",
        activation_checkpointing=recompute,
        activation_checkpointing_kwargs={"use_reentrant": False},
        seed=settings.seed,
        use_cpu=device.type == "cpu",
        logging_steps=1,  # the history is put together from single steps, so it can be resumed
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding" if counts_tokens else "no",
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
    rows, passes = share(settings.batch_size, settings.accumulation, count())
    arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps = rows, passes
    return arguments


def history(log: list[dict[str, Any]], every: int, total: int) -> list[dict[str, Any]]:
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

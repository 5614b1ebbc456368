"""transformers' Trainer, made to resume to the bit on a CPU and to waste no work.

- the order of the rows comes from the seed and the epoch alone
- only the positions with a label reach the output head, chunk by chunk where they are many
- a checkpoint holds the LoRA and what trains it; see `emloc.resume`
- a loss or gradient that is not finite stops the run
"""

from __future__ import annotations

import contextlib
import inspect
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from tqdm import tqdm
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import get_length_grouped_indices

from emloc.files import write_json
from emloc.loss import LossInChunks
from emloc.processes import Filled, SharedTrainer, count, number
from emloc.resume import COMPLETE, checkpoints_in, must_fit

_WEIGHTS = "adapter.safetensors"
_KEPT = 2  # checkpoints kept, so that one is left should the last be damaged


class EpochOrder(Sampler[int]):
    """Row order of one epoch, from the seed and the epoch alone, so that it can be resumed."""

    def __init__(self, lengths: list[int], group: int, by_length: bool, seed: int) -> None:
        self.lengths, self.group, self.by_length, self.seed = lengths, group, by_length, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.by_length:
            return iter(get_length_grouped_indices(self.lengths, self.group, generator=generator))
        return iter(torch.randperm(len(self.lengths), generator=generator).tolist())


class AdapterTrainer(SharedTrainer):
    """transformers' Trainer that saves and resumes nothing but the LoRA and what trains it.

    A subclass says what the loss and the validation are, and in which order rows come.

    Args:
        model: model with a fresh LoRA: of peft, or any other with one of peft's inside.
        args: the Trainer's own; `output_dir` is the folder of the checkpoints.
        train: what the collator makes batches of, in memory.
        collator: some of `train` → batch.
        watch: decides when to validate and to save.
        optimizer: see `emloc.optimize.pick_optimizer`; None is the one in `args`.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        train: Sequence[Any],
        *,
        collator: Callable[[Sequence[Any]], dict[str, Any]],
        watch: StepWatch,
        optimizer: tuple[type[Any], dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(
            model,
            args,
            data_collator=cast(Any, collator),
            train_dataset=cast(Any, train),
            callbacks=[watch],
            optimizer_cls_and_kwargs=optimizer,
        )
        self.remove_callback(PrinterCallback)
        self.adapted, self.collator = model, collator
        self.checkpoints = Path(str(args.output_dir))

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Not counted: it would walk over all parameters at each step."""
        return 0

    def log_validation(self, loss: float) -> dict[str, float]:
        """Log a validation's loss, as the Trainer would."""
        metrics = {"eval_loss": loss}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        target = Path(output_dir or self.checkpoints)
        target.mkdir(parents=True, exist_ok=True)
        save_file(_adapter_weights(self.adapted), target / _WEIGHTS)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process writes the state of its random numbers
        if not self.args.should_save:
            return
        folder = self.checkpoints / f"checkpoint-{self.state.global_step}"
        write_json(folder / COMPLETE, {p.name: p.stat().st_size for p in folder.iterdir()})
        for _, old in sorted(checkpoints_in(self.checkpoints))[:-_KEPT]:
            shutil.rmtree(old)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with must_fit(self.checkpoints):
            saved = load_file(Path(resume_from_checkpoint) / _WEIGHTS)
            mine = _adapter_weights(self.adapted)
            if {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in mine.items()}:
                raise ValueError("the adapter has other weights")
            set_peft_model_state_dict(cast(PeftModel, self.adapted), saved)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with must_fit(self.checkpoints):
            super()._load_optimizer_and_scheduler(checkpoint)


class LoraTrainer(AdapterTrainer):
    """Trains a language or vision-language model, with an order of rows of our own.

    Args:
        model: model with a fresh LoRA.
        args: the Trainer's own; `output_dir` is the folder of the checkpoints.
        train: examples, in memory.
        validation: examples; may be empty.
        collator: examples → batch with input_ids, attention_mask and labels, each (B, T).
        by_length: group rows of like length.
        watch, optimizer: see `AdapterTrainer`.
    """

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments,
        train: Sequence[Mapping[str, Any]],
        validation: Sequence[Mapping[str, Any]],
        *,
        collator: Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]],
        by_length: bool,
        watch: StepWatch,
        optimizer: tuple[type[Any], dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(
            cast(nn.Module, model),
            args,
            train if count() == 1 else Filled(train),
            collator=collator,
            watch=watch,
            optimizer=optimizer,
        )
        if count() > 1 and not self.model_accepts_loss_kwargs:
            raise ValueError(
                f"{type(model.get_base_model()).__name__} computes its loss batch by batch, so "
                f"{count()} processes would not learn the same as one: train with one process."
            )
        self.by_length = by_length
        self.lengths = [len(row["input_ids"]) for row in train]
        self.validation = sorted(validation, key=lambda row: -len(row["input_ids"]))
        base = model.get_base_model()
        kept = "logits_to_keep" in inspect.signature(base.forward).parameters
        self.skips_logits = kept and self._loss_shifts_labels and self.model_accepts_loss_kwargs
        self.chunks = LossInChunks(base)
        _ = count() == 1 or self.chunks.possible  # takes forward passes, of all processes at a time

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        group = self.args.train_batch_size * self.args.gradient_accumulation_steps * count()
        return EpochOrder(self.lengths, group, self.by_length, self.args.seed)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's own loss, with logits at the positions that have a label and no others."""
        parts: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self.skips_logits:
            labels = nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)  # (B, T)
            mask = labels != -100
            chosen = labels[mask]
            inputs = {**inputs, "logits_to_keep": mask, "shift_labels": chosen}
            if self.chunks.wanted(len(chosen)):
                parts = self.chunks.applied()
        with parts:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss over all labels of the validation rows, whatever the batches."""
        model, size = self.model_wrapped, self.args.eval_batch_size
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64)  # of losses, of labels
        starts = range(0, len(self.validation), size)
        for first in range(0, len(starts), count()):  # all processes do as many forward passes
            mine = first + number() < len(starts)
            start = starts[first + number() if mine else 0]
            inputs = self._prepare_inputs(self.collator(self.validation[start : start + size]))
            labels = int((inputs["labels"][:, 1:] != -100).sum()) * mine
            loss = float(self.compute_loss(model, inputs))
            sums += torch.tensor([loss * labels, labels], dtype=torch.float64)
        if count() > 1:
            sums = cast(Tensor, self.accelerator.reduce(sums.to(self.args.device)))
        return self.log_validation(float(sums[0] / sums[1]))

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        if (inputs["labels"] == -100).all():  # `Filled`'s row
            inputs = {**inputs, "attention_mask": torch.zeros_like(inputs["attention_mask"])}
        super()._track_num_input_tokens(inputs)


class StepWatch(TrainerCallback):
    """Decides when to validate and to save, watches the loss, and shows the progress."""

    def __init__(
        self, save_steps: int, eval_steps: int | None, validates: bool, progress: bool
    ) -> None:
        self.save_steps, self.eval_steps, self.validates = save_steps, eval_steps, validates
        self.progress = progress
        self.bar: tqdm[Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar where a resumed run stands."""
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="train",
            unit="step",
            disable=not self.progress,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for a validation or a checkpoint."""
        step, every = state.global_step, self.eval_steps
        last = step >= state.max_steps
        control.should_evaluate = self.validates and (last or bool(every and step % every == 0))
        control.should_save = not last and step % self.save_steps == 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Stop on a number that is not finite; move the bar."""
        for name in ("loss", "grad_norm", "eval_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise ValueError(
                    f"{name} became {logs[name]} at step {state.global_step}: try a lower "
                    f"learning_rate than {args.learning_rate:g}"
                    + (", or precision float32." if args.bf16 else ".")
                )
            if name in logs and self.bar is not None and name != "grad_norm":
                self.bar.set_postfix({name: f"{logs[name]:.4f}"}, refresh=False)
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def close(self) -> None:
        """Close the bar, also after an error."""
        if self.bar is not None:
            self.bar.close()


def _adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    return cast(
        dict[str, Tensor],
        get_peft_model_state_dict(cast(PeftModel, model), save_embedding_layers=False),
    )

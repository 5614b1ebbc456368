"""Train a LoRA on a denoiser, resumable to the bit on a CPU.

- `personalize`: trains, draws pictures on the way, and saves the adapter in one go at the end
- the row, the noise and the noise level of each place in the training come from the seed alone
- prior preservation: with class pictures each batch has as many of them as of the others
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback

from emloc.diffusion.encoding import Encoded
from emloc.diffusion.lora import add_denoiser_lora, save_lora
from emloc.diffusion.scoring import mean_noise_loss
from emloc.families.diffusion import Batch, DiffusionFamily, draw_seed
from emloc.fused import fused_lora
from emloc.optimize import history, pick_optimizer, training_arguments
from emloc.processes import is_first
from emloc.resume import agreed_checkpoint, remove_checkpoints
from emloc.settings import LoraSettings, NoiseSettings, TrainSettings, is_whole, require
from emloc.trainer import AdapterTrainer, StepWatch

_VALIDATION_DRAWS = 4  # for each picture
_ORDER, _NOISE = 2, 3  # tell the seeds apart; 1 is `emloc.diffusion.scoring`'s


def personalize(
    denoiser: ModelMixin,
    family: DiffusionFamily,
    train: Encoded,
    validation: Encoded | None,
    *,
    lora: LoraSettings,
    settings: TrainSettings,
    noise: NoiseSettings,
    prior_weight: float = 1.0,
    pipeline: type[DiffusionPipeline],
    out: str | os.PathLike[str],
    checkpoints: str | os.PathLike[str],
    picture_steps: int | None = None,
    draw: Callable[[ModelMixin, int], None] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a LoRA on `denoiser` where it is, and write the adapter to the folder `out`.

    Args:
        denoiser: of an emulator or an original; it keeps the LoRA afterwards.
        family: of the pipeline.
        train: encoded pictures; with class pictures among them (`prior`) each batch has
            `batch_size` of them beside `batch_size` others.
        validation: pictures for the validation loss, `mean_noise_loss` with 4 draws a picture;
            None takes those of `train`.
        lora: the adapter's shape.
        settings: how to train; `epochs` are passes over the rows that are no class pictures.
        noise: how noise levels are drawn and weighted.
        prior_weight: of the class pictures' part of the loss.
        pipeline: class of the pipeline, which says how the adapter is written.
        out: the adapter's folder; it appears when all is done.
        checkpoints: folder for resuming, which must belong to just these inputs; its checkpoints
            go at the end.
        picture_steps: steps between two calls of `draw`; None calls it at the end only.
        draw: called with the denoiser in evaluation mode and the step; it leaves no trace in the
            training. A resumed run calls it again for the steps after its checkpoint.
        progress: show a bar with the loss.

    Returns:
        `history` (rows with step, loss, learning_rate, grad_norm and, where validated, eval_loss),
        `trainable_parameters`, `steps` and `pictures` (trained on, counted each time).

    Raises:
        ValueError: a setting does not fit, the loss became NaN or infinite, or a checkpoint
            belongs to another run. `out` is not written then.
    """
    order = _Order(train, settings)
    _check(settings, validation, prior_weight, picture_steps)
    model: Any = denoiser
    total, folder = settings.total_steps(len(order.instances)), Path(checkpoints)
    arguments = training_arguments(
        settings, total, folder, model.device, checkpointing=False, counts_tokens=False
    )
    optimizer = pick_optimizer(settings)
    add_denoiser_lora(denoiser, lora, seed=settings.seed)
    watch = StepWatch(settings.save_steps, settings.eval_steps, True, progress and is_first())
    trainer = NoiseTrainer(
        denoiser,
        arguments,
        range(total * settings.batch_size * settings.accumulation),
        collator=_Collator(family, train, order, noise, model.dtype),
        watch=watch,
        optimizer=optimizer,
        family=family,
        validation=train if validation is None else validation,
        noise=noise,
        prior_weight=prior_weight,
    )
    if draw is not None and is_first():
        trainer.add_callback(_Pictures(denoiser, draw, picture_steps))
    if settings.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    try:
        with fused_lora(model) if settings.fused else contextlib.nullcontext():
            trainer.train(resume_from_checkpoint=agreed_checkpoint(folder, total))
    finally:
        watch.close()
        if settings.gradient_checkpointing:
            model.disable_gradient_checkpointing()
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
    if is_first():
        save_lora(denoiser, pipeline, out)
        remove_checkpoints(folder)
    kinds = 2 if len(order.priors) else 1
    return {
        "history": history(trainer.state.log_history, settings.log_steps, total),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": total,
        "pictures": total * settings.batch_size * settings.accumulation * kinds,
    }


def _check(
    settings: TrainSettings,
    validation: Encoded | None,
    prior_weight: float,
    picture_steps: int | None,
) -> None:
    require(prior_weight >= 0, "prior_weight", prior_weight, "a number of at least 0")
    good = picture_steps is None or is_whole(picture_steps, 1)
    require(good, "picture_steps", picture_steps, "empty or a whole number of at least 1")
    if validation is not None and not len(validation):
        raise ValueError("there are no validation pictures: add some, or leave validation out.")
    if settings.group_by_length:
        raise ValueError("group_by_length is true, but pictures have no lengths: set it to false.")


class _Order:
    """Row and seed of each place in the training: place i is in epoch i // P of P rows."""

    def __init__(self, train: Encoded, settings: TrainSettings) -> None:
        self.seed = settings.seed
        self.instances = torch.nonzero(~train.prior).flatten().tolist()
        self.priors = torch.nonzero(train.prior).flatten().tolist()
        if not self.instances:
            raise ValueError(
                "there are no training pictures but class pictures: add pictures of the subject."
            )
        self._shuffled = lru_cache(4)(self._shuffle)

    def draws(self, places: Sequence[int]) -> tuple[list[int], list[int]]:
        """Rows and seeds of some places: first those of the subject, then the class pictures."""
        picks, seeds = [], []
        for kind, rows in enumerate((self.instances, self.priors)):
            for place in places if rows else ():
                epoch, number = divmod(place, len(rows))
                picks.append(rows[self._shuffled(kind, epoch)[number]])
                seeds.append(draw_seed(self.seed, _NOISE, kind, place))
        return picks, seeds

    def _shuffle(self, kind: int, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(draw_seed(self.seed, _ORDER, kind, epoch))
        count = len((self.instances, self.priors)[kind])
        return cast(list[int], torch.randperm(count, generator=generator).tolist())


class _Collator:
    """Places in the training → a batch, as a dict for the Trainer."""

    def __init__(
        self,
        family: DiffusionFamily,
        train: Encoded,
        order: _Order,
        noise: NoiseSettings,
        dtype: torch.dtype,
    ) -> None:
        self.family, self.train, self.order = family, train, order
        self.noise, self.dtype = noise, dtype

    def __call__(self, places: Sequence[int]) -> dict[str, Any]:
        batch = self.family.batch(self.train, *self.order.draws(places), self.noise)
        return vars(batch.as_type(self.dtype))


class NoiseTrainer(AdapterTrainer):
    """Trains a denoiser to predict noise; the order of rows is the collator's.

    Args:
        family, validation, noise, prior_weight: as in `personalize`.
        options: of `AdapterTrainer`.
    """

    def __init__(
        self,
        *args: Any,
        family: DiffusionFamily,
        validation: Encoded,
        noise: NoiseSettings,
        prior_weight: float,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.family, self.validation, self.noise = family, validation, noise
        self.prior_weight = prior_weight
        self.model_accepts_loss_kwargs = False  # the loss is a mean, so accumulation divides it

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(cast(Any, self.train_dataset))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The family's loss."""
        batch = Batch(**inputs)
        return self.family.loss(model(**batch.inputs)[0], batch, self.prior_weight)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean squared error over fixed draws of the validation pictures."""
        with self.compute_loss_context_manager():
            loss = mean_noise_loss(
                cast(Any, self.adapted),
                self.family,
                self.validation,
                draws=_VALIDATION_DRAWS,
                noise=self.noise,
                seed=0,
                batch_size=self.args.eval_batch_size,
            )
        return self.log_validation(loss)


class _Pictures(TrainerCallback):
    """Calls `draw` after every so many steps and at the end, and hides it from the training."""

    def __init__(
        self, denoiser: ModelMixin, draw: Callable[[ModelMixin, int], None], every: int | None
    ) -> None:
        self.denoiser, self.draw, self.every = denoiser, draw, every

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Draw where it is due."""
        step, model = state.global_step, cast(Any, self.denoiser)
        if step < state.max_steps and not (self.every and step % self.every == 0):
            return
        wrapped = model.forward  # accelerate's, which turns outputs into float32
        model.forward = getattr(model, "_original_forward", wrapped)
        model.eval()
        with torch.no_grad(), _random_state_kept(model.device):
            self.draw(self.denoiser, step)
        model.train()
        model.forward = wrapped


@contextlib.contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """Give all random generators back as they were."""
    python, arrays = random.getstate(), np.random.get_state()
    devices, kind = ([], "cuda") if device.type == "cpu" else ([device.index or 0], device.type)
    try:
        with torch.random.fork_rng(devices, device_type=kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)

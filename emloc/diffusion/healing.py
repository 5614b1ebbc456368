"""Heal an emulator of a diffusion pipeline: what the original predicts is its target.

As `emloc.teach` and `emloc.heal`, with pictures and noise in the place of rows of text, and the
squared error in the place of the divergence.

- `teach_denoiser`: stream noised pictures through the original and keep what it predicts
- `heal_denoiser`: train the emulator's last directions towards that

Letters: n pairs of picture and noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from emloc.devices import pick_dtype
from emloc.diffusion.calibration import noised_batches
from emloc.diffusion.encoding import Encoded
from emloc.diffusion.lora import add_denoiser_lora
from emloc.diffusion.training import NoiseTrainer
from emloc.families.diffusion import DiffusionFamily
from emloc.families.noising import Batch
from emloc.files import read_json, write_json, writing
from emloc.fused import fused_lora
from emloc.heal import hold_out, split_off, write_healed
from emloc.models import evaluating, load_model
from emloc.optimize import history, training_arguments
from emloc.resume import agreed_checkpoint, remove_checkpoints
from emloc.settings import HealSettings, LoraSettings, NoiseSettings
from emloc.streaming import Stream
from emloc.teach import open_waves, wave_file
from emloc.trainer import StepWatch
from emloc.weights import OpenedModel

_INDEX, _KEY = "predictions.json", "predictions"


def teach_denoiser(
    opened: OpenedModel,
    family: DiffusionFamily,
    encoded: Encoded,
    samples: int,
    *,
    batch_size: int,
    wave: int,
    noise: NoiseSettings,
    out: Path | str,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> None:
    """Write what the original's denoiser predicts for pairs of picture and noise.

    Pairs are those of `noised_batches`. Each wave reads the weights once.

    Args:
        opened: the original's denoiser.
        family: of the pipeline.
        encoded: pictures, which take turns.
        samples: n.
        batch_size: pairs in one forward.
        wave: pairs that stream together, at least one batch.
        noise: how noise levels are drawn.
        out: folder to create: a safetensors file a wave, and predictions.json.
        device: where to compute.
        progress: show a bar over the waves.
    """
    dtype = next(opened.model.parameters()).dtype
    batches = noised_batches(
        family, encoded, samples, batch_size=batch_size, noise=noise, dtype=dtype
    )
    stream, size = Stream(opened, device), max(1, wave // batch_size)
    starts = range(0, len(batches), size)
    with writing(out) as folder:
        folder.mkdir()
        for number, start in enumerate(tqdm(starts, desc="teach", disable=not progress)):
            found: dict[int, Tensor] = {}

            def keep(place: int, output: Any, found: dict[int, Tensor] = found) -> None:
                found[place] = output[0].cpu()

            chosen = batches[start : start + size]
            stream.run([send_to_device(batch, stream.device) for batch in chosen], on_output=keep)
            tensors = [found[place] for place in range(len(chosen))]
            save_file({_KEY: torch.cat(tensors)}, wave_file(folder, number))
        write_json(folder / _INDEX, {"samples": samples, "wave": size * batch_size})


class Predictions:
    """Reads what `teach_denoiser` wrote.

    Attributes:
        samples: n.

    Raises:
        FileNotFoundError: the folder holds no predictions.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        index = read_json(self.folder / _INDEX)
        self.samples: int = index["samples"]
        self._wave: int = index["wave"]

    def rows(self, places: Sequence[int]) -> Tensor:
        """The predictions for some pairs, of the denoiser's output's shape, float32."""
        parts = [self._slices[place // self._wave][place % self._wave] for place in places]
        return torch.stack(parts).float()

    @cached_property
    def _slices(self) -> list[Any]:
        files = open_waves(self.folder, self.samples, self._wave)
        return [file.get_slice(_KEY) for file in files]


def heal_denoiser(
    emulator: Path | str,
    family: DiffusionFamily,
    encoded: Encoded,
    predictions: Predictions,
    *,
    settings: HealSettings,
    noise: NoiseSettings,
    out: Path | str,
    checkpoints: Path | str,
    device: torch.device | str = "cpu",
    max_shard_size: int | str = "2GB",
    progress: bool = False,
) -> dict[str, Any]:
    """Write a healed emulator; the one that was cut is not changed.

    Args:
        emulator: folder of an emulator.
        family, encoded, noise: as in `teach_denoiser`.
        predictions: of the original. One pair in eight is held out.
        settings, out, checkpoints, device, max_shard_size, progress: as in `emloc.heal.heal`.

    Returns:
        `history`, `trained_parameters`, and `error_before` and `error_after`, mean squared errors
        against the original's predictions for the pairs held out.

    Raises:
        ValueError: the loss became NaN or infinite. `out` is not written then.
    """
    model: Any = load_model(emulator, dtype=pick_dtype(settings.precision), device=device)
    taught, held = hold_out(range(predictions.samples))
    batch_of = partial(_batch, family, encoded, predictions, noise, model.dtype)
    measure = partial(_error, batch_of=batch_of, places=held, size=settings.batch_size)
    before = measure(model)
    split_off(model, settings, attach=partial(_attach, seed=settings.seed))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    collator = _Collator(batch_of, taught)
    curve = _train(model, collator, settings, Path(checkpoints), family, noise, encoded, progress)
    after = measure(model)
    write_healed(emulator, model, out, max_shard_size=max_shard_size)
    remove_checkpoints(Path(checkpoints))
    return {
        "history": curve,
        "trained_parameters": trained,
        "error_before": before,
        "error_after": after,
    }


def _attach(model: Any, lora: LoraSettings, *, seed: int) -> Any:
    add_denoiser_lora(model, lora, seed=seed)
    return model


def _batch(
    family: DiffusionFamily,
    encoded: Encoded,
    predictions: Predictions,
    noise: NoiseSettings,
    dtype: torch.dtype,
    places: Sequence[int],
) -> Batch:
    """Some pairs with the original's predictions as their target, all of one weight."""
    rows = [place % len(encoded) for place in places]
    batch = family.batch(encoded, rows, places, noise).as_type(dtype)
    weights = torch.ones_like(batch.weights)
    return Batch(batch.inputs, predictions.rows(places), weights, torch.zeros_like(batch.prior))


class _Collator:
    """Places in the training → a batch of pairs, which take turns, as a dict for the Trainer."""

    def __init__(self, batch_of: Any, taught: Sequence[int]) -> None:
        self.batch_of, self.taught = batch_of, taught

    def __call__(self, places: Sequence[int]) -> dict[str, Any]:
        return vars(self.batch_of([self.taught[place % len(self.taught)] for place in places]))


def _train(
    model: Any,
    collator: _Collator,
    settings: HealSettings,
    checkpoints: Path,
    family: DiffusionFamily,
    noise: NoiseSettings,
    encoded: Encoded,
    progress: bool,
) -> list[dict[str, Any]]:
    """Train the LoRA; the rows of the curve."""
    training = settings.training()
    watch = StepWatch(settings.save_steps, None, False, progress)
    trainer = NoiseTrainer(
        model,
        training_arguments(
            training,
            settings.steps,
            checkpoints,
            model.device,
            checkpointing=False,
            counts_tokens=False,
        ),
        range(settings.steps * settings.batch_size * settings.accumulation),
        collator=collator,
        watch=watch,
        family=family,
        validation=encoded,
        noise=noise,
        prior_weight=0.0,
    )
    if settings.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    try:
        with fused_lora(model):
            trainer.train(resume_from_checkpoint=agreed_checkpoint(checkpoints, settings.steps))
    finally:
        watch.close()
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
    return history(trainer.state.log_history, training.log_steps, settings.steps)


def _error(model: Any, *, batch_of: Any, places: Sequence[int], size: int) -> float:
    """Mean squared error of a denoiser against the original's predictions for some pairs."""
    total = 0.0
    with evaluating(model):
        for start in range(0, len(places), size):
            some = places[start : start + size]
            batch = batch_of(some).to(model.device)
            error = (model(**batch.inputs)[0].float() - batch.target) ** 2
            total += float(error.flatten(1).mean(1).sum())
    return total / len(places)

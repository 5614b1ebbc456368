"""Ratios side by side: what each takes, how fast it trains, and what would still fit.

Peaks at all ratios follow from a few trainings that are run without data: weights are counted, and
what is computed is linear in ratio and batch, near enough.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from tqdm import tqdm

from emloc.devices import pick_dtype
from emloc.factors import factors_bytes
from emloc.memory import anonymous_bytes
from emloc.plan.jobs import Calibration, Healing, Teaching
from emloc.plan.loaded import Step, generate_peak, train_step
from emloc.plan.peak import PARTS, Peak
from emloc.plan.streamed import calibrate_peak, correct_peak, teach_peak
from emloc.plan.subject import Subject
from emloc.plan.tracking import bytes_of
from emloc.plan.work import Rows, Work
from emloc.settings import LoraSettings, TrainSettings
from emloc.sizes import GIB, show_gib

_ACCELERATOR_RUNTIME = GIB * 3 // 4
STEP = 0.01  # between the ratios that are tried


@dataclass(frozen=True)
class Option:
    """A ratio, and what it takes.

    Attributes:
        emulator_bytes: of its weights, in memory and on the disk.
        train: the peak of training on it.
        speed: tokens a second, relative to direct LoRA, by the FLOPs of a step.
        fits: whether training does.
        most_rows, longest: the largest batch at this length, and the longest row in this batch,
            that fit; None where that cannot be said.
    """

    ratio: float
    emulator_bytes: int
    train: Peak
    speed: float
    fits: bool
    most_rows: int
    longest: int | None


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Answers what a plan asks; every answer is worked out once.

    Attributes:
        subject: the model.
        dtype: that the original runs in; training has its own precision.
        work: training's largest batch.
        lora, settings: of training.
        calibration: what calibrate is to do.
        teaching, healing: what teach and heal are to do; None for nothing.
        prompts: the largest batch that is answered; None for a denoiser.
        new_tokens: of an answer, at most.
        device: where all this is run without data.
        budget_bytes: what may be taken where it will run, `runtime_bytes` included.
        runtime_bytes: what is taken there before anything is loaded; see `runtime_bytes_on`.
        progress: show a bar.
    """

    subject: Subject
    dtype: torch.dtype
    work: Work
    lora: LoraSettings
    settings: TrainSettings
    calibration: Calibration
    prompts: Rows | None
    new_tokens: int
    device: torch.device
    budget_bytes: int
    runtime_bytes: int
    teaching: Teaching | None = None
    healing: Healing | None = None
    progress: bool = False

    @cached_property
    def calibrate(self) -> Peak:
        """The peak of calibrating."""
        model = self.subject.build(self.dtype)
        return calibrate_peak(
            model,
            self.calibration.work,
            batches=self.calibration.batches,
            targets=self.subject.factorized(model),
            max_ratio=self.calibration.max_ratio,
            device=self.device,
        )

    @cached_property
    def generate(self) -> Peak | None:
        """The peak of answering with the original, or None for a denoiser."""
        if self.prompts is None:
            return None
        model = self.subject.build(self.dtype)
        return generate_peak(model, self.prompts, new_tokens=self.new_tokens, device=self.device)

    def correct(self, ratio: float) -> Peak:
        """The peak of correcting an adapter."""
        model = self.subject.build(self.dtype)
        ranks = self.subject.ranks(ratio, model)
        return correct_peak(ranks, model, self.lora.r, self.device)

    @cached_property
    def direct(self) -> Peak:
        """The peak of direct LoRA on the original."""
        return self._direct.peak

    def train(self, ratio: float) -> Peak:
        """The peak of training on the emulator of a ratio."""
        return self._step(self.subject.emulator(ratio, self._trained), self.work).peak

    @cached_property
    def teach(self) -> Peak | None:
        """The peak of streaming a wave of batches through the original."""
        if self.teaching is None:
            return None
        work, batches = self.teaching.work, self.teaching.batches
        model = self.subject.build(self.dtype)
        return teach_peak(model, work, batches=batches, device=self.device)

    def heal(self, ratio: float) -> Peak | None:
        """The peak of healing the emulator of a ratio; the directions that are trained are counted
        twice."""
        if self.healing is None:
            return None
        work, settings = self.healing.work, self.healing.settings
        model = self.subject.emulator(ratio, pick_dtype(settings.precision))
        targets = list(self.subject.ranks(ratio, model))
        lora = LoraSettings(r=settings.rank, alpha=settings.rank, target_modules=targets)
        training = settings.training(1)
        return train_step(model, work, lora=lora, settings=training, device=self.device).peak

    def factors_bytes(self) -> int:
        """Of the factors on the disk, in bfloat16, with their eigenvalues."""
        model = self.subject.build(self.dtype)
        layers = self.subject.factorized(model).values()
        ratio = self.calibration.max_ratio
        return sum(factors_bytes(layer.out_features, layer.in_features, ratio) for layer in layers)

    def option(self, ratio: float) -> Option:
        """What a ratio takes; quick once the first was asked for."""
        weights = bytes_of(self.subject.emulator(ratio, self._trained))
        step = self._near(ratio)
        room = self.budget_bytes - self.runtime_bytes - step.peak.total
        by_row, by_tokens = self._growth
        longest = None
        if isinstance(self.work, Rows):
            longest = int(self.work.tokens * max(0.0, 1 + _root(*by_tokens, room)))
        return Option(
            ratio,
            weights,
            step.peak,
            self._direct.flops / step.flops,
            room >= 0,
            max(0, int(self.work.batch_size + room // by_row)),
            longest,
        )

    def options(self, ratios: Sequence[float]) -> Iterator[Option]:
        """What each ratio takes."""
        with tqdm(total=6, desc="plan", unit="model", disable=not self.progress) as bar:
            for part in ("_direct", "_ends", "_growth"):
                getattr(self, part)
                bar.update({"_direct": 1, "_ends": 2, "_growth": 3}[part])
        for ratio in ratios:
            yield self.option(ratio)

    def largest_ratio(self) -> float:
        """The largest ratio, in steps of `STEP`, whose healing and training fit, checked without
        data.

        Raises:
            ValueError: none does; the message says what the least would be.
        """
        ratios = [round(n * STEP, 2) for n in range(1, round(self._highest / STEP) + 1)]
        likely = [ratio for ratio in ratios if self._fits(self._near(ratio).peak)]
        if likely and self._trains(likely[-1]):  # as a rule, unless healing takes more
            return likely[-1]
        fitting = bisect_left(likely, True, key=lambda ratio: not self._trains(ratio))
        if fitting:
            return likely[fitting - 1]
        least = self.runtime_bytes + max(peak.total for peak in self._trainings(ratios[0]))
        stages = ("train",) if self.healing is None else ("train", "heal")
        rows, again = (
            " and ".join(f"{stage}.{key}" for stage in stages)
            for key in ("batch_size", "gradient_checkpointing")
        )
        raise ValueError(
            f"no emulator can be trained in {show_gib(self.budget_bytes)}: at ratio {ratios[0]} it "
            f"takes {show_gib(least)}. Allow more, or lower {rows} or the length of the rows, or "
            f"set {again}."
        )

    def _trainings(self, ratio: float) -> Iterator[Peak]:
        """The peaks of what is trained at a ratio."""
        yield self.train(ratio)
        healed = self.heal(ratio)
        if healed is not None:
            yield healed

    def _trains(self, ratio: float) -> bool:
        return all(self._fits(peak) for peak in self._trainings(ratio))

    @property
    def _trained(self) -> torch.dtype:
        return pick_dtype(self.settings.precision)

    def _fits(self, peak: Peak) -> bool:
        return self.runtime_bytes + peak.total <= self.budget_bytes

    @property
    def _lowest(self) -> float:
        return min(0.05, self._highest / 2)

    @property
    def _highest(self) -> float:
        return self.calibration.max_ratio

    @cached_property
    def _direct(self) -> Step:
        return self._step(self.subject.build(self._trained), self.work)

    @cached_property
    def _ends(self) -> tuple[Step, Step]:
        low, high = (self.subject.emulator(r, self._trained) for r in (self._lowest, self._highest))
        return self._step(low, self.work), self._step(high, self.work)

    def _near(self, ratio: float) -> Step:
        """A step at a ratio, by those of the lowest and the highest; no model is built for it."""
        low, high = self._ends
        share = (ratio - self._lowest) / (self._highest - self._lowest)
        flops = round(low.flops + share * (high.flops - low.flops))
        return Step(_between(low.peak, high.peak, share), flops)

    @cached_property
    def _growth(self) -> tuple[float, tuple[float, float]]:
        """Bytes that one more row adds; and what rows that are longer by a share x add,
        b·x + c·x² bytes, as (b, c): masks grow with the square of the length."""
        base = self._ends[0].peak.total
        if not isinstance(self.work, Rows):
            return max(1.0, self._ends[0].peak.activations / self.work.batch_size), (0.0, 0.0)
        rows, tokens = self.work.batch_size, self.work.tokens
        sizes = (2 * rows, tokens), (rows, 2 * tokens), (rows, 3 * tokens)
        more = [self._more(self.work.resized(*size)) - base for size in sizes]
        square = max(0.0, (more[2] - 2 * more[1]) / 2)
        return max(1.0, more[0] / rows), (max(1.0, more[1] - square), square)

    def _more(self, work: Work) -> int:
        return self._step(self.subject.emulator(self._lowest, self._trained), work).peak.total

    def _step(self, model: Any, work: Work) -> Step:
        return train_step(model, work, lora=self.lora, settings=self.settings, device=self.device)


def _between(low: Peak, high: Peak, share: float) -> Peak:
    """Linear between two peaks; `share` 0 is the first, 1 the second."""
    parts = {
        part: round(getattr(low, part) + share * (getattr(high, part) - getattr(low, part)))
        for part in PARTS
    }
    return Peak(**parts)


def _root(linear: float, square: float, value: float) -> float:
    """The x at which linear·x + square·x² is `value`."""
    if square <= 0:
        return value / linear
    half = linear / (2 * square)
    return math.sqrt(max(0.0, half**2 + value / square)) - half


def runtime_bytes_on(kind: str) -> int:
    """What is taken on a kind of device before anything is loaded: an accelerator's context and
    libraries, or on a CPU the interpreter with its own."""
    return anonymous_bytes() if kind == "cpu" else _ACCELERATOR_RUNTIME

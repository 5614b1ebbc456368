"""What a user chooses for a training, checked at once.

- `LoraSettings`: the adapter's shape
- `TrainSettings`: steps, batches, learning rate, precision and so on
- `HealSettings`: how an emulator is healed before it is trained on
- `NoiseSettings`: how noise levels are drawn and weighted in training a diffusion model
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, cast

if TYPE_CHECKING:
    from peft import LoraConfig

ALL_LINEAR = "all-linear"
SCHEDULES = (
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_restarts",
)
PRECISIONS = ("float32", "bfloat16")
QUANTIZATIONS = ("nf4",)
OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "adafactor", "sgd", "prodigy")  # the usual ones
WEIGHTINGS = ("logit_normal", "sigma_sqrt", "mode", "cosmap", "none")
_INITS: dict[str, bool | Literal["gaussian"]] = {"default": True, "gaussian": "gaussian"}


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    """Unless `ok`, raise a ValueError that names a setting, its value and what is allowed."""
    if not ok:
        raise ValueError(f"{name} is {value!r}, but it must be {allowed}.")


def is_whole(value: object, low: int) -> bool:
    """Whether `value` is an integer (not a bool) of at least `low`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def is_real(value: object, low: float, high: float = math.inf) -> bool:
    """Whether `value` is a finite number (not a bool) from `low` to `high`."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and math.isfinite(cast(float, value)) and low <= cast(float, value) <= high


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _plain(number: float) -> int:
    """16.0 as 16, so that an adapter's config does not depend on how alpha was written."""
    return int(number) if number == int(number) else cast(int, number)


@dataclass(kw_only=True)
class LoraSettings:
    """The adapter's shape.

    Args:
        r: LoRA rank.
        alpha: the adapter is scaled by alpha / r (alpha / √r with `use_rslora`).
        dropout: share of a LoRA's inputs that are dropped in training, from 0 to below 1.
        target_modules: "all-linear" (all but the output head), a list of name endings such as
            ["q_proj", "v_proj"], or one regex that matches whole module names.
        use_rslora: scale by alpha / √r.
        rank_pattern: regex on the end of a module's name → its own rank.
        alpha_pattern: the same for alpha.
        modules_to_save: endings of names of modules to train in full and save with the adapter.
        init: "default" (peft's own, B = 0) or "gaussian".

    Raises:
        ValueError: a value is not allowed; the message names it.
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: str | list[str] = ALL_LINEAR
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: list[str] = field(default_factory=list)
    init: str = "default"

    def __post_init__(self) -> None:
        require(is_whole(self.r, 1), "r", self.r, "a whole number of at least 1")
        require(is_real(self.alpha, 0) and self.alpha > 0, "alpha", self.alpha, "a number above 0")
        require(
            is_real(self.dropout, 0) and self.dropout < 1,
            "dropout",
            self.dropout,
            "a number from 0 to below 1",
        )
        require(isinstance(self.use_rslora, bool), "use_rslora", self.use_rslora, "true or false")
        require(self.init in _INITS, "init", self.init, " or ".join(map(repr, _INITS)))
        self._check_names()
        for key, rank in self.rank_pattern.items():
            require(
                is_whole(rank, 1), f"rank_pattern[{key!r}]", rank, "a whole number of 1 or more"
            )
        for key, alpha in self.alpha_pattern.items():
            good = is_real(alpha, 0) and alpha > 0
            require(good, f"alpha_pattern[{key!r}]", alpha, "a number above 0")

    def _check_names(self) -> None:
        targets = self.target_modules
        named = _are_names([targets] if isinstance(targets, str) else targets or None)
        kinds = f"{ALL_LINEAR!r}, a regex, or a list of name endings that is not empty"
        require(named, "target_modules", targets, kinds)
        saved = self.modules_to_save
        require(_are_names(saved), "modules_to_save", saved, "a list of name endings")
        regexes = {"rank_pattern": list(self.rank_pattern), "alpha_pattern": [*self.alpha_pattern]}
        if isinstance(targets, str):
            regexes["target_modules"] = [targets]
        for name, patterns in regexes.items():
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(
                        f"{name} holds {pattern!r}, which is no valid regex ({error}): correct it."
                    ) from error

    def config(self, task_type: str | None = "CAUSAL_LM") -> LoraConfig:
        """The same settings as peft's config of a causal language model, or without a task."""
        from peft import LoraConfig  # loads much, and is not needed to read settings

        return LoraConfig(
            task_type=task_type,
            r=self.r,
            lora_alpha=_plain(self.alpha),
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            use_rslora=self.use_rslora,
            rank_pattern=dict(sorted(self.rank_pattern.items())),
            alpha_pattern={k: _plain(a) for k, a in sorted(self.alpha_pattern.items())},
            modules_to_save=list(self.modules_to_save) or None,
            init_lora_weights=_INITS[self.init],
        )


@dataclass(kw_only=True)
class TrainSettings:
    """How to train.

    Args:
        steps: optimizer steps; exactly one of `steps` and `epochs` is set.
        epochs: passes over the training rows; 0.5 is half a pass.
        batch_size: rows in one forward pass.
        accumulation: forward passes per optimizer step.
        learning_rate: its highest value.
        schedule: one of `SCHEDULES`, as transformers names them.
        warmup: share of the steps in which the learning rate rises, from 0 to below 1.
        weight_decay: of the optimizer.
        optimizer: one of transformers' `OptimizerNames`, or "prodigy", which finds its own step
            size (learning_rate is then a factor, best left at 1).
        max_grad_norm: longer gradients are cut to this length; 0 cuts none.
        precision: "float32", or "bfloat16" for mixed precision (the LoRA stays in float32).
        quantization: of the frozen weights while training: None for none, or "nf4" for 4 bits
            (QLoRA; needs bitsandbytes).
        gradient_checkpointing: less memory, about a third more time.
        group_by_length: batches of rows of like length, which saves padding.
        fused: compute a LoRA without dropout in the low-rank layer's own matrix products
            (`emloc.fused`): faster, and peft's result up to rounding.
        log_steps: steps per row of the history.
        eval_steps: steps between two validations; None validates after the last step only.
        save_steps: steps between two checkpoints.
        workers: processes that read pictures ahead; 0 reads them in between. The result is the
            same.
        seed: of the LoRA's first weights, the order of the rows and the dropout.

    Raises:
        ValueError: a value is not allowed; the message names it.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 4
    accumulation: int = 1
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup: float = 0.0
    weight_decay: float = 0.0
    optimizer: str = "adamw_torch_fused"
    max_grad_norm: float = 1.0
    precision: str = "float32"
    quantization: str | None = None
    gradient_checkpointing: bool = False
    group_by_length: bool = False
    fused: bool = True
    log_steps: int = 10
    eval_steps: int | None = None
    save_steps: int = 100
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"steps is {self.steps} and epochs is {self.epochs}, but exactly one of them must "
                "be set: leave the other empty."
            )
        for name in ("steps", "eval_steps"):
            value = getattr(self, name)
            require(value is None or is_whole(value, 1), name, value, "empty or 1 or more, whole")
        for name in ("batch_size", "accumulation", "log_steps", "save_steps"):
            value = getattr(self, name)
            require(is_whole(value, 1), name, value, "a whole number of at least 1")
        require(is_whole(self.workers, 0), "workers", self.workers, "a whole number of at least 0")
        require(
            is_whole(self.seed, 0) and self.seed < 2**32, "seed", self.seed, "whole, 0 to 2^32-1"
        )
        for name in ("learning_rate", "epochs"):
            value = getattr(self, name)
            good = (name == "epochs" and value is None) or (is_real(value, 0) and value > 0)
            require(good, name, value, "a number above 0")
        for name in ("weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            require(is_real(value, 0), name, value, "a number of at least 0")
        good = is_real(self.warmup, 0) and self.warmup < 1
        require(good, "warmup", self.warmup, "a share of the steps, from 0 to below 1")
        for name in ("gradient_checkpointing", "group_by_length", "fused"):
            value = getattr(self, name)
            require(isinstance(value, bool), name, value, "true or false")
        self._check_choices()

    def _check_choices(self) -> None:
        known = self.quantization is None or self.quantization in QUANTIZATIONS
        kinds = f"empty or one of {', '.join(QUANTIZATIONS)}"
        require(known, "quantization", self.quantization, kinds)
        choices = {"schedule": SCHEDULES, "precision": PRECISIONS}
        if self.optimizer not in OPTIMIZERS:
            from transformers.training_args import OptimizerNames  # loads much

            choices["optimizer"] = (*(e.value for e in OptimizerNames), "prodigy")
        for name, allowed in choices.items():
            value = getattr(self, name)
            require(value in allowed, name, value, f"one of {', '.join(allowed)}")
        if self.schedule == "constant" and self.warmup:
            raise ValueError(
                f"warmup is {self.warmup}, but schedule 'constant' has none: set warmup to 0 or "
                "schedule to 'constant_with_warmup'."
            )

    def total_steps(self, rows: int) -> int:
        """Optimizer steps for this many training rows."""
        if self.steps is not None:
            return self.steps
        batches = math.ceil(rows / self.batch_size)
        return math.ceil((self.epochs or 0) * math.ceil(batches / self.accumulation))


@dataclass(kw_only=True)
class HealSettings:
    """How an emulator is healed: distilled from its original in the last directions it keeps.

    Args:
        steps: optimizer steps; 0 leaves the emulator as it was cut.
        rank: how many of a layer's directions are trained, at most half of them.
        batch_size, accumulation, learning_rate, schedule, warmup, precision,
            gradient_checkpointing, save_steps, seed: as in `TrainSettings`.

    Raises:
        ValueError: a value is not allowed; the message names it.
    """

    steps: int = 60
    rank: int = 16
    batch_size: int = 16
    accumulation: int = 1
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup: float = 0.03
    precision: str = "float32"
    gradient_checkpointing: bool = False
    save_steps: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        require(is_whole(self.steps, 0), "steps", self.steps, "a whole number of at least 0")
        require(is_whole(self.rank, 1), "rank", self.rank, "a whole number of at least 1")
        self.training(max(1, self.steps))

    def training(self, steps: int | None = None) -> TrainSettings:
        """The same as settings of a training."""
        return TrainSettings(
            steps=self.steps if steps is None else steps,
            batch_size=self.batch_size,
            accumulation=self.accumulation,
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            warmup=self.warmup,
            precision=self.precision,
            gradient_checkpointing=self.gradient_checkpointing,
            save_steps=self.save_steps,
            seed=self.seed,
        )


@dataclass(kw_only=True)
class NoiseSettings:
    """How noise levels are drawn and weighted in training a diffusion model.

    Args:
        weighting: of a flow-matching model, one of `WEIGHTINGS` as diffusers names them:
            "logit_normal" and "mode" draw the levels unevenly, "sigma_sqrt" and "cosmap" weight
            the loss, "none" does neither.
        logit_mean: of "logit_normal".
        logit_std: of "logit_normal".
        mode_scale: of "mode".
        guidance: the guidance scale that a guidance-distilled transformer is told in training.
        snr_gamma: of a UNet: levels whose signal-to-noise ratio is above it weigh less (min-SNR);
            None weights all alike.

    Raises:
        ValueError: a value is not allowed; the message names it.
    """

    weighting: str = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    guidance: float = 1.0
    snr_gamma: float | None = None

    def __post_init__(self) -> None:
        allowed = f"one of {', '.join(WEIGHTINGS)}"
        require(self.weighting in WEIGHTINGS, "weighting", self.weighting, allowed)
        for name in ("logit_mean", "mode_scale"):
            value = getattr(self, name)
            require(is_real(value, -math.inf), name, value, "a number")
        for name in ("logit_std", "guidance"):
            value = getattr(self, name)
            require(is_real(value, 0), name, value, "a number of at least 0")
        gamma = self.snr_gamma
        good = gamma is None or (is_real(gamma, 0) and gamma > 0)
        require(good, "snr_gamma", gamma, "empty or a number above 0")

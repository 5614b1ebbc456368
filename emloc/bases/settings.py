"""What a user chooses for an original that the project trains itself, checked at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from emloc.metrics.shapes import COLORS, SHAPES
from emloc.settings import is_real, is_whole, require


@dataclass(frozen=True, kw_only=True)
class EasyVqaSettings:
    """How long and how fast to train.

    Args:
        vision_steps: steps in which the vision tower learns to see.
        steps: steps in which the language model learns to answer.
        batch_size: pictures in a step.
        learning_rate: the highest one, of Muon; AdamW, which trains all but the matrices, takes a
            tenth.

    Raises:
        ValueError: a value is not allowed; the message names it.
    """

    vision_steps: int = 400
    steps: int = 150
    batch_size: int = 64
    learning_rate: float = 0.02

    def __post_init__(self) -> None:
        _check_numbers(self, "vision_steps", "steps", "batch_size")


@dataclass(frozen=True, kw_only=True)
class TinyFluxSettings:
    """How long and how fast to train, and what to leave out.

    Args:
        vae_steps: steps of the VAE, of 16 pictures at most.
        steps: steps of the transformer.
        batch_size: pictures in one of those.
        learning_rate: the highest one, of Muon; AdamW, which trains all but the matrices, takes a
            tenth.
        held_out: the concept that no training shows: a colour and a shape.

    Raises:
        ValueError: a value is not allowed; the message names it.
    """

    vae_steps: int = 500
    steps: int = 12000
    batch_size: int = 32
    learning_rate: float = 0.02
    held_out: str = "blue triangle"

    def __post_init__(self) -> None:
        _check_numbers(self, "vae_steps", "steps", "batch_size")
        known = {f"{color} {shape}" for color in COLORS for shape in SHAPES}
        allowed = f"a colour ({', '.join(COLORS)}) and a shape ({', '.join(SHAPES)})"
        require(self.held_out in known, "held_out", self.held_out, allowed)


def _check_numbers(settings: Any, *counts: str) -> None:
    """Refuse counts below 1, and a learning rate that is not above 0."""
    for name in counts:
        value = getattr(settings, name)
        require(is_whole(value, 1), name, value, "a whole number of at least 1")
    rate = settings.learning_rate
    require(is_real(rate, 0) and rate > 0, "learning_rate", rate, "a number above 0")

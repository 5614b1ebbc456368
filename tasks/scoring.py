"""How a run's kind of model is scored: by its answers, or by its pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from tasks.answers import score_answers, validation_loss_of_answers
from tasks.drawings import score_drawings, validation_loss_of_pictures
from tasks.params import Params


def scorer_of(params: Params) -> Callable[..., dict[str, float]]:
    """`score_answers`, or `score_drawings` for a diffusion pipeline; both are called alike."""
    return score_answers if params.noise is None else score_drawings


def validation_loss(params: Params, adapter: Path, label: str, device: torch.device) -> float:
    """Loss of the original with an adapter on the validation rows or pictures."""
    answers = params.noise is None
    measure = validation_loss_of_answers if answers else validation_loss_of_pictures
    return measure(params, adapter, label, device)

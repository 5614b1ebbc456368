"""How a run's kind of model is scored: by its answers, or by its pictures."""

from __future__ import annotations

from collections.abc import Callable

from tasks.answers import score_answers
from tasks.drawings import score_drawings
from tasks.params import Params


def scorer_of(params: Params) -> Callable[..., dict[str, float]]:
    """`score_answers`, or `score_drawings` for a diffusion pipeline; both are called alike."""
    return score_answers if params.noise is None else score_drawings

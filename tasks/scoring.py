"""How a run's kind of model is scored: by its answers, or by its pictures."""

from __future__ import annotations

from pathlib import Path

import torch

from tasks.answers import score_answers
from tasks.drawings import score_drawings
from tasks.params import Params


def score(
    base: Path,
    adapter: Path | None,
    params: Params,
    *,
    label: str,
    predictions: Path,
    device: torch.device,
) -> dict[str, float]:
    """Metrics of `params.evaluate` and the loss; answers or pictures go below `predictions`."""
    way = score_answers if params.noise is None else score_drawings
    return way(base, adapter, params, label=label, predictions=predictions, device=device)

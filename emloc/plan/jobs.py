"""What the stages beside training are to do, for a plan of them."""

from __future__ import annotations

from dataclasses import dataclass

from emloc.plan.work import Work
from emloc.settings import HealSettings


@dataclass(frozen=True)
class Calibration:
    """What calibrate is to do.

    Attributes:
        work: the largest batch; None for the plain SVD.
        batches: how many there are.
        max_ratio: up to which layers are factorized.
    """

    work: Work | None
    batches: int
    max_ratio: float


@dataclass(frozen=True)
class Teaching:
    """What teach is to do.

    Attributes:
        work: a batch.
        batches: of a wave.
    """

    work: Work
    batches: int


@dataclass(frozen=True)
class Healing:
    """What heal is to do.

    Attributes:
        work: its largest batch, `TaughtRows` of a model that answers.
        settings: how to train.
    """

    work: Work
    settings: HealSettings

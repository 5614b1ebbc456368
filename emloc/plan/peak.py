"""The peak memory of a stage, by part."""

from __future__ import annotations

from dataclasses import dataclass

PARTS = ("weights", "adapter", "activations", "logits", "statistics")


@dataclass(frozen=True)
class Peak:
    """The peak of a stage, in bytes, what was in the process before left out.

    Attributes:
        weights: parameters and buffers of what is loaded.
        adapter: the LoRA, its gradients and the optimizer's state.
        activations: what is computed, the logits left out.
        logits: logits, their gradient and their softmax.
        statistics: second moments and what is needed to factorize them.
    """

    weights: int
    adapter: int = 0
    activations: int = 0
    logits: int = 0
    statistics: int = 0

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(getattr(self, part) for part in PARTS)

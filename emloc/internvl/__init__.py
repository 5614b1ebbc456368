"""InternVL2.5's own checkpoints, turned into the format that plain transformers loads."""

from emloc.internvl.weights import convert

__all__ = ["convert"]

"""Bytes as people write them: "24GiB", "500 MB"."""

from __future__ import annotations

import re

GIB = 2**30
_UNITS = {
    "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of a size such as "24GiB" or "500 MB".

    Raises:
        ValueError: it is no size above 0.
    """
    match = _SIZE.fullmatch(text)
    unit = match and _UNITS.get(match[2].lower())
    size = int(float(match[1]) * unit) if match and unit else 0
    if size < 1:
        raise ValueError(
            f"{text!r} is no size: write a number and a unit, such as 24GiB, 500MiB or 80GB."
        )
    return size


def show_gib(size: float) -> str:
    """Bytes as GiB, with two digits behind the point."""
    return f"{size / GIB:.2f} GiB"

"""Seeded, disjoint train, validation and test rows."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping, Sequence

from emloc.data.jsonl import Row

SPLITS = ("train", "validation", "test")

_log = logging.getLogger(__name__)


def split_rows(rows: Sequence[Row], *, sizes: Mapping[str, int], seed: int) -> dict[str, list[Row]]:
    """Shuffle the rows by `seed` and cut three splits of the asked sizes.

    A row that occurs more than once is used once, so that no split repeats another's rows. The
    test split is cut first, then validation, then train: a larger `train` keeps the other two.

    Args:
        rows: what to split; not changed.
        sizes: number of rows of `train` (at least 1), `validation` and `test` (0 or more); a
            missing name counts as 0.
        seed: the same rows, sizes and seed give the same splits on every machine.

    Raises:
        ValueError: an unknown split, a size that is no such number, or too few rows.
    """
    wanted = _check_sizes(sizes)
    distinct = list({json.dumps(row, sort_keys=True): row for row in rows}.values())
    repeated = len(rows) - len(distinct)
    needed = sum(wanted.values())
    if needed > len(distinct):
        asked = ", ".join(f"{name} {wanted[name]}" for name in SPLITS)
        raise ValueError(
            f"there are {len(distinct)} different rows, but the splits ask for {needed} ({asked}): "
            "make the splits smaller or add rows."
        )
    if repeated:
        _log.warning("%d rows are repetitions of others and were left out", repeated)
    random.Random(seed).shuffle(distinct)
    splits = {}
    start = 0
    for name in reversed(SPLITS):
        splits[name] = distinct[start : start + wanted[name]]
        start += wanted[name]
    return {name: splits[name] for name in SPLITS}


def _check_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    """The size of every split, checked."""
    unknown = sorted(set(sizes) - set(SPLITS))
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no split: the splits are {', '.join(SPLITS)}.")
    wanted = {name: sizes.get(name, 0) for name in SPLITS}
    for name, size in wanted.items():
        least = 1 if name == "train" else 0
        if not isinstance(size, int) or isinstance(size, bool) or size < least:
            raise ValueError(
                f"the size of the {name} split is {size!r}, but it must be a whole number of "
                f"at least {least}."
            )
    return wanted

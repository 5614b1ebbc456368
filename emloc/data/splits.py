"""Seeded, disjoint train, validation and test rows."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import islice

from emloc.data.rows import Row

SPLITS = ("train", "validation", "test")

_log = logging.getLogger(__name__)


def split_rows(
    rows: Sequence[Row],
    *,
    sizes: Mapping[str, int],
    seed: int,
    accept: Callable[[Row], bool] | None = None,
) -> dict[str, list[Row]]:
    """Shuffle the rows by `seed` and cut three splits of the asked sizes.

    A row that occurs more than once is used once, so that no split repeats another's rows. The
    test split is cut first, then validation, then train: a larger `train` keeps the other two.

    A row with `repeat` counts once for the sizes; in train it then stands so many times, one after
    the other. The rows that come back have no `repeat`.

    Args:
        rows: what to split; not changed.
        sizes: number of rows of `train` (at least 1), `validation` and `test` (0 or more); a
            missing name counts as 0.
        seed: the same rows, sizes and seed give the same splits on every machine.
        accept: whether a row can be used; asked in the shuffled order, once a row and not longer
            than until all splits are full. None takes every row.

    Raises:
        ValueError: an unknown split, a size that is no such number, or too few rows.
    """
    wanted = _check_sizes(sizes)
    distinct, repeats = _distinct(rows)
    order = list(range(len(distinct)))
    random.Random(seed).shuffle(order)
    taken = _take(order, lambda place: accept is None or accept(distinct[place]), wanted)
    if repeated := len(rows) - len(distinct):
        _log.warning("%d rows are repetitions of others and were left out", repeated)
    splits, start = {}, 0
    for name in reversed(SPLITS):
        members = taken[start : start + wanted[name]]
        times = {place: repeats[place] if name == "train" else 1 for place in members}
        splits[name] = [distinct[place] for place in members for _ in range(times[place])]
        start += wanted[name]
    return {name: splits[name] for name in SPLITS}


def _take(order: list[int], usable: Callable[[int], bool], wanted: Mapping[str, int]) -> list[int]:
    """The first usable places of `order`, as many as all splits hold together."""
    needed = sum(wanted.values())
    asked = f"the splits ask for {needed} ({', '.join(f'{n} {wanted[n]}' for n in SPLITS)})"
    advice = "make the splits smaller or add rows"
    if needed > len(order):
        raise ValueError(f"there are {len(order)} different rows, but {asked}: {advice}.")
    taken = list(islice(filter(usable, order), needed))
    if len(taken) < needed:
        raise ValueError(
            f"there are {len(taken)} usable rows, since {len(order) - len(taken)} of the "
            f"{len(order)} different ones were left out, but {asked}: {advice}."
        )
    return taken


def _distinct(rows: Sequence[Row]) -> tuple[list[Row], list[int]]:
    """The different rows without `repeat`, and the largest `repeat` that each came with."""
    found: dict[str, tuple[Row, int]] = {}
    for row in rows:
        repeat = row.get("repeat", 1)
        if "repeat" in row:
            row = {name: value for name, value in row.items() if name != "repeat"}
        text = json.dumps(row, sort_keys=True)
        _, earlier = found.get(text, (row, 1))
        found[text] = (row, max(repeat, earlier))
    return [row for row, _ in found.values()], [repeat for _, repeat in found.values()]


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

"""Which linear layers: regexes over module names, each match a full one.

- `select`: the layers to calibrate
- `ratios_for`: the ratio that each layer is cut at
- `swept`: the layers whose ratio is the one that a run compares
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

from torch import nn

BLOCKS = r".*\.\d+\..*"  # all linear layers in numbered blocks; not the head, not a projector
SWEPT = "ratio"  # stands in a target for the ratio that a run compares


def compile_pattern(pattern: str, where: str) -> re.Pattern[str]:
    """Compile a regex.

    Raises:
        ValueError: it is no valid regex.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{where} holds {pattern!r}, which is no valid regex ({error}): correct it."
        ) from error


def select(model: nn.Module, patterns: Iterable[str], *, where: str) -> dict[str, nn.Linear]:
    """Linear layers whose full name one of the patterns matches, in the model's order.

    Args:
        model: the original; its parameters may be on the meta device.
        patterns: regexes for `re.fullmatch`.
        where: how the caller's user names the patterns, for messages.

    Raises:
        ValueError: a pattern is invalid or matches no linear layer, or a layer shares its weight
            with another module.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    chosen: set[str] = set()
    for pattern in patterns:
        matched = [name for name in linears if compile_pattern(pattern, where).fullmatch(name)]
        if not matched:
            near = difflib.get_close_matches(pattern, linears, n=1, cutoff=0.0)
            raise ValueError(
                f"{where}: {pattern!r} matches none of the model's {len(linears)} linear layers; "
                f"a pattern must match a full name, such as {', '.join(near) or 'none'}."
            )
        chosen.update(matched)
    tied = getattr(model, "all_tied_weights_keys", {})
    for name in chosen:
        if f"{name}.weight" in {*tied, *tied.values()}:
            raise ValueError(
                f"{where} matches {name}, which shares its weight with another module and has to "
                "stay whole: narrow the pattern."
            )
    return {name: linear for name, linear in linears.items() if name in chosen}


def ratios_for(
    names: Iterable[str], targets: Mapping[str, float | str], ratio: float, *, where: str
) -> dict[str, float]:
    """The ratio of each layer that a target matches; the first full match wins.

    Args:
        names: the calibrated layers.
        targets: regex → a ratio of its own, or "ratio" for the swept one.
        ratio: the swept ratio.
        where: how the caller's user names the targets, for messages.

    Returns:
        Layer name → ratio; layers that nothing matches are left out and stay whole.

    Raises:
        ValueError: a pattern is invalid or matches none of the names, or a value is neither a ratio
            in (0, 1) nor "ratio".
    """
    chosen = _first_matches(list(names), targets, where)
    return {name: ratio if value == SWEPT else float(value) for name, value in chosen.items()}


def swept(names: Iterable[str], targets: Mapping[str, float | str], *, where: str) -> list[str]:
    """The layers that get the swept ratio from `ratios_for`, not a number of their own.

    Raises:
        ValueError: as `ratios_for`.
    """
    chosen = _first_matches(list(names), targets, where)
    return [name for name, value in chosen.items() if value == SWEPT]


def _first_matches(
    names: list[str], targets: Mapping[str, float | str], where: str
) -> dict[str, float | str]:
    """Layer name → value of the first target that matches it, checked."""
    chosen: dict[str, float | str] = {}
    for pattern, value in targets.items():
        if value != SWEPT and not (isinstance(value, float | int) and 0 < value < 1):
            raise ValueError(
                f"{where}: {pattern!r} is {value!r}, but a target is a number from 0 to 1 (both "
                f"excluded) or {SWEPT!r}; leave a layer that should stay whole unmatched."
            )
        matched = [name for name in names if compile_pattern(pattern, where).fullmatch(name)]
        if not matched:
            raise ValueError(
                f"{where}: {pattern!r} matches none of the {len(names)} calibrated layers, which "
                f"are named like {', '.join(names[:1]) or 'nothing'}: correct it or remove it."
            )
        for name in matched:
            chosen.setdefault(name, value)
    return chosen

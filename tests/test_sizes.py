"""Sizes as people write them."""

from __future__ import annotations

import pytest

from emloc.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * 2**30), ("1.5 GB", 1_500_000_000), ("500mib", 500 * 2**20), ("7 B", 7)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["24", "GiB", "-1GiB", "0GB", "24 apples", ""])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no size: write a number and a unit, such as 24GiB"):
        parse_size(text)

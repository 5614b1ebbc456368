"""Tables as CSV files, for plots."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from emloc.files import writing


def write_csv(file: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows under a header; a cell is empty where a row has no value."""
    with writing(file) as partial, open(partial, "w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(file: Path) -> list[dict[str, str]]:
    """The rows under the header, all cells as text."""
    with open(file, newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))

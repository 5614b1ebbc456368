"""The factors that `calibrate` wrote, read back by layer with any number of leading rows.

Letters: o out features, i in features, k rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emloc.files import read_json
from emloc.weights import LastFile


class FactorFiles:
    """Reads the factors that `calibrate` wrote.

    Attributes:
        modules: layer name → shapes, largest rank, tokens and file, in the model's order.
        max_ratio: largest ratio to cut at.
        dtype: of the factors.

    Raises:
        FileNotFoundError: the folder holds no factors.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder, self._files = Path(folder), LastFile()
        index = read_json(self.folder / "factors.json")
        self.modules: dict[str, dict[str, Any]] = {
            entry["name"]: entry for entry in index["modules"]
        }
        self.max_ratio: float = index["max_ratio"]
        self.dtype: torch.dtype = getattr(torch, index["dtype"])

    def eigenvalues(self, name: str) -> Tensor:
        """All eigenvalues of one layer, (min(o, i),) float64, falling."""
        values: Tensor = self._open(name).get_tensor(f"{name}.eigenvalues")
        return values

    def cut(self, name: str, rank: int) -> tuple[Tensor, Tensor]:
        """The factors of one layer at a rank: `weight` (o×k) and `weight_in` (k×i).

        Raises:
            ValueError: the factors on disk have fewer rows.
        """
        return self.weight(name, rank), self.weight_in(name, rank)

    def weight(self, name: str, rank: int) -> Tensor:
        """The one (o×k) of the two, as in `cut`."""
        return self._rows(name, "out", rank).T.contiguous()

    def weight_in(self, name: str, rank: int) -> Tensor:
        """The other one (k×i), as in `cut`."""
        return self._rows(name, "in", rank)

    def _rows(self, name: str, part: str, rank: int) -> Tensor:
        largest = self.modules[name]["rank"]
        if rank > largest:
            raise ValueError(
                f"{name} is asked for at rank {rank}, but was calibrated up to rank {largest}: "
                "raise calibrate.max_ratio or lower the ratio."
            )
        rows: Tensor = self._open(name).get_slice(f"{name}.{part}")[:rank]
        return rows

    def _open(self, name: str) -> Any:
        return self._files.open(self.folder / self.modules[name]["file"])

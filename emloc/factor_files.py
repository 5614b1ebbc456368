"""The factors that `calibrate` wrote, read back by layer with any number of leading rows.

Letters: o out features, i in features, k rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from emloc.files import read_json


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
        self.folder = Path(folder)
        index = read_json(self.folder / "factors.json")
        self.modules: dict[str, dict[str, Any]] = {
            entry["name"]: entry for entry in index["modules"]
        }
        self.max_ratio: float = index["max_ratio"]
        self.dtype: torch.dtype = getattr(torch, index["dtype"])

    def eigenvalues(self, name: str) -> Tensor:
        """All eigenvalues of one layer, (min(o, i),) float64, falling."""
        with self._open(name) as handle:
            return handle.get_tensor(f"{name}.eigenvalues")

    def cut(self, name: str, rank: int) -> tuple[Tensor, Tensor]:
        """The factors of one layer at a rank: `weight` (o×k) and `weight_in` (k×i).

        Raises:
            ValueError: the factors on disk have fewer rows.
        """
        largest = self.modules[name]["rank"]
        if rank > largest:
            raise ValueError(
                f"{name} is asked for at rank {rank}, but was calibrated up to rank {largest}: "
                "raise calibrate.max_ratio or lower the ratio."
            )
        with self._open(name) as handle:
            out = handle.get_slice(f"{name}.out")[:rank]
            return out.T.contiguous(), handle.get_slice(f"{name}.in")[:rank]

    def _open(self, name: str) -> Any:
        return safe_open(self.folder / self.modules[name]["file"], framework="pt")

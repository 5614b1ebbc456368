"""Where a model's parameters lie on the disk, to be read on demand.

- `WeightStore`: reads parameters by name, and counts what it reads
- `OpenedModel`: a model on the meta device, with its store
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn


class Location(NamedTuple):
    """Where one parameter is stored."""

    file: Path
    key: str


class WeightStore:
    """Reads parameters of a model by name from its checkpoint's own safetensors files.

    Threads may share it. On a CPU a tensor is a view of its file, which is mapped into memory, not
    read: that happens as it is used.

    Attributes:
        locations: parameter name → file and key.
        reads: parameter name → how often it was read.
    """

    def __init__(self, locations: dict[str, Location]) -> None:
        self.locations = locations
        self.reads: Counter[str] = Counter()
        self._lock = threading.Lock()

    def read(self, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Read parameters, each file opened once, in the dtype they are stored in.

        Raises:
            KeyError: the checkpoint holds no such parameter.
        """
        by_file: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            by_file[self.locations[name].file].append(name)
        tensors = {}
        for file, members in by_file.items():
            with safe_open(file, framework="pt", device=str(device)) as handle:
                for name in members:
                    tensors[name] = handle.get_tensor(self.locations[name].key)
        with self._lock:
            self.reads.update(tensors.keys())
        return tensors


@dataclass(frozen=True)
class OpenedModel:
    """A model whose parameters are on the meta device, and where to read them."""

    model: nn.Module
    store: WeightStore

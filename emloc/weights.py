"""Where a model's parameters lie on the disk, to be read on demand.

- `WeightStore`: reads parameters by name, and counts what it reads
- `LastFile`: reads tensors by file and key, and opens a file once for neighbours
- `OpenedModel`: a model on the meta device, with its store
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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


class LastFile:
    """Keeps the safetensors file that was opened last, whose header takes long to read when there
    are thousands of tensors: neighbours in a model are mostly neighbours in a file."""

    def __init__(self) -> None:
        self._opened: tuple[Path, Any] | None = None

    def open(self, file: Path) -> Any:
        """A file as `safe_open` gives it."""
        if self._opened is None or self._opened[0] != file:
            self._opened = file, safe_open(file, framework="pt")
        return self._opened[1]

    def read(self, file: Path, key: str) -> Tensor:
        """One tensor, mapped into memory."""
        tensor: Tensor = self.open(file).get_tensor(key)
        return tensor


@dataclass(frozen=True)
class OpenedModel:
    """A model whose parameters are on the meta device, and where to read them."""

    model: nn.Module
    store: WeightStore

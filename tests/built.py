"""Emulators of tiny models, built as a user would, and fresh processes to try them in."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emloc.calibrate import calibrate
from emloc.emulator import cut, plan_ranks
from emloc.factor_files import FactorFiles
from emloc.models import open_model
from emloc.targets import ratios_for, select
from tests.opened import unequal_batches
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[1]
BLOCKS = r".*layers\.\d+\..*"

BLOCKED = """
import sys
class Block:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "emloc":
            raise ImportError("emloc is blocked")
sys.meta_path.insert(0, Block())
try:
    import emloc
except ImportError:
    pass
else:
    sys.exit("the block does not work")
"""


def python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a fresh process that sees the repository."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@dataclass
class Built:
    """An original, its factors, an emulator of it, and what `cut` returned."""

    original: Path
    factors: FactorFiles
    emulator: Path
    summary: dict[str, Any]


def build(
    name: str,
    folder: Path,
    *,
    ratio: float = 0.5,
    targets: dict[str, float | str] | None = None,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "2GB",
    **overrides: Any,
) -> Built:
    original = save_tiny(name, folder / "original", **overrides)
    opened = open_model(original, dtype=torch.float32)
    linears = select(opened.model, [BLOCKS], where="targets")
    calibrate(
        opened, unequal_batches(), linears=linears, max_ratio=0.8, out=folder / "f", dtype=dtype
    )
    factors = FactorFiles(folder / "f")
    chosen = ratios_for(factors.modules, targets or {".*": "ratio"}, ratio, where="targets")
    summary = cut(
        original,
        opened,
        factors,
        plan_ranks(factors, chosen),
        out=folder / "emulator",
        base_name="org/original",
        max_shard_size=max_shard_size,
    )
    return Built(original, factors, folder / "emulator", summary)

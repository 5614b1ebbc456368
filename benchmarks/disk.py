"""Cutting and loading an emulator against reading and writing the same bytes.

    python -m benchmarks.disk [--shape WIDTHxBLOCKS] [--ratio RATIO]

On a Llama of random bfloat16 weights with random factors, since speed does not depend on their
values. In turns:

- cut: `emloc.emulator.cut`, opened original and plan included
- copy: the emulator's files read with safetensors' `load_file`, and written with `save_file`
- load: `emloc.models.load_model` on a CPU
- read: `load_file`; for both, every tensor is copied, as files are only mapped until then

The files are in the system's cache when they are read, and written without waiting for the device.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import calibration_memory
from benchmarks.common import markdown, save_results, seconds
from emloc.emulator import cut, plan_ranks
from emloc.factor_files import FactorFiles
from emloc.factors import rank_for
from emloc.files import write_json
from emloc.models import load_model, open_model
from emloc.targets import BLOCKS, select

MAX_RATIO = 0.9


@dataclass(frozen=True)
class Work:
    """What is timed, in a folder with the original and its factors."""

    folder: Path
    ratio: float

    @property
    def emulator(self) -> Path:
        """Where it is cut to."""
        return self.folder / "emulator"

    def cut(self) -> None:
        """An emulator from factors that are there."""
        original, factors = self.folder / "original", FactorFiles(self.folder / "factors")
        opened = open_model(original, dtype=torch.bfloat16)
        plan = plan_ranks(factors, dict.fromkeys(factors.modules, self.ratio))
        cut(original, opened, factors, plan, out=self.emulator, base_name="original")

    def read(self) -> list[dict[str, Tensor]]:
        """The emulator's weights, a dictionary for each file."""
        files = sorted(self.emulator.glob("*.safetensors"))
        return [{n: t.clone() for n, t in load_file(file).items()} for file in files]

    def copy(self) -> None:
        """The emulator's weights read and written again."""
        for number, tensors in enumerate(self.read()):
            save_file(tensors, self.folder / f"copy-{number}.safetensors")

    def load(self) -> None:
        """The emulator as a model."""
        model = load_model(self.emulator, dtype=torch.bfloat16, device="cpu")
        _ = [parameter.clone() for parameter in model.parameters()]  # until then they are mapped


def write_factors(original: Path, folder: Path) -> None:
    """Random factors of all linear layers in blocks, as `calibrate` would write them."""
    model = open_model(original, dtype=torch.bfloat16).model
    draw = partial(torch.randn, dtype=torch.bfloat16)
    modules: list[dict[str, Any]] = []
    folder.mkdir()
    for name, linear in select(model, [BLOCKS], where="targets").items():
        o, i = linear.weight.shape
        rank, file = rank_for(MAX_RATIO, o, i), f"{name}.safetensors"
        values = torch.linspace(1, 0, min(o, i), dtype=torch.float64)
        tensors = {"out": draw(rank, o), "in": draw(rank, i), "eigenvalues": values}
        save_file({f"{name}.{part}": value for part, value in tensors.items()}, folder / file)
        entry = {"name": name, "file": file, "rank": rank, "tokens": 0}
        modules.append({**entry, "out_features": o, "in_features": i})
    index = {"modules": modules, "max_ratio": MAX_RATIO, "dtype": "bfloat16"}
    write_json(folder / "factors.json", index)


def run(width: int, blocks: int, ratio: float, repeats: int) -> dict[str, Any]:
    """Build, time, delete; seconds of each, and how much longer than the bare files it takes."""
    with tempfile.TemporaryDirectory(prefix="emloc-benchmark-") as name:
        folder = Path(name)
        size = calibration_memory.build(
            folder / "original", calibration_memory.grouped(blocks, width)
        )
        write_factors(folder / "original", folder / "factors")
        work = Work(folder, ratio)
        work.cut()  # warm-up
        works = {"cut": work.cut, "copy": work.copy, "load": work.load, "read": work.read}
        took = seconds(works, repeats=repeats)
        written = sum(file.stat().st_size for file in work.emulator.glob("*.safetensors"))
    return {
        "width": width,
        "blocks": blocks,
        "ratio": ratio,
        "repeats": repeats,
        "original_bytes": size,
        "emulator_bytes": written,
        "seconds": took,
        "share_of_disk_speed": {
            "cut": took["copy"] / took["cut"],
            "load": took["read"] / took["load"],
        },
    }


def main() -> None:
    """Run it, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--shape", default="2048x12")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    width, blocks = (int(number) for number in options.shape.split("x"))
    result = run(width, blocks, options.ratio, options.repeats)
    took, share = result["seconds"], result["share_of_disk_speed"]
    size = f"{result['emulator_bytes'] / 2**20:.0f} MiB"
    rows = [
        [name, size, f"{took[mine]:.2f} s", f"{took[bare]:.2f} s", f"{share[mine]:.0%}"]
        for name, mine, bare in (
            ("cut an emulator", "cut", "copy"),
            ("load an emulator", "load", "read"),
        )
    ]
    header = ["work", "bytes", "ours", "the bare files", "share of their speed"]
    print(markdown(header, rows))
    save_results("disk", result)


if __name__ == "__main__":
    main()

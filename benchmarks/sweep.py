"""Seconds for one more ratio against building its emulator anew.

    python -m benchmarks.sweep [--params FILE] [--ratio RATIO]

With the original, the rows and the settings of params.yaml, in one run and in turns:

- anew: calibrate the original, and cut an emulator from the factors
- one more ratio: cut an emulator from factors that are there
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import markdown, save_results, seconds
from emloc.calibrate import calibrate
from emloc.devices import pick_device, pick_dtype
from emloc.emulator import cut, plan_ranks
from emloc.factor_files import FactorFiles
from emloc.families import calibration_batches
from emloc.models import open_model
from emloc.source import resolve_model
from emloc.targets import ratios_for, select
from tasks.encoding import codec_of
from tasks.params import PARAMS, Params, load_params
from tasks.prepare import Chooser, split

TIMES_FASTER = 50  # what one more ratio has to be


@dataclass(frozen=True)
class Work:
    """What is timed, on one original.

    Attributes:
        original: its folder.
        batches: what calibration runs through it.
        folder: where factors and emulators are written.
    """

    params: Params
    original: Path
    batches: list[dict[str, Any]]
    folder: Path
    ratio: float

    def calibrate(self) -> None:
        """As the stage does it."""
        settings = self.params.calibrate
        opened = open_model(self.original, dtype=pick_dtype(self.params.model.dtype))
        calibrate(
            opened,
            self.batches,
            linears=select(opened.model, settings.targets, where="calibrate.targets"),
            max_ratio=settings.max_ratio,
            out=self.folder / "factors",
            device=pick_device(self.params.device),
            dtype=pick_dtype(settings.dtype),
        )

    def cut(self) -> None:
        """As the stage does it."""
        factors = FactorFiles(self.folder / "factors")
        targets = self.params.compress.targets
        ratios = ratios_for(factors.modules, targets, self.ratio, where="compress.targets")
        opened = open_model(self.original, dtype=pick_dtype(self.params.model.dtype))
        plan = plan_ranks(factors, ratios)
        out = self.folder / "emulator"
        cut(self.original, opened, factors, plan, out=out, base_name="original")

    def anew(self) -> None:
        """From nothing."""
        self.calibrate()
        self.cut()


def prepared(params: Params, folder: Path, ratio: float) -> Work:
    """The original and its calibration rows, as `prepare` chooses them."""
    original = resolve_model(params.model.source, sha256=params.model.sha256)
    codec = codec_of(original, params, root=Path())
    rows = split(params.data, Chooser(codec, params.data))["train"]
    samples, size = params.calibrate.samples, params.calibrate.batch_size
    examples = codec.encode(rows[:samples], max_length=params.data.max_length, source="train")
    return Work(params, original, calibration_batches(codec, examples, size), folder, ratio)


def run(work: Work, repeats: int) -> dict[str, Any]:
    """Seconds of both, and how many times faster one more ratio is."""
    work.anew()  # warm-up; the factors are there from here on
    took = seconds({"anew": work.anew, "one more": work.cut}, repeats=repeats)
    return {
        "ratio": work.ratio,
        "rows": sum(len(batch["input_ids"]) for batch in work.batches),
        "repeats": repeats,
        "seconds": took,
        "times_faster": took["anew"] / took["one more"],
    }


def main() -> None:
    """Run it, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--params", type=Path, default=PARAMS)
    parser.add_argument("--ratio", type=float, default=0.65)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    params = load_params(options.params)
    with tempfile.TemporaryDirectory(prefix="emloc-benchmark-") as folder:
        result = run(prepared(params, Path(folder), options.ratio), options.repeats)
    name = params.model.source.rpartition("/")[2]
    row = [f"{name}, {result['rows']} rows"]
    row += [f"{result['seconds'][work]:.2f} s" for work in ("anew", "one more")]
    row.append(f"{result['times_faster']:.0f}")
    print(markdown(["original", "calibrate and cut", "one more ratio", "times faster"], [row]))
    save_results("sweep", {"model": name, **result})
    if result["times_faster"] < TIMES_FASTER:
        sys.exit(f"one more ratio is less than {TIMES_FASTER} times faster than building it anew")


if __name__ == "__main__":
    main()

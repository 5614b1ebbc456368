"""Peak memory of every stage, planned and measured, at the shape of a published model.

    python -m benchmarks.memory --shape llama-1b
    python -m benchmarks.memory --shape internvl2_5-38b --ratio 0.18 --tokens 3500 --cap 24GiB

Weights are random, on no disk, and drawn as they are needed. Each stage runs in a process of its
own, by the project's own functions, for two steps or batches; on an accelerator the peak of what
is allocated counts, on a CPU the anonymous memory beyond what the process had before. --cap lets
torch allocate no more than that. A stage that does not fit is planned only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import markdown, save_results
from benchmarks.shapes import (
    NAMES,
    TILE_TOKENS,
    emulator_of,
    random_model,
    random_opened,
    subject_of,
)
from emloc.calibrate import calibrate
from emloc.correct import correct_adapter
from emloc.devices import pick_device, pick_dtype
from emloc.finetune import finetune
from emloc.memory import anonymous_bytes, give_back_freed_memory, measure
from emloc.plan.jobs import Calibration
from emloc.plan.options import Planner
from emloc.plan.work import Rows
from emloc.settings import LoraSettings, TrainSettings
from emloc.sizes import GIB, parse_size

LORA_ROWS = 2 * 2  # two steps of two accumulated batches, a row each at the least
BATCHES = 2  # to calibrate on
TINY = "tiny"  # a shape
NEW_TOKENS = 16
STAGES = ("generate", "direct", "calibrate", "train", "correct")


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        shape: a name in `benchmarks.shapes`.
        device, dtype: where, and in what precision.
        batch_size, tokens, labels: rows of a batch, their length, and labels in each.
        tiles: pictures' tiles in each row, 256 of its tokens each.
        checkpointing: whether training recomputes activations.
    """

    shape: str
    device: str
    dtype: str
    batch_size: int
    tokens: int
    labels: int
    tiles: int
    checkpointing: bool

    @property
    def settings(self) -> TrainSettings:
        """Of training."""
        return TrainSettings(
            steps=2,
            batch_size=self.batch_size,
            accumulation=2,
            precision=self.dtype,
            gradient_checkpointing=self.checkpointing,
        )

    @property
    def lora(self) -> LoraSettings:
        """The adapter's shape: on the language model's blocks."""
        text = r".*language_model\.layers\..*_proj"
        return LoraSettings(r=8, alpha=8, target_modules=text if self.tiles else "all-linear")

    def planner(self) -> Planner:
        """The plan of the same."""
        pictures = {"pixel_values": (self.tiles, 3, 448, 448)} if self.tiles else {}
        row = Rows(1, self.tokens, self.labels, pictures)
        return Planner(
            subject=subject_of(self.shape),
            dtype=pick_dtype(self.dtype),
            work=row.times(self.batch_size),
            lora=self.lora,
            settings=self.settings,
            calibration=Calibration(row, BATCHES, 0.5),
            prompts=row,
            new_tokens=NEW_TOKENS,
            device=pick_device(self.device),
            budget_bytes=0,
            runtime_bytes=0,
        )

    def batch(self, rows: int) -> dict[str, torch.Tensor]:
        """Rows of random tokens, their pictures' places first."""
        ids = torch.randint(10, 1000, (rows, self.tokens))
        ids[:, : self.tiles * TILE_TOKENS] = 5  # what stands for a picture
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.tiles:
            shape = (rows * self.tiles, 3, 448, 448)
            batch["pixel_values"] = torch.zeros(shape, dtype=pick_dtype(self.dtype))
        return batch


class _Codec:
    """Makes batches of rows that are nothing but their number."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def collate(self, examples: Sequence[Any], *, side: str) -> dict[str, torch.Tensor]:
        batch = self.case.batch(len(examples))
        labels = torch.full_like(batch["input_ids"], -100)
        labels[:, -self.case.labels :] = 7
        return {**batch, "labels": labels}


def run_stage(case: Case, stage: str, ratio: float, folder: Path) -> int:
    """Run one stage in this process; its peak in bytes, what was there before left out."""
    device, dtype = pick_device(case.device), pick_dtype(case.dtype)
    subject = subject_of(case.shape)
    give_back_freed_memory()
    if case.shape != TINY:  # libraries load parts of themselves when they are used first
        with tempfile.TemporaryDirectory() as other:
            run_stage(replace(case, shape=TINY, tiles=0), "direct", ratio, Path(other))
    before = anonymous_bytes() if device.type == "cpu" else 0
    with measure(device) as cost:
        if stage == "calibrate":
            opened = random_opened(subject.build(dtype))
            calibrate(
                opened,
                [{**case.batch(1), "use_cache": False} for _ in range(BATCHES)],
                linears=_few(subject.factorized(opened.model)),
                max_ratio=0.5,
                out=folder / "factors",
                device=device,
            )
        elif stage == "correct":
            correct_adapter(
                folder / "adapter",
                random_opened(subject.build(dtype)),
                random_opened(emulator_of(subject, ratio, dtype)),
                out=folder / "corrected",
                device=device,
            )
        elif stage == "generate":
            _generate(case, random_model(subject.build(dtype), device))
        else:
            empty = subject.build(dtype) if stage == "direct" else emulator_of(
                subject, ratio, dtype
            )  # fmt: skip
            _train(case, random_model(empty, device), folder)
    return cost.peak_bytes - before


def _few(linears: dict[str, Any]) -> dict[str, Any]:
    """Those of two blocks of each kind: what one block takes does not depend on the others."""
    return {name: linear for name, linear in linears.items() if ".0." in name or ".1." in name}


def _generate(case: Case, model: Any) -> None:
    inputs = {name: value.to(model.device) for name, value in case.batch(1).items()}
    model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)


def _train(case: Case, model: Any, folder: Path) -> None:
    row = {"input_ids": [7] * case.tokens, "labels": [-100] * (case.tokens - case.labels)}
    row["labels"] = row["labels"] + [7] * case.labels
    finetune(
        model,
        [row] * (LORA_ROWS * case.batch_size),
        [],
        codec=_Codec(case),  # type: ignore[arg-type]
        lora=case.lora,
        settings=case.settings,
        base_name="x",
        out=folder / "adapter",
        checkpoints=folder / "checkpoints",
        progress=False,
    )


def measured(case: Case, stage: str, ratio: float, folder: Path, cap: int | None) -> int | None:
    """The peak of a stage that runs in a fresh process, or None if it ran out of memory."""
    command = [sys.executable, "-m", "benchmarks.memory", "--stage", stage, "--ratio", str(ratio)]
    command += ["--folder", str(folder), "--case", json.dumps(vars(case))]
    command += [] if cap is None else ["--cap", f"{cap}B"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return int(done.stdout.splitlines()[-1])
    if "OutOfMemoryError" in done.stderr or done.returncode == -9:
        return None
    raise RuntimeError(f"{stage} failed:\n{done.stderr[-4000:]}")


def measure_all(case: Case, ratios: Sequence[float], cap: int | None) -> list[dict[str, Any]]:
    """A row for each stage and ratio: stage, ratio, planned_bytes, measured_bytes."""
    planner, rows = case.planner(), []
    plans = {
        "generate": lambda _: planner.generate,
        "direct": lambda _: planner.direct,
        "calibrate": lambda _: planner.calibrate,
        "train": planner.train,
        "correct": planner.correct,
    }
    with tempfile.TemporaryDirectory(prefix="emloc-benchmark-") as name:
        for stage in STAGES:
            for ratio in ratios if stage in ("train", "correct") else ratios[:1]:
                peak = plans[stage](ratio)
                assert peak is not None
                found = measured(case, stage, ratio, Path(name), cap)
                row = {"stage": stage, "ratio": ratio if stage in ("train", "correct") else None}
                rows.append({**row, "planned_bytes": peak.total, "measured_bytes": found})
                print(rows[-1], file=sys.stderr, flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown; the last column compares with answering with the original."""
    generate = rows[0]["measured_bytes"] or rows[0]["planned_bytes"]
    body = [
        [
            row["stage"],
            "" if row["ratio"] is None else row["ratio"],
            f"{row['planned_bytes'] / GIB:.2f} GiB",
            "-" if found is None else f"{found / GIB:.2f} GiB",
            "-" if found is None else f"{row['planned_bytes'] / found:.3f}",
            f"{(found or row['planned_bytes']) / generate:.2f}",
        ]
        for row in rows
        for found in [row["measured_bytes"]]
    ]
    header = ["stage", "ratio", "planned", "measured", "planned / measured", "share of inference"]
    return markdown(header, body)


def _limit(device: torch.device, cap: int) -> None:
    if device.type == "cpu":
        raise SystemExit(
            "error: --cap needs an accelerator, but the device is a CPU: leave it out."
        )
    module = torch.get_device_module(device)
    total = module.get_device_properties(device).total_memory
    module.set_per_process_memory_fraction(min(1.0, cap / total))


def main() -> None:
    """Parse the command line, measure, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--shape", choices=NAMES, default="llama-1b")
    parser.add_argument("--ratio", type=float, action="append")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--labels", type=int, default=64)
    parser.add_argument("--tiles", type=int, default=0)
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--cap", type=parse_size)
    for hidden in ("--stage", "--folder", "--case"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        case = Case(**json.loads(options.case))
        if options.cap:
            _limit(pick_device(case.device), options.cap)
        print(run_stage(case, options.stage, options.ratio[0], Path(options.folder)))
        return
    chosen = {entry.name: getattr(options, entry.name, None) for entry in fields(Case)}
    case = Case(**{**chosen, "checkpointing": not options.no_checkpointing})
    rows = measure_all(case, options.ratio or [0.2, 0.5], options.cap)
    print(table(rows))
    results = {**vars(case), "cap_bytes": options.cap, "stages": rows}
    print(save_results(f"memory-{case.shape}", results))


if __name__ == "__main__":
    main()

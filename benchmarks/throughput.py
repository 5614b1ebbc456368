"""Speed of LoRA training on an emulator, against direct LoRA on the original and the FLOP bound.

    python -m benchmarks.throughput [--model SOURCE ...] [--shape ROWSxTOKENS] [--ratios RATIO ...]

A model is a source as in params.yaml, or WIDTHxBLOCKS: a Llama of random weights. Every figure
comes from `emloc.finetune`, as `dvc repro` trains, on rows of random tokens of one length, half of
each to be learnt. Emulators get random factors, since speed does not depend on their values. All
models are timed in turns, in one run; a turn loads its model anew.

The bound is the ratio of the floating-point operations of one training step of the original and of
the emulator, counted by torch while the step runs (matrix products and attention). A share of the
bound of 100 % says that an operation takes as long on the emulator as on the original.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

import emloc.plan.tracking  # noqa: F401  # torch learns to count attention on a CPU
from benchmarks import calibration_memory
from benchmarks.common import in_turns, markdown, save_results
from benchmarks.construction import MODEL, MODEL_SHA256
from emloc.devices import pick_device, pick_dtype
from emloc.factors import rank_for
from emloc.families import Codec
from emloc.finetune import finetune
from emloc.lowrank import LowRankLinear, replace_linears
from emloc.models import load_model
from emloc.settings import PRECISIONS, LoraSettings, TrainSettings
from emloc.source import resolve_model
from emloc.targets import BLOCKS, select

WARM_UP = 2  # steps before the clock starts


@dataclass
class Clock:
    """Stands in for a codec, with rows of one length, and notes when each batch is asked for.

    Attributes:
        seconds: from the batch after the warm-up to the last one.
    """

    device: torch.device
    steps: int
    times: list[float] = field(default_factory=list)

    def collate(self, rows: Sequence[Mapping[str, Any]], *, side: str) -> dict[str, Tensor]:
        """A batch; nothing to pad."""
        if len(self.times) in (WARM_UP, WARM_UP + self.steps) and self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        self.times.append(time.perf_counter())
        batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}

    @property
    def seconds(self) -> float:
        """Mean seconds of a step."""
        return (self.times[WARM_UP + self.steps] - self.times[WARM_UP]) / self.steps


@dataclass(frozen=True)
class Bench:
    """Trainings of one model and its emulators, all on the same rows.

    Attributes:
        path: folder of the original.
        rows, tokens: of a batch.
        steps: to time in a turn.
    """

    path: Path
    rows: int
    tokens: int
    steps: int
    device: torch.device
    precision: str

    def model(self, ratio: float | None) -> PreTrainedModel:
        """The original (None), or an emulator of it with random factors."""
        dtype = pick_dtype(self.precision)
        model = load_model(self.path, dtype=dtype, device=self.device)
        if ratio is not None:
            linears = select(model, [BLOCKS], where="targets")
            ranks = {name: rank_for(ratio, *m.weight.shape) for name, m in linears.items()}
            del linears  # or the original's weights would stay
            replace_linears(model, ranks)
            for module in model.modules():
                if isinstance(module, LowRankLinear):
                    module.reset_parameters()
        return cast(PreTrainedModel, model)

    def train(self, ratio: float | None, steps: int, fused: bool = True) -> Clock:
        """LoRA on a freshly loaded model."""
        model = self.model(ratio)
        clock = Clock(self.device, steps - WARM_UP - 1)
        draw = torch.Generator().manual_seed(0)
        shape = (self.rows * (steps + 1), self.tokens)
        ids = torch.randint(model.config.get_text_config().vocab_size, shape, generator=draw)
        prompt = [-100] * (self.tokens // 2)
        rows = [{"input_ids": row, "labels": prompt + row[len(prompt) :]} for row in ids.tolist()]
        with tempfile.TemporaryDirectory(prefix="emloc-benchmark-") as folder:
            finetune(
                model,
                rows,
                [],
                codec=cast(Codec, clock),
                lora=LoraSettings(),
                settings=TrainSettings(
                    steps=steps,
                    batch_size=self.rows,
                    precision=self.precision,
                    save_steps=steps,
                    fused=fused,
                ),
                base_name="original",
                out=Path(folder) / "adapter",
                checkpoints=Path(folder) / "checkpoints",
                progress=False,
            )
        return clock

    def seconds(self, ratio: float | None) -> float:
        """Mean seconds of a step, once it is warm."""
        return self.train(ratio, self.steps + WARM_UP + 1).seconds

    def operations(self, ratio: float | None) -> int:
        """Floating-point operations of one step, without what `emloc.fused` pads."""
        with FlopCounterMode(display=False) as counter:
            self.train(ratio, 1, fused=False)
        return counter.get_total_flops()

    def result(self, name: str, ratios: Sequence[float], repeats: int) -> dict[str, Any]:
        """Count once, time in turns."""
        models: dict[str, float | None] = {"original": None} | {str(r): r for r in ratios}
        operations = {key: self.operations(ratio) for key, ratio in models.items()}
        works = {key: partial(self.seconds, ratio) for key, ratio in models.items()}
        took = in_turns(works, repeats=repeats)
        tokens = self.rows * self.tokens
        emulators = []
        for key, ratio in list(models.items())[1:]:
            bound = operations["original"] / operations[key]
            measured = took["original"] / took[key]
            emulators.append(
                {"ratio": ratio, "speedup": measured, "bound": bound, "share": measured / bound}
            )
        return {
            "model": name,
            "rows": self.rows,
            "tokens_per_row": self.tokens,
            "precision": self.precision,
            "device": self.device.type,
            "steps": self.steps,
            "repeats": repeats,
            "tokens_per_second": {key: tokens / value for key, value in took.items()},
            "operations_per_token": {key: value / tokens for key, value in operations.items()},
            "emulators": emulators,
        }


@contextlib.contextmanager
def folder_of(model: str) -> Iterator[Path]:
    """The checkpoint of a source, or one of random weights for WIDTHxBLOCKS."""
    width, _, blocks = model.partition("x")
    if width.isdecimal() and blocks.isdecimal():
        with tempfile.TemporaryDirectory(prefix="emloc-benchmark-") as name:
            calibration_memory.build(
                Path(name), calibration_memory.grouped(int(blocks), int(width))
            )
            yield Path(name)
    else:
        yield resolve_model(model, sha256=MODEL_SHA256 if model == MODEL else None)


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """A row for each emulator."""
    rows = []
    for result in results:
        speed = result["tokens_per_second"]
        for emulator in result["emulators"]:
            row = [result["model"].rpartition("/")[2], f"{emulator['ratio']:g}"]
            row += [f"{speed[key]:,.0f}" for key in ("original", str(emulator["ratio"]))]
            row += [f"{emulator[key]:.2f}" for key in ("speedup", "bound")]
            rows.append([*row, f"{emulator['share']:.0%}"])
    speeds = ["original, tokens/s", "emulator, tokens/s"]
    return markdown(["model", "ratio", *speeds, "times faster", "bound", "share"], rows)


def main() -> None:
    """Run everything, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", nargs="+", default=[MODEL, "2048x3"])
    parser.add_argument("--shape", default="8x128")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.25])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=PRECISIONS, help="bfloat16; on a CPU float32")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    device = pick_device(options.device)
    precision = options.precision or ("float32" if device.type == "cpu" else "bfloat16")
    rows, tokens = (int(number) for number in options.shape.split("x"))
    results = []
    for model in options.model:
        with folder_of(model) as path:
            bench = Bench(path, rows, tokens, options.steps, device, precision)
            results.append(bench.result(model, options.ratios, options.repeats))
    print(table(results))
    save_results("throughput", results)


if __name__ == "__main__":
    main()

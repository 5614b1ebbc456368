"""Peak memory of calibrating a checkpoint that is much bigger than one of its units.

    python -m benchmarks.calibration_memory
    python -m benchmarks.calibration_memory --shape 7b    # 14 GB on the disk, for some minutes

Builds a Llama checkpoint of random bfloat16 weights shard by shard, calibrates it in a fresh
process, and compares the peak of the anonymous resident memory with the checkpoint's size, beyond
what the interpreter and its libraries take. The checkpoint is deleted afterwards.

The shape `7b` is that of Llama 2 7B. Its first and its last block are factorized, so that all
blocks are streamed; the peak does not depend on how many are factorized.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import markdown, save_results
from emloc.files import read_json, write_json

MAX_RATIO = 0.5
SHARE_ALLOWED = 0.25  # of the checkpoint, beyond the interpreter
PEAK_ALLOWED_BYTES = 4 * 10**9  # in all, for any shape


@dataclass(frozen=True)
class Shape:
    """A Llama, and what it is calibrated with.

    Attributes:
        layers: number of blocks.
        width: of the hidden state.
        inner: width inside an MLP.
        heads, kv_heads: of the attention.
        vocabulary: number of tokens.
        samples, tokens: batches of one row, and tokens of a row.
        targets: regex of the layers that are factorized.
    """

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    samples: int
    tokens: int
    targets: str

    @property
    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            tie_word_embeddings=False,
            dtype="bfloat16",
        )


LLAMA_2_7B = Shape(32, 4096, 11008, 32, 32, 32000, 8, 64, r".*layers\.(0|31)\..*")


def grouped(layers: int, width: int) -> Shape:
    """A Llama of given depth and width, with grouped key and value heads; all of it factorized."""
    heads, kv_heads = width // 64, max(1, width // 256)
    return Shape(layers, width, 3 * width, heads, kv_heads, 8192, 32, 128, r".*layers\..*")


def build(folder: Path, shape: Shape) -> int:
    """Write the checkpoint, one shard a block, never whole in memory; return its bytes."""
    settings = shape.config
    settings.architectures = ["LlamaForCausalLM"]
    settings.save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(settings)
    shards: dict[str, list[str]] = {}
    for name in (name for name, _ in model.named_parameters()):
        parts = name.split(".")
        shards.setdefault(parts[2] if parts[1] == "layers" else "rest", []).append(name)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards.values(), start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {n: _random(model.get_parameter(n), generator) for n in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
    return total


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    if like.ndim == 1:
        return torch.ones(like.shape, dtype=torch.bfloat16)
    noise = torch.randn(like.shape, generator=generator)
    return noise.mul_(like.shape[1] ** -0.5).bfloat16()


def calibrate_and_measure(folder: Path, shape: Shape) -> dict[str, float]:
    """Calibrate in this process; anonymous memory before, and at its peak, in bytes; seconds."""
    from emloc.calibrate import calibrate
    from emloc.memory import anonymous_bytes, measure
    from emloc.models import open_model
    from emloc.targets import select

    baseline = anonymous_bytes()
    generator = torch.Generator().manual_seed(1)
    batches = []
    with measure("cpu") as cost:
        opened = open_model(folder, dtype=torch.bfloat16)
        for _ in range(shape.samples):
            ids = torch.randint(shape.vocabulary, (1, shape.tokens), generator=generator)
            batches.append({"input_ids": ids, "use_cache": False})
        calibrate(
            opened,
            batches,
            linears=select(opened.model, [shape.targets], where="targets"),
            max_ratio=MAX_RATIO,
            out=folder / "factors",
        )
    read = sum(opened.store.reads.values()) / len(dict(opened.model.named_parameters()))
    measured = {"baseline_bytes": baseline, "peak_bytes": cost.peak_bytes}
    return {**measured, "seconds": round(cost.seconds, 1), "share_of_weights_read": read}


def run(shape: Shape) -> dict[str, Any]:
    """Build, calibrate in a fresh process, delete; sizes in bytes, and the share of the two."""
    with torch.device("meta"):
        needed = sum(p.numel() * 2 for p in LlamaForCausalLM(shape.config).parameters())
    if shutil.disk_usage(tempfile.gettempdir()).free < 1.2 * needed:
        sys.exit(f"{tempfile.gettempdir()} has less than {1.2 * needed / 1e9:.0f} GB free")
    with tempfile.TemporaryDirectory(prefix="emloc-benchmark-") as name:
        folder = Path(name)
        size = build(folder, shape)
        write_json(folder / "shape.json", asdict(shape))
        command = [sys.executable, "-m", "benchmarks.calibration_memory", "--measure", name]
        root = Path(__file__).parents[1]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"calibration failed:\n{done.stderr}")
    measured = json.loads(done.stdout.splitlines()[-1])
    beyond = measured["peak_bytes"] - measured["baseline_bytes"]
    return {**asdict(shape), "checkpoint_bytes": size, **measured, "share": beyond / size}


def main() -> None:
    """Parse the command line, measure, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--shape", choices=["7b"], help="that of Llama 2 7B")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        shape = Shape(**read_json(options.measure / "shape.json"))
        print(json.dumps(calibrate_and_measure(options.measure, shape)))
        return
    shape = LLAMA_2_7B if options.shape else grouped(options.layers, options.width)
    result = run(shape)
    beyond = result["peak_bytes"] - result["baseline_bytes"]
    row = [f"Llama, {shape.layers} blocks of width {shape.width}, {shape.samples} × {shape.tokens}"]
    row[0] += " tokens"
    row += [f"{result['checkpoint_bytes'] / 2**20:.0f} MiB", f"{beyond / 2**20:.0f} MiB"]
    row += [f"{result['share']:.1%}"]
    print(markdown(["model", "checkpoint", "peak beyond the interpreter", "share"], [row]))
    save_results(f"calibration_memory_{options.shape}".removesuffix("_None"), result)
    if result["share"] >= SHARE_ALLOWED or result["peak_bytes"] >= PEAK_ALLOWED_BYTES:
        sys.exit(
            f"the peak is above {SHARE_ALLOWED:.0%} of the checkpoint or above "
            f"{PEAK_ALLOWED_BYTES / 1e9:.0f} GB"
        )


if __name__ == "__main__":
    main()

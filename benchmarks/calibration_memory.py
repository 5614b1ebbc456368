"""Peak memory of calibrating a checkpoint that is much bigger than one of its units.

    python -m benchmarks.calibration_memory

Builds a Llama checkpoint of random bfloat16 weights shard by shard, calibrates it in a fresh
process, and compares the peak of the anonymous resident memory beyond what the interpreter and its
libraries take with the checkpoint's size. The checkpoint is deleted afterwards.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import markdown, save_results
from emloc.files import write_json

SAMPLES, TOKENS, MAX_RATIO = 32, 128, 0.5
SHARE_ALLOWED = 0.25
VOCABULARY = 8192


def config(layers: int, width: int) -> LlamaConfig:
    """A Llama of given depth and width, with grouped key and value heads."""
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256),
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def build(folder: Path, layers: int, width: int) -> int:
    """Write the checkpoint, one shard a block, never whole in memory; return its bytes."""
    settings = config(layers, width)
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


def calibrate_and_measure(folder: Path) -> dict[str, int]:
    """Calibrate in this process; anonymous memory before, and at its peak, in bytes."""
    from emloc.calibrate import calibrate
    from emloc.memory import anonymous_bytes, measure
    from emloc.models import open_model
    from emloc.targets import select

    baseline = anonymous_bytes()
    generator = torch.Generator().manual_seed(1)
    batches = []
    with measure("cpu") as cost:
        opened = open_model(folder, dtype=torch.bfloat16)
        for _ in range(SAMPLES):
            ids = torch.randint(VOCABULARY, (1, TOKENS), generator=generator)
            batches.append({"input_ids": ids, "use_cache": False})
        calibrate(
            opened,
            batches,
            linears=select(opened.model, [r".*layers\..*"], where="targets"),
            max_ratio=MAX_RATIO,
            out=folder / "factors",
        )
    return {"baseline_bytes": baseline, "peak_bytes": cost.peak_bytes}


def run(layers: int, width: int) -> dict[str, Any]:
    """Build, calibrate in a fresh process, delete; sizes in bytes, and the share of the two."""
    with tempfile.TemporaryDirectory(prefix="emloc-benchmark-") as name:
        folder = Path(name)
        size = build(folder, layers, width)
        command = [sys.executable, "-m", "benchmarks.calibration_memory", "--measure", name]
        root = Path(__file__).parents[1]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"calibration failed:\n{done.stderr}")
    measured = json.loads(done.stdout.splitlines()[-1])
    beyond = measured["peak_bytes"] - measured["baseline_bytes"]
    sizes = {"layers": layers, "width": width, "samples": SAMPLES, "tokens_per_sample": TOKENS}
    return {**sizes, "checkpoint_bytes": size, **measured, "share": beyond / size}


def main() -> None:
    """Parse the command line, measure, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(calibrate_and_measure(options.measure)))
        return
    result = run(options.layers, options.width)
    beyond = result["peak_bytes"] - result["baseline_bytes"]
    row = [f"Llama, {options.layers} blocks of width {options.width}, {SAMPLES} × {TOKENS} tokens"]
    row += [f"{result['checkpoint_bytes'] / 2**20:.0f} MiB", f"{beyond / 2**20:.0f} MiB"]
    row += [f"{result['share']:.1%}"]
    print(markdown(["model", "checkpoint", "peak beyond the interpreter", "share"], [row]))
    save_results("calibration_memory", result)
    if result["share"] >= SHARE_ALLOWED:
        sys.exit(f"the peak is above {SHARE_ALLOWED:.0%} of the checkpoint")


if __name__ == "__main__":
    main()

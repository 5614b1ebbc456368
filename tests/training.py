"""Short trainings of tiny models, for the tests of what comes out of them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from emloc import optimize
from emloc.families.text import TextCodec
from emloc.finetune import finetune
from emloc.lowrank import EmlocConfig, LowRankLinear, replace_linears
from emloc.settings import LoraSettings, TrainSettings
from tests.tiny import tiny_model, tiny_tokenizer

Row = dict[str, list[int]]


def make_rows(count: int, seed: int = 0) -> list[Row]:
    """Rows of 5 to 30 tokens; the second half of each repeats its first token."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        length = draw.randint(5, 30)
        prompt = [draw.randint(3, 200) for _ in range(draw.randint(2, length - 2))]
        answer = [prompt[0]] * (length - len(prompt))
        labels = [-100] * len(prompt) + answer
        rows.append({"input_ids": prompt + answer, "labels": labels, "other": [1]})
    return rows


def train(model: PreTrainedModel, folder: Path, **changes: Any) -> dict[str, Any]:
    """A short training with sensible settings, the adapter in folder/adapter."""
    lora = changes.pop("lora", LoraSettings(r=4))
    rows, validation = changes.pop("rows", make_rows(12)), changes.pop("validation", [])
    base_name = changes.pop("base_name", "someone/original")
    codec = changes.pop("codec", None) or TextCodec(tiny_tokenizer())
    settings: dict[str, Any] = dict(steps=4, batch_size=4, learning_rate=1e-2, log_steps=1)
    return finetune(
        model,
        rows,
        validation,
        codec=codec,
        lora=lora,
        settings=TrainSettings(**{**settings, **changes}),
        base_name=base_name,
        out=folder / "adapter",
        checkpoints=folder / "checkpoints",
        progress=False,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def as_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "adapter").iterdir())}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[5, 9, 17, 33]])).logits


def save_emulator(folder: Path) -> Path:
    """A tiny Llama with some low-rank layers, saved as an emulator checkpoint."""
    model = tiny_model("llama")
    ranks = {n: 6 for n, m in model.named_modules() if isinstance(m, nn.Linear) and "mlp" in n}
    replace_linears(model, ranks)
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            module.reset_parameters()
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    config["quantization_config"] = EmlocConfig(
        ranks=ranks, base_model="someone/original"
    ).to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def hide_package(patch: pytest.MonkeyPatch, name: str) -> None:
    """Let an optional package look as if it was not installed."""
    found = optimize.find_spec
    patch.setattr(
        optimize, "find_spec", lambda package: None if package == name else found(package)
    )


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and lose much of the time on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

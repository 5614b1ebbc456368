"""What calibration cannot do is refused by name, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from emloc.models import open_model
from emloc.weights import OpenedModel
from tests.opened import open_module, open_tiny
from tests.test_calibrate import run
from tests.test_streaming import Repeated, batch_threads
from tests.tiny import save_tiny


def damaged(folder: Path, key: str) -> OpenedModel:
    save_tiny("llama", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[key].view(-1)[0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return open_model(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model.layers.1.self_attn.q_proj", r"weights of model\.layers\.1\.self_attn\.q_proj are"),
        ("model.layers.1.mlp.down_proj", r"weights of model\.layers\.1\.mlp\.down_proj are not"),
        ("model.layers.0.input_layernorm", r"activations into model\.layers\.0\.self_attn\.q_proj"),
        ("model.embed_tokens", r"activations into model\.layers\.0\.self_attn\.q_proj are not"),
    ],
)
@pytest.mark.parametrize("samples", [True, False])
def test_nan_names_the_module_and_leaves_nothing(
    key: str, message: str, samples: bool, tmp_path: Path
) -> None:
    opened = damaged(tmp_path / "model", f"{key}.weight")
    batches = [{"input_ids": torch.arange(259)[None]}] if samples else []
    if not samples and "proj" not in key:
        pytest.skip("what lies outside the linears is not read without samples")
    with pytest.raises(ValueError, match=message):
        run(opened, tmp_path / "out", batches)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not batch_threads()


class Branches(nn.Module):
    """Uses one of its branches only, and inside a block one of its linears only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.idle = nn.Linear(4, 6), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Branches()])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x)


@pytest.mark.parametrize("in_list", [True, False], ids=["same unit", "unit of its own"])
def test_a_layer_that_never_ran_is_named(in_list: bool, tmp_path: Path) -> None:
    opened = open_module(Listed() if in_list else Branches(), tmp_path / "model")
    with pytest.raises(ValueError, match=r"idle was not used by any calibration sample"):
        run(opened, tmp_path / "out", [{"x": torch.randn(3, 4)}], patterns=[".*used", ".*idle"])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("order", [[0, 1, 0], [1, 0, 1, 0]])
def test_a_layer_that_runs_again_after_its_unit_was_done_is_refused(
    order: list[int], tmp_path: Path
) -> None:
    opened = open_module(Repeated(order), tmp_path / "model")
    with pytest.raises(ValueError, match=r"blocks\.\d runs more than once in one forward pass"):
        run(opened, tmp_path / "out", [{"x": torch.randn(3, 6)}], patterns=[r"blocks\..*"])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not batch_threads()


def test_a_layer_that_runs_twice_in_a_row_counts_both_times(tmp_path: Path) -> None:
    opened = open_module(Repeated([0, 0, 1]), tmp_path / "model")
    batch = {"x": torch.randn(3, 6)}
    factors = run(opened, tmp_path / "out", [batch], patterns=[r"blocks\..*"])
    assert {name: entry["tokens"] for name, entry in factors.modules.items()} == {
        "blocks.0": 6,
        "blocks.1": 3,
    }


def test_a_cut_above_what_was_calibrated_is_refused(tmp_path: Path) -> None:
    factors = run(open_tiny("llama", tmp_path / "model"), tmp_path / "out", max_ratio=0.5)
    key = "model.layers.0.self_attn.q_proj"
    assert factors.modules[key]["rank"] == 8
    assert [part.shape for part in factors.cut(key, 5)] == [(32, 5), (5, 32)]
    with pytest.raises(ValueError, match=f"{key} is asked for at rank 9.*raise calibrate.max"):
        factors.cut(key, 9)


@pytest.mark.parametrize("max_ratio", [0.0, 1.0, 1.5])
def test_max_ratio_outside_its_range_leaves_nothing(max_ratio: float, tmp_path: Path) -> None:
    opened = open_tiny("llama", tmp_path / "model")
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        run(opened, tmp_path / "out", max_ratio=max_ratio)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

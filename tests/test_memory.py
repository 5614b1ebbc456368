"""Measured cost is what a block really took."""

from __future__ import annotations

import time

import pytest
import torch

from emloc.memory import anonymous_bytes, measure, trim_freed_memory

MIB = 2**20


def test_peak_covers_memory_that_is_gone_at_the_end() -> None:
    before = anonymous_bytes()
    with measure("cpu") as cost:
        big = torch.ones(64 * MIB // 4)
        time.sleep(0.1)
        del big
        time.sleep(0.1)
    assert cost.device == "cpu"
    assert cost.seconds >= 0.2
    assert cost.peak_bytes >= before + 56 * MIB


def test_small_block_costs_little() -> None:
    """The counterpart: the figure above is not there by chance."""
    before = anonymous_bytes()
    with measure("cpu") as cost:
        time.sleep(0.1)
    assert 0 < cost.peak_bytes < before + 16 * MIB


def test_cost_is_filled_in_after_an_error() -> None:
    with pytest.raises(KeyError), measure("cpu") as cost:
        raise KeyError
    assert cost.peak_bytes > 0
    assert cost.seconds > 0


def test_mapped_files_do_not_count(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from safetensors import safe_open
    from safetensors.torch import save_file

    save_file({"x": torch.ones(32 * MIB // 4)}, tmp_path / "x.safetensors")
    before = anonymous_bytes()
    with safe_open(tmp_path / "x.safetensors", framework="pt") as handle:
        mapped = handle.get_tensor("x")
        assert float(mapped.sum()) == mapped.numel()
        assert anonymous_bytes() < before + 16 * MIB
        copied = mapped.clone()
        assert anonymous_bytes() > before + 24 * MIB
        assert copied.shape == mapped.shape


def test_gaps_between_tensors_go_back_to_the_system() -> None:
    """Blocks too small to be mapped on their own; every other one stays."""
    blocks = [torch.ones(64 * 1024 // 4) for _ in range(1600)]  # 100 MiB
    full = anonymous_bytes()
    del blocks[::2]
    trim_freed_memory()
    assert anonymous_bytes() < full - 40 * MIB
    assert all(float(block[0]) == 1.0 for block in blocks)

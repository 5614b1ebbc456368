"""What an adapter's directions see is the same streamed as in a plain forward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from emloc.models import load_model
from emloc.moments import unpadded
from emloc.projections import project
from tests.opened import open_tiny, unequal_batches
from tests.training import one_thread

__all__ = ["one_thread"]
NAMES = [
    f"model.layers.{n}.{part}" for n in (0, 1) for part in ("self_attn.q_proj", "mlp.down_proj")
]


@pytest.mark.parametrize("side", ["right", "left"])
def test_sums_are_those_of_a_plain_forward(side: str, tmp_path: Path) -> None:
    opened = open_tiny("llama", tmp_path / "model")
    torch.manual_seed(0)
    widths = {name: opened.model.get_submodule(name).in_features for name in NAMES}
    bases = {name: torch.linalg.qr(torch.randn(width, 3)).Q for name, width in widths.items()}
    batches = unequal_batches(side=side)
    found = project(opened, [{**batch, "use_cache": False} for batch in batches], bases)

    model = load_model(tmp_path / "model", dtype=torch.float32, device="cpu")
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in NAMES}
    masks: list[torch.Tensor] = []
    for name in NAMES:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(unpadded(args[0], masks[-1]))
        )
    with torch.no_grad():
        for batch in batches:
            masks.append(batch["attention_mask"])
            model(**batch)
    for name, basis in bases.items():
        x = torch.cat(seen[name])
        assert len(x) == sum(int(mask.sum()) for mask in masks)
        torch.testing.assert_close(found[name], basis.T @ x.T @ x, atol=1e-4, rtol=1e-4)


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    opened = open_tiny("llama", tmp_path / "model")
    basis = torch.full((opened.model.get_submodule(NAMES[0]).in_features, 1), float("inf"))
    with pytest.raises(ValueError, match=r"activations into model\.layers\.0\..* are not finite"):
        project(opened, unequal_batches(), {NAMES[0]: basis})

"""The correction holds one layer at a time, and of a big weight a few rows in float32."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import emloc.correct as correct
from emloc.correct import correct_adapter, correct_layer
from emloc.weights import OpenedModel, WeightStore
from tests.built import build
from tests.test_correct_folder import opened, train_raw

OUT, IN, RANK, R = 96, 160, 16, 4  # o, i, k, r


class Largest(TorchDispatchMode):
    """The largest float32 tensor that any operation made, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.dtype == torch.float32:
            self.bytes = max(self.bytes, made.nbytes)
        return made


@pytest.mark.parametrize("rows", [1, 7, OUT])
def test_a_weight_is_never_copied_whole_to_float32(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    a, b, weight = random(R, IN), random(OUT, R), random(OUT, IN)
    emulated = random(OUT, RANK), random(RANK, IN)

    def corrected() -> tuple[int, list[Tensor]]:
        with Largest() as largest:
            done = correct_layer(a, b, weight, emulated, scaling=2.0, limit=3.0)
        return largest.bytes, list(done[:2])

    whole, expected = corrected()
    assert whole == 4 * OUT * IN  # small as it is, it is one piece
    monkeypatch.setattr(correct, "_CHUNK_BYTES", 4 * IN * rows)
    largest, pieces = corrected()
    assert largest == max(4 * IN * rows, 4 * IN * R)  # A's basis is the other large one
    torch.testing.assert_close(pieces, expected, rtol=1e-5, atol=1e-5)  # measured: 5e-7


class Living(WeightStore):
    """Knows which layers' tensors are in use whenever something is read."""

    def __init__(self, store: WeightStore, live: list[tuple[str, weakref.ref[Tensor]]]) -> None:
        super().__init__(store.locations)
        self.live, self.together = live, set[tuple[str, str]]()

    def read(self, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        names = list(names)
        layer = names[0].rpartition(".")[0]
        self.together |= {(layer, name) for name, tensor in self.live if tensor() is not None}
        tensors = super().read(names, device)
        self.live.extend((layer, weakref.ref(tensor)) for tensor in tensors.values())
        return tensors


def test_no_two_layers_are_in_memory_together(tmp_path: Path) -> None:
    built = build("llama", tmp_path / "built")
    raw = train_raw(built, tmp_path / "raw")
    live: list[tuple[str, weakref.ref[Tensor]]] = []
    models = [OpenedModel(one.model, Living(one.store, live)) for one in opened(built)]
    report = correct_adapter(raw, *models, out=tmp_path / "corrected")
    assert len({name for name, _ in live}) == len(report) == 14
    together = {pair for model in models for pair in model.store.together}  # type: ignore[attr-defined]
    assert together == {(name, name) for name, _ in live}  # a layer's W and its factors

"""The benchmark of memory: shapes of published models, random weights, planned and measured."""

from __future__ import annotations

import pytest
import torch

from benchmarks import memory, shapes
from emloc.plan.tracking import bytes_of
from emloc.sizes import GIB

BILLIONS = {
    "smollm2-135m": 0.1345,
    "llama-1b": 1.236,
    "internvl2_5-8b": 8.075,
    "internvl2_5-26b": 25.51,
    "internvl2_5-38b": 38.39,
    "flux-dev": 11.90,
}


@pytest.mark.parametrize("name", BILLIONS)
def test_a_shape_has_as_many_parameters_as_the_published_model(name: str) -> None:
    model = shapes.subject_of(name).build(torch.bfloat16)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e9 == pytest.approx(BILLIONS[name], rel=1e-3)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_random_weights_are_there_and_shared_ones_once() -> None:
    subject = shapes.subject_of("tiny")
    store = shapes.RandomStore(subject.build(torch.float32))
    name = next(iter(store.locations))
    assert store.read([name])[name].std() > 0 and store.reads[name] == 1
    model = shapes.random_model(subject.build(torch.float32), torch.device("cpu"))
    assert model(input_ids=torch.tensor([[1, 2]])).logits.isfinite().all()
    assert bytes_of(model) == bytes_of(subject.build(torch.float32))


@pytest.mark.slow
def test_every_stage_is_planned_and_measured() -> None:
    case = memory.Case("tiny", "cpu", "float32", 1, 64, 16, 0, True)
    rows = memory.measure_all(case, [0.2, 0.5], None)
    assert [row["stage"] for row in rows] == [
        "generate", "direct", "calibrate", "train", "train", "correct", "correct"
    ]  # fmt: skip
    assert all(row["planned_bytes"] > 0 for row in rows)
    assert all(row["measured_bytes"] < GIB for row in rows)
    assert memory.table(rows).count("\n") == 8

"""A streamed forward equals a plain one, reads every weight once, and leaves nothing behind."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emloc.models import open_model
from emloc.streaming import Stream, find_units
from emloc.weights import OpenedModel
from tests.opened import open_module, open_tiny, unequal_batches
from tests.tiny import NAMES, save_tiny, tiny_model

DENSE = [name for name in NAMES if name != "mixtral"]


def inputs(**options: Any) -> list[dict[str, Any]]:
    return [{**batch, "use_cache": False} for batch in unequal_batches(**options)]


def streamed(opened: OpenedModel, batches: list[dict[str, Any]], **options: Any) -> dict[int, Any]:
    outputs: dict[int, Any] = {}
    Stream(opened, "cpu").run(batches, on_output=outputs.__setitem__, **options)
    return outputs


def batch_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("batch-")]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", DENSE)
def test_outputs_equal_a_plain_forward_s(name: str, side: str, tmp_path: Path) -> None:
    plain = tiny_model(name)
    batches = inputs(side=side)
    outputs = streamed(open_tiny(name, tmp_path), batches)
    assert sorted(outputs) == [0, 1]
    for index, batch in enumerate(batches):
        with torch.no_grad():
            expected = plain(**batch).logits
        torch.testing.assert_close(outputs[index].logits, expected, rtol=0, atol=0)  # bit for bit
    assert not torch.equal(outputs[0].logits[0], outputs[0].logits[1])  # not all alike
    assert not batch_threads()


@pytest.mark.parametrize("name", DENSE)
def test_each_weight_is_read_once_however_many_batches(name: str, tmp_path: Path) -> None:
    opened = open_tiny(name, tmp_path)
    streamed(opened, inputs(lengths=((5,), (6, 2), (3,), (4,))))
    tied = set(getattr(opened.model, "all_tied_weights_keys", {}))
    parameters = {name for name, _ in opened.model.named_parameters(remove_duplicate=False)}
    # A tied head is a second place that loads the embedding's weight, once too.
    assert set(opened.store.reads) == parameters | tied
    assert set(opened.store.reads.values()) == {1}
    assert bool(tied) == (name in ("llama-tied", "gemma3", "gpt2"))


def test_a_sharded_checkpoint_streams_alike(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    sharded = streamed(open_model(tmp_path / "shards", dtype=torch.float32), inputs())
    whole = streamed(open_tiny("llama", tmp_path / "one"), inputs())
    torch.testing.assert_close(sharded[1].logits, whole[1].logits, rtol=0, atol=0)


def test_until_stops_without_reading_the_rest(tmp_path: Path) -> None:
    opened = open_tiny("llama", tmp_path, num_hidden_layers=4)
    seen: list[str] = []
    outputs = streamed(
        opened, inputs(), until={"model.layers.1"}, on_unit=lambda name, _: seen.append(name)
    )
    assert seen == ["model.embed_tokens", "model.layers.0", "model.layers.1"]
    assert not outputs
    assert not [name for name in opened.store.reads if "layers.2" in name or "lm_head" in name]
    assert not batch_threads()


def test_only_one_unit_is_in_memory(tmp_path: Path) -> None:
    opened = open_tiny("llama", tmp_path, num_hidden_layers=3)
    stream = Stream(opened, "cpu")
    checked: set[str] = set()

    def check(unit: str) -> None:
        for other, module in stream.units.items():
            devices = {parameter.device.type for parameter in module.parameters()}
            assert devices == ({"cpu"} if other == unit else {"meta"}), (unit, other)
        checked.add(unit)

    for name, unit in stream.units.items():
        unit.register_forward_hook(lambda *_, name=name: check(name))
    stream.run(inputs(), on_unit=lambda name, _: check(name))
    assert checked == set(stream.units)
    assert {p.device.type for p in opened.model.parameters()} == {"meta"}


@pytest.mark.parametrize("place", ["model.layers.1.mlp", "model.norm"])
def test_an_error_inside_a_forward_reaches_the_caller(place: str, tmp_path: Path) -> None:
    opened = open_tiny("llama", tmp_path)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError("from the forward")

    handle = opened.model.get_submodule(place).register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError, match="from the forward"):
        streamed(opened, inputs())
    assert not batch_threads()
    assert {p.device.type for p in opened.model.parameters()} == {"meta"}
    handle.remove()
    assert sorted(streamed(opened, inputs())) == [0, 1]  # the model can be used again


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_caller_s_function_ends_the_threads(
    error: type[BaseException], tmp_path: Path
) -> None:
    def fail(name: str, _: nn.Module) -> None:
        if name == "model.layers.1":
            raise error

    with pytest.raises(error):
        streamed(open_tiny("llama", tmp_path), inputs(), on_unit=fail)
    assert not batch_threads()


def test_calling_the_model_directly_says_what_to_do(tmp_path: Path) -> None:
    stream = Stream(open_tiny("llama", tmp_path), "cpu")
    with pytest.raises(RuntimeError, match="no batch is running"):
        _ = stream.current
    with pytest.raises(KeyError, match="nowhere"):
        Stream(open_module(Repeated([0]), tmp_path), "cpu").unit_of("nowhere")


class Repeated(nn.Module):
    """Blocks that are run in a given order, some of them more than once."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(max(order) + 1))
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for place in self.order:
            x = x + self.blocks[place](x).tanh()
        return x


@pytest.mark.parametrize("order", [[0, 0], [0, 1, 0], [0, 1, 0, 1, 0], [1, 0]])
def test_a_unit_that_runs_twice_gives_the_same_output(order: list[int], tmp_path: Path) -> None:
    module = Repeated(order)
    batches = [{"x": torch.randn(3, 6)} for _ in range(3)]
    with torch.no_grad():
        expected = [module(**batch) for batch in batches]
    outputs = streamed(open_module(module, tmp_path), batches)
    torch.testing.assert_close([outputs[n] for n in range(3)], expected, rtol=0, atol=0)


class ClassToken(nn.Module):
    """A container with a parameter and a buffer of its own, besides its blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.token = nn.Parameter(torch.randn(4))
        self.blocks = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        return x if skip else self.blocks(x + self.token)


def test_a_container_s_own_parameter_stays_and_unused_units_are_not_read(tmp_path: Path) -> None:
    module = ClassToken()
    x = torch.randn(2, 4)
    with torch.no_grad():
        expected = module(x)
    opened = open_module(module, tmp_path)
    assert list(find_units(module)) == ["", "blocks.0", "blocks.2", "unused"]
    outputs = streamed(opened, [{"x": x}, {"x": x, "skip": True}])
    torch.testing.assert_close(outputs, {0: expected, 1: x}, rtol=0, atol=0)
    assert opened.store.reads["token"] == 1
    assert "unused.weight" not in opened.store.reads


def test_the_batch_that_runs_is_known_to_hooks(tmp_path: Path) -> None:
    opened = open_module(Repeated([0, 1]), tmp_path)
    stream = Stream(opened, "cpu")
    seen: list[tuple[int, float]] = []

    def note(_: nn.Module, args: tuple[Tensor]) -> None:
        seen.append((stream.current, float(args[0][0, 0])))

    opened.model.first.register_forward_pre_hook(note)
    stream.run([{"x": torch.full((1, 6), float(n))} for n in range(3)])
    assert seen == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_visit_loads_one_unit_after_the_other(tmp_path: Path) -> None:
    opened = open_tiny("llama", tmp_path)
    sums: dict[str, float] = {}

    def add(name: str, unit: nn.Module) -> None:
        sums[name] = sum(float(p.double().sum()) for p in unit.parameters())

    Stream(opened, "cpu").visit(["model.layers.1", "lm_head"], add)
    plain = tiny_model("llama")
    for name, total in sums.items():
        expected = sum(
            float(p.detach().double().sum()) for p in plain.get_submodule(name).parameters()
        )
        assert total == pytest.approx(expected, rel=1e-12)
    assert {p.device.type for p in opened.model.parameters()} == {"meta"}


def test_mixture_of_experts_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="MixtralForCausalLM.*use a dense model"):
        open_tiny("mixtral", tmp_path)

"""Emulators are native checkpoints that hold exactly their factors and the untouched rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from emloc.emulator import cut, plan_ranks, table
from emloc.files import read_json, sha256, write_json
from emloc.lowrank import LowRankLinear
from emloc.models import load_model, open_model
from tests.built import BLOCKED, Built, build, python
from tests.opened import unequal_batches
from tests.test_calibrate import unpadded_inputs
from tests.tiny import save_tiny, tiny_model

NAMES = ("llama", "gpt-neox", "gemma3")  # untied; a head renamed on disk; tied

LOAD = """
import json, sys, torch, emloc
from transformers import AutoModelForCausalLM
from safetensors.torch import save_file
for job in json.load(open(sys.argv[1])):
    kwargs = dict(job["kwargs"])
    if "dtype" in kwargs:
        kwargs["dtype"] = getattr(torch, kwargs["dtype"])
    model = AutoModelForCausalLM.from_pretrained(job["folder"], **kwargs)
    state = {key: value.clone().contiguous() for key, value in model.state_dict().items()}
    save_file(state, job["out"])
"""

LOAD_BLOCKED = (
    BLOCKED
    + """
import torch
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1])
print("loaded")
"""
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    """One emulator a name; and "shards", llama's in small shards."""
    all_built = {name: build(name, tmp_path_factory.mktemp(name)) for name in NAMES}
    all_built["shards"] = build("llama", tmp_path_factory.mktemp("shards"), max_shard_size="20KB")
    return all_built


@pytest.fixture(scope="module")
def loaded(
    built: dict[str, Built], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Tensor]]:
    """State of each emulator as one fresh process, which only imports emloc, loads it."""
    folder = tmp_path_factory.mktemp("loaded")
    jobs = {name: {"folder": str(built[name].emulator), "kwargs": {}} for name in built}
    llama = str(built["llama"].emulator)
    for variant in ({"dtype": "bfloat16"}, {"device_map": "cpu"}, {"device_map": "auto"}):
        jobs[next(iter(variant.values()))] = {"folder": llama, "kwargs": variant}
    for name, job in jobs.items():
        job["out"] = str(folder / f"{name}.safetensors")
    write_json(folder / "jobs.json", list(jobs.values()))
    done = python(LOAD, str(folder / "jobs.json"))
    assert done.returncode == 0, done.stderr
    return {name: load_file(str(job["out"])) for name, job in jobs.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_process_loads_the_factors_and_the_untouched_rest(
    name: str, built: dict[str, Built], loaded: dict[str, dict[str, Tensor]]
) -> None:
    one, state = built[name], loaded[name]
    original = tiny_model(name).state_dict()
    replaced = set()
    for layer in one.summary["layers"]:
        key = layer["name"]
        outer, inner = one.factors.cut(key, layer["rank"])
        torch.testing.assert_close(state[f"{key}.weight"], outer, rtol=0, atol=0)
        torch.testing.assert_close(state[f"{key}.weight_in"], inner, rtol=0, atol=0)
        replaced |= {f"{key}.weight", f"{key}.weight_in"}
    assert len(replaced) == 2 * len(one.factors.modules) > 0
    assert set(state) - replaced == set(original) - replaced
    for key in set(state) - replaced:
        torch.testing.assert_close(state[key], original[key], rtol=0, atol=0)


@pytest.mark.parametrize("variant", ["cpu", "auto", "shards"])
def test_device_maps_and_shards_load_the_same(
    variant: str, loaded: dict[str, dict[str, Tensor]]
) -> None:
    torch.testing.assert_close(loaded[variant], loaded["llama"], rtol=0, atol=0)


def test_dtype_is_that_which_was_asked_for(loaded: dict[str, dict[str, Tensor]]) -> None:
    rounded = {key: value.bfloat16() for key, value in loaded["llama"].items()}
    torch.testing.assert_close(loaded["bfloat16"], rounded, rtol=0, atol=0)


def test_shards_are_many_and_indexed(built: dict[str, Built]) -> None:
    files = sorted(path.name for path in built["shards"].emulator.glob("*.safetensors"))
    assert len(files) > 3
    index = read_json(built["shards"].emulator / "model.safetensors.index.json")
    assert sorted(set(index["weight_map"].values())) == files
    assert not (built["llama"].emulator / "model.safetensors.index.json").exists()


def test_without_emloc_loading_fails_loudly(built: dict[str, Built]) -> None:
    fine = python(LOAD_BLOCKED, str(built["llama"].original))
    assert fine.stdout.endswith("loaded\n"), fine.stderr  # the original does load there
    done = python(LOAD_BLOCKED, str(built["llama"].emulator))
    assert done.returncode != 0
    assert "loaded" not in done.stdout
    assert "the block does not work" not in done.stderr
    assert "mismatch" in done.stderr or "emloc" in done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_emulator_can_be_saved_and_loaded_again(
    name: str, built: dict[str, Built], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(built[name].emulator)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert again.config.quantization_config.ranks == model.config.quantization_config.ranks
    assert isinstance(again.get_submodule(next(iter(built[name].factors.modules))), LowRankLinear)


@pytest.mark.parametrize("name", NAMES)
def test_tied_heads_stay_tied(name: str, built: dict[str, Built]) -> None:
    model = AutoModelForCausalLM.from_pretrained(built[name].emulator)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (embedding.weight is head.weight) == (name == "gemma3")


@pytest.mark.parametrize("name", NAMES)
def test_the_emulator_answers_otherwise_than_the_original(
    name: str, built: dict[str, Built]
) -> None:
    batch = unequal_batches()[0]
    with torch.no_grad():
        emulated = load_model(built[name].emulator, dtype=torch.float32, device="cpu")(**batch)
        original = tiny_model(name)(**batch)
    assert emulated.logits.isfinite().all()
    assert (emulated.logits - original.logits).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_predicted_loss_is_the_measured_one(name: str, built: dict[str, Built]) -> None:
    model = tiny_model(name, dtype=torch.float64)
    emulator = load_model(built[name].emulator, dtype=torch.float64, device="cpu")
    inputs = unpadded_inputs(model, unequal_batches())
    for layer in built[name].summary["layers"]:
        x, key = inputs[layer["name"]], layer["name"]
        weight = model.get_submodule(key).weight.detach()
        low = emulator.get_submodule(key)
        assert isinstance(low, LowRankLinear)
        gap = weight - (low.weight @ low.weight_in).detach()
        measured = float((x @ gap.T).square().sum() / (x @ weight.T).square().sum())
        # float32 sums; measured 5e-7 apart
        assert layer["loss"] == pytest.approx(measured, rel=1e-5), key
        assert layer["loss"] > 1e-4  # the cut does cost something


def tensor_bytes(folder: Path) -> tuple[int, int]:
    """Bytes and numbers in all tensors of a checkpoint's files."""
    size = count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():
                tensor = handle.get_tensor(key)
                size, count = size + tensor.nbytes, count + tensor.numel()
    return size, count


@pytest.mark.parametrize("name", [*NAMES, "shards"])
def test_reported_sizes_are_those_of_the_files(name: str, built: dict[str, Built]) -> None:
    one = built[name]
    for kind, folder in (("emulator", one.emulator), ("original", one.original)):
        expected = (one.summary[f"{kind}_bytes"], one.summary[f"{kind}_parameters"])
        assert tensor_bytes(folder) == expected
    assert one.summary["emulator_bytes"] < one.summary["original_bytes"]
    for layer in one.summary["layers"]:
        assert layer["kept"] == layer["rank"] * (layer["out_features"] + layer["in_features"])
        assert (
            layer["kept"]
            <= 0.5 * layer["parameters"]
            == 0.5 * layer["out_features"] * (layer["in_features"])
        )


def test_two_builds_at_two_places_give_the_same_bytes(
    built: dict[str, Built], tmp_path: Path
) -> None:
    again = build("llama", tmp_path / "elsewhere")
    first, second = (
        {path.name: sha256(path) for path in folder.iterdir()}
        for folder in (built["llama"].emulator, again.emulator)
    )
    assert first == second
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(first)
    assert str(tmp_path) not in (again.emulator / "config.json").read_text()


def test_layers_without_a_target_stay_whole(tmp_path: Path) -> None:
    targets: dict[str, float | str] = {r".*\.0\.mlp\..*": 0.25, r".*\.0\..*": "ratio"}
    one = build("llama", tmp_path, targets=targets, dtype=torch.bfloat16)
    model = load_model(one.emulator, dtype=torch.float32, device="cpu")
    low = {name for name, m in model.named_modules() if isinstance(m, LowRankLinear)}
    assert len(low) == 7
    assert all(".0." in name for name in low)
    ratios = {layer["name"]: layer["ratio"] for layer in one.summary["layers"]}
    assert ratios["model.layers.0.mlp.up_proj"] == 0.25
    assert ratios["model.layers.0.self_attn.o_proj"] == 0.5
    stored = load_file(one.emulator / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert stored["model.layers.1.mlp.up_proj.weight"].dtype == torch.float32


def test_a_quantised_original_is_refused(built: dict[str, Built], tmp_path: Path) -> None:
    opened = open_model(save_tiny("llama", tmp_path / "original"), dtype=torch.float32)
    config = read_json(tmp_path / "original" / "config.json")
    config["quantization_config"] = {"quant_method": "gptq"}
    write_json(tmp_path / "original" / "config.json", config)
    with pytest.raises(ValueError, match=r"quantised already \(method 'gptq'\)"):
        cut(tmp_path / "original", opened, built["llama"].factors, [], out=tmp_path / "e",
            base_name="x")  # fmt: skip
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("ratio", "message"),
    [(0.81, "was calibrated up to 0.8: raise calibrate.max_ratio"), (1.2, "between 0 and 1")],
)
def test_ratio_out_of_range_is_refused(ratio: float, message: str, built: dict[str, Built]) -> None:
    name = "model.layers.0.self_attn.q_proj"
    with pytest.raises(ValueError, match=message):
        plan_ranks(built["llama"].factors, {name: ratio})
    assert plan_ranks(built["llama"].factors, {name: 0.8})[0].rank == 12


def test_failure_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    one = build("llama", tmp_path)
    opened = open_model(one.original, dtype=torch.float32)
    plan = plan_ranks(one.factors, dict.fromkeys(one.factors.modules, 0.3))
    (tmp_path / "f" / "00001.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        cut(one.original, opened, one.factors, plan, out=tmp_path / "e", base_name="x")
    assert {path.name for path in tmp_path.iterdir()} == {"original", "f", "emulator"}


def test_table_has_a_line_for_each_layer(built: dict[str, Built]) -> None:
    plan = plan_ranks(built["llama"].factors, dict.fromkeys(built["llama"].factors.modules, 0.3))
    lines = table(plan).splitlines()
    assert len(lines) == 1 + len(plan) == 15
    assert all(layer.name in line for layer, line in zip(plan, lines[1:], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_lora_attaches_and_learns_under_gradient_checkpointing(
    name: str, built: dict[str, Built]
) -> None:
    torch.manual_seed(0)
    emulator = load_model(built[name].emulator, dtype=torch.float32, device="cpu")
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(emulator, config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    lora = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert len(lora) == 2 * len(built[name].factors.modules)
    assert all("lora_" in key for key in lora)
    batch = unequal_batches()[0]
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(lora.values(), lr=3e-3)
    losses = []
    for step in range(6):
        optimizer.zero_grad()
        loss = model(**batch, labels=labels, use_cache=False).loss
        loss.backward()
        if step == 1:  # at first B is zero, and so is the gradient of A
            assert all(p.grad is not None and bool(p.grad.any()) for p in lora.values())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05


def test_config_can_be_written_as_json(built: dict[str, Built]) -> None:
    model = AutoModelForCausalLM.from_pretrained(built["llama"].emulator)
    settings = json.loads(model.config.to_json_string())["quantization_config"]
    assert settings["quant_method"] == "emloc"
    assert settings["base_model"] == "org/original"
    assert len(settings["ranks"]) == 14

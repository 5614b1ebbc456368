"""Training a LoRA: the right loss, the right adapter, and plain words for bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from emloc.lowrank import LowRankLinear
from emloc.settings import LoraSettings, TrainSettings
from emloc.trainer import EpochOrder
from tests.tiny import NAMES, tiny_model
from tests.training import logits, make_rows, one_thread, save_emulator, train, weights

__all__ = ["one_thread"]


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_learns_and_its_adapter_loads_with_plain_peft(
    name: str, tmp_path: Path
) -> None:
    model = tiny_model(name)
    result = train(model, tmp_path, steps=30, base_name=f"someone/{name}")
    losses = [row["loss"] for row in result["history"]]
    assert [row["step"] for row in result["history"]] == list(range(1, 31))
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])  # measured: 0.27 to 0.46
    loaded = PeftModel.from_pretrained(tiny_model(name), tmp_path / "adapter")
    assert loaded.peft_config["default"].base_model_name_or_path == f"someone/{name}"
    torch.testing.assert_close(logits(loaded), logits(model))
    assert not torch.allclose(logits(loaded), logits(tiny_model(name)), atol=1e-2)
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert not (tmp_path / "checkpoints").exists()


def test_native_emulator_trains_and_its_adapter_fits_the_original(tmp_path: Path) -> None:
    folder = save_emulator(tmp_path / "emulator")
    emulator = AutoModelForCausalLM.from_pretrained(folder)
    assert emulator.is_quantized and isinstance(emulator.model.layers[0].mlp.up_proj, LowRankLinear)
    before = {n: t.clone() for n, t in emulator.state_dict().items()}
    result = train(emulator, tmp_path, steps=20, gradient_checkpointing=True)
    assert result["history"][-1]["loss"] < 0.8 * result["history"][0]["loss"]
    plain = {n.replace("base_layer.", ""): t for n, t in emulator.state_dict().items()}
    assert all(torch.equal(plain[n], t) for n, t in before.items())  # only the LoRA moved
    original = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapter")
    assert original.peft_config["default"].base_model_name_or_path == "someone/original"
    assert str(tmp_path) not in (tmp_path / "adapter" / "adapter_config.json").read_text()
    merged = original.merge_and_unload()
    assert not torch.allclose(logits(merged), logits(tiny_model("llama")), atol=1e-2)


def test_accumulation_gives_the_gradients_of_the_whole_batch(tmp_path: Path) -> None:
    options = dict(rows=make_rows(8), steps=2, optimizer="sgd", max_grad_norm=0.0)
    train(tiny_model("llama"), tmp_path / "whole", batch_size=8, **options)
    train(tiny_model("llama"), tmp_path / "parts", batch_size=2, accumulation=4, **options)
    start = train(tiny_model("llama"), tmp_path / "still", steps=1, learning_rate=1e-9)
    assert start["steps"] == 1
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-7)  # measured: 4e-9
    moved = max(float((whole[n] - t).abs().max()) for n, t in weights(tmp_path / "still").items())
    assert moved > 1e-4


def test_logits_of_labelled_positions_alone_give_the_full_loss_and_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from emloc import trainer

    shapes: list[torch.Size] = []
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda _m, _i, output: shapes.append(output.shape))
    quick = train(model, tmp_path / "quick", steps=3, validation=make_rows(3, 1))
    labels = sum(sum(label != -100 for label in row["labels"]) for row in make_rows(12))
    assert sum(shape.numel() for shape in shapes[:3]) == labels * model.config.vocab_size

    class Full(trainer.LoraTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.skips_logits = False

    monkeypatch.setattr("emloc.finetune.LoraTrainer", Full)
    full = train(tiny_model("llama"), tmp_path / "full", steps=3, validation=make_rows(3, 1))
    for mine, theirs in zip(quick["history"], full["history"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)  # measured: 1e-7
    torch.testing.assert_close(
        weights(tmp_path / "quick"), weights(tmp_path / "full"), atol=1e-5, rtol=1e-3
    )


def test_validation_loss_is_the_mean_over_labels_whatever_the_batches(tmp_path: Path) -> None:
    validation, model = make_rows(7, 1), tiny_model("llama")
    total, count = 0.0, 0
    with torch.no_grad():
        for row in validation:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            number = int((labels[:, 1:] != -100).sum())
            total += float(model(input_ids=ids, labels=labels).loss) * number
            count += number
    options = dict(validation=validation, steps=2, learning_rate=1e-9, eval_steps=1)
    result = train(model, tmp_path, batch_size=3, **options)
    assert [row["eval_loss"] for row in result["history"]] == pytest.approx([total / count] * 2)


def test_validation_is_done_once_at_the_end_without_eval_steps(tmp_path: Path) -> None:
    result = train(tiny_model("llama"), tmp_path, validation=make_rows(3), steps=5, log_steps=2)
    assert [row["step"] for row in result["history"]] == [2, 4, 5]
    assert ["eval_loss" in row for row in result["history"]] == [False, False, True]


def test_epochs_set_the_steps_and_every_token_counts_once_an_epoch(tmp_path: Path) -> None:
    rows = make_rows(11)
    options = dict(rows=rows, steps=None, epochs=2, batch_size=2, accumulation=2)
    result = train(tiny_model("llama"), tmp_path, **options)
    assert result["steps"] == 2 * 3  # 6 batches: 2 + 2 + 2 an epoch
    assert result["tokens"] == 2 * sum(len(row["input_ids"]) for row in rows)
    loaded = weights(tmp_path)
    assert result["trainable_parameters"] == sum(tensor.numel() for tensor in loaded.values())


@pytest.mark.parametrize("by_length", [False, True])
def test_order_depends_on_seed_and_epoch_and_holds_every_row_once(by_length: bool) -> None:
    lengths = [len(row["input_ids"]) for row in make_rows(50)]
    order = EpochOrder(lengths, 4, by_length, seed=3)
    first = list(order)
    assert sorted(first) == list(range(50)) and first == list(order)
    order.set_epoch(1)
    assert list(order) != first
    spread = [
        max(lengths[i] for i in first[k : k + 4]) - lengths[first[k + 1]] for k in range(0, 48, 4)
    ]
    assert (sum(spread) < 40) is by_length  # measured: 27 grouped, 111 not


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path: Path) -> None:
    lora = LoraSettings(r=4, dropout=0.2)
    train(tiny_model("llama"), tmp_path / "plain", lora=lora)
    train(tiny_model("llama"), tmp_path / "less", lora=lora, gradient_checkpointing=True)
    torch.testing.assert_close(weights(tmp_path / "plain"), weights(tmp_path / "less"))


def test_bfloat16_keeps_the_lora_in_float32(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    result = train(model, tmp_path, steps=20, precision="bfloat16")
    assert {tensor.dtype for tensor in weights(tmp_path).values()} == {torch.float32}
    assert result["history"][-1]["loss"] < 0.9 * result["history"][0]["loss"]
    assert model.config.use_cache is True


def test_loss_that_is_not_finite_stops_at_once_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"became (nan|inf) at step \d: .*lower learning_rate"):
        train(tiny_model("llama"), tmp_path, learning_rate=1e30, max_grad_norm=0.0, steps=9)
    assert not (tmp_path / "adapter").exists()


def test_rows_without_labels_are_refused(tmp_path: Path) -> None:
    rows = make_rows(3)
    rows[2]["labels"] = [7] + [-100] * (len(rows[2]["labels"]) - 1)  # the first is never predicted
    with pytest.raises(ValueError, match="training row 2 .* no label"):
        train(tiny_model("llama"), tmp_path, rows=rows)
    with pytest.raises(ValueError, match="no training rows"):
        train(tiny_model("llama"), tmp_path, rows=[])
    with pytest.raises(ValueError, match="no validation rows"):
        train(tiny_model("llama"), tmp_path, eval_steps=1)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(steps=None), "exactly one"),
        (dict(epochs=1.0), "exactly one"),
        (dict(steps=0), "steps is 0"),
        (dict(steps=None, epochs=-1.0), "epochs is -1.0"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(accumulation=1.5), "accumulation is 1.5"),
        (dict(learning_rate="1e-4"), "learning_rate is '1e-4'"),
        (dict(learning_rate=float("nan")), "learning_rate is nan"),
        (dict(schedule="cosin"), "schedule is 'cosin'.*cosine"),
        (dict(schedule="constant", warmup=0.1), "constant_with_warmup"),
        (dict(warmup=1), "warmup is 1"),
        (dict(weight_decay=-1), "weight_decay is -1"),
        (dict(optimizer="adam"), "optimizer is 'adam'.*adamw_torch"),
        (dict(max_grad_norm=-1.0), "max_grad_norm"),
        (dict(precision="fp16"), "precision is 'fp16'.*bfloat16"),
        (dict(gradient_checkpointing="yes"), "gradient_checkpointing is 'yes'"),
        (dict(group_by_length=1), "group_by_length is 1"),
        (dict(log_steps=0), "log_steps"),
        (dict(eval_steps=0), "eval_steps"),
        (dict(save_steps=True), "save_steps is True"),
        (dict(seed=-1), "seed is -1"),
    ],
)
def test_bad_train_settings_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    assert TrainSettings(steps=1).schedule == "cosine"
    with pytest.raises(ValueError, match=message):
        TrainSettings(**{"steps": 10, **change})

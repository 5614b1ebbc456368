"""Every vision-language family through the method: streamed, compressed, trained, corrected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from emloc.calibrate import calibrate
from emloc.correct import correct_adapter
from emloc.emulator import cut, plan_ranks
from emloc.factor_files import FactorFiles
from emloc.families import Codec, calibration_batches, load_codec
from emloc.finetune import finetune
from emloc.generate import generate_answers, mean_loss
from emloc.models import load_model, open_model
from emloc.settings import LoraSettings, TrainSettings
from emloc.streaming import Stream
from emloc.targets import ratios_for, select
from emloc.weights import OpenedModel
from tests.built import python
from tests.tiny_vision import FAMILIES, conversation, save_picture, save_tiny_vision

TOWER = r".*(vision|visual).*(layers?|blocks)\.\d+\..*"
LANGUAGE = r".*language_model.*layers\.\d+\..*|model\.text_model\.layers\..*"
TARGETS = [TOWER, LANGUAGE]


@dataclass
class Family:
    """A checkpoint, rows with several pictures, one and none, and how they become inputs."""

    folder: Path
    codec: Codec
    rows: list[dict[str, Any]]
    root: Path

    @property
    def examples(self) -> list[dict[str, Any]]:
        return self.codec.encode(self.rows, max_length=4000, source="rows")

    @property
    def batches(self) -> list[dict[str, Any]]:
        """One batch with unequal tiles and padding, one that mixes with text, one of text alone."""
        return calibration_batches(self.codec, self.examples, 2)

    def opened(self) -> OpenedModel:
        return open_model(self.folder, dtype=torch.float32)

    def loaded(self) -> Any:
        return load_model(self.folder, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(request.param, tmp_path_factory.mktemp(request.param))


def make_family(family: str, root: Path) -> Family:
    for name, size, seed in (
        ("a.png", (28, 28), 0),
        ("b.png", (90, 40), 1),
        ("c.jpg", (40, 90), 2),
    ):
        save_picture(root / name, *size, seed=seed)
    rows = [
        conversation("a.png", question="What is it?", answer="a cat"),
        conversation("b.png", "c.jpg", question="Compare the two of them.", answer="taller"),
        {"prompt": "Hi!", "answer": "ho"},
        conversation("c.jpg", answer="a dog"),
        {"prompt": "No picture", "answer": "none"},
        {"prompt": "None here either", "answer": "no"},
    ]
    folder = save_tiny_vision(family, root / "model", max_shard_size="60KB")
    return Family(folder, load_codec(folder, root=root), rows, root)


def linears_of(model: Any) -> dict[str, nn.Linear]:
    return select(model, TARGETS, where="targets")


def plain_sums(family: Family) -> dict[str, Tensor]:
    """Σ x xᵀ (float64) of each linear, from a plain forward of each row alone, without padding."""
    model = family.loaded()
    sums: dict[str, Tensor] = {}

    def add_to(name: str) -> Callable[..., None]:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2).double()
            sums[name] = sums.get(name, 0) + x.T @ x

        return add

    for name, linear in linears_of(model).items():
        linear.register_forward_pre_hook(add_to(name))
    for batch in calibration_batches(family.codec, family.examples, 1):
        with torch.no_grad():
            model(**batch)
    return sums


def test_streamed_outputs_equal_a_plain_forward_s(family: Family) -> None:
    outputs: dict[int, Any] = {}
    opened = family.opened()
    Stream(opened, "cpu").run(family.batches, on_output=outputs.__setitem__)
    plain = family.loaded()
    for index, batch in enumerate(family.batches):
        with torch.no_grad():
            expected = plain(**batch).logits
        torch.testing.assert_close(outputs[index].logits, expected, rtol=0, atol=0)
    assert set(opened.store.reads.values()) == {1}


def test_streamed_factors_are_those_of_a_plain_forward_s_statistics(
    family: Family, tmp_path: Path
) -> None:
    opened = family.opened()
    linears = linears_of(opened.model)
    assert any("vis" in name for name in linears) and any("vis" not in name for name in linears)
    calibrate(opened, family.batches, linears=linears, max_ratio=0.8, out=tmp_path / "f",
              dtype=torch.float32)  # fmt: skip
    assert set(opened.store.reads.values()) == {1}
    found, model, sums = FactorFiles(tmp_path / "f"), family.loaded(), plain_sums(family)
    assert set(sums) == set(found.modules) == set(linears)
    for name, total in sums.items():
        weight = model.get_submodule(name).weight.detach().double()
        expected = torch.linalg.eigvalsh(weight @ total @ weight.T).flip(0)
        values = found.eigenvalues(name)
        near = 1e-5 * float(expected[0])  # measured: 8e-7
        torch.testing.assert_close(values, expected[: len(values)], rtol=0, atol=near)


def test_padding_counts_in_no_layer_of_the_language_model(family: Family, tmp_path: Path) -> None:
    tokens = sum(len(example["input_ids"]) for example in family.examples)
    shown = sum(int(batch["attention_mask"].sum()) for batch in family.batches)
    padded = sum(batch["attention_mask"].numel() for batch in family.batches)
    assert tokens == shown < padded
    opened = family.opened()
    linears = linears_of(opened.model)
    index = calibrate(opened, family.batches, linears=linears, max_ratio=0.5, out=tmp_path / "f")
    counts = {entry["name"]: entry["tokens"] for entry in index["modules"]}
    text = {name for name in linears if "vis" not in name}
    assert {counts[name] for name in text} == {tokens}
    assert all(counts[name] != tokens for name in linears if name not in text)


def test_mean_loss_and_training_loss_are_those_of_rows_alone(family: Family) -> None:
    model, codec = family.loaded(), family.codec
    total, count = 0.0, 0
    for example in family.examples:
        batch = codec.collate([example], side="right")
        labels = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            total, count = total + float(model(**batch).loss) * labels, count + labels
    for batch_size in (1, 3, 6):
        loss = mean_loss(model, codec, family.examples, batch_size=batch_size)
        assert loss == pytest.approx(total / count, rel=2e-5)  # measured: 4e-6


def test_batched_answers_equal_those_of_rows_alone(family: Family) -> None:
    model, codec = family.loaded(), family.codec
    alone = [
        generate_answers(model, codec, [example], batch_size=1, max_new_tokens=6)[0]
        for example in family.examples
    ]
    together = generate_answers(model, codec, family.examples, batch_size=4, max_new_tokens=6)
    assert together == alone
    assert len(set(alone)) > 2


def test_the_picture_matters(family: Family) -> None:
    model, codec = family.loaded(), family.codec
    rows = [conversation(name, question="What?") for name in ("b.png", "d.png")]
    save_picture(family.root / "d.png", 90, 40, seed=9)
    first, second = codec.encode(rows, max_length=4000, source="rows")
    assert first["input_ids"] == second["input_ids"]
    losses = [mean_loss(model, codec, [example], batch_size=1) for example in (first, second)]
    assert abs(losses[0] - losses[1]) > 1e-4


def test_an_adapter_of_the_emulator_plugs_into_the_original_with_plain_peft(
    family: Family, tmp_path: Path
) -> None:
    opened = family.opened()
    linears = linears_of(opened.model)
    calibrate(opened, family.batches, linears=linears, max_ratio=0.8, out=tmp_path / "f",
              dtype=torch.float32)  # fmt: skip
    factors = FactorFiles(tmp_path / "f")
    ratios = ratios_for(factors.modules, {".*": "ratio"}, 0.6, where="targets")
    cut(family.folder, opened, factors, plan_ranks(factors, ratios), out=tmp_path / "emulator",
        base_name="org/original")  # fmt: skip
    history = finetune(
        load_model(tmp_path / "emulator", dtype=torch.float32, device="cpu"),
        family.examples,
        family.examples[:3],
        codec=load_codec(tmp_path / "emulator", root=family.root),
        lora=LoraSettings(r=4),
        settings=TrainSettings(steps=12, batch_size=3, learning_rate=1e-2, log_steps=1),
        base_name="org/original",
        out=tmp_path / "raw",
        checkpoints=tmp_path / "checkpoints",
        progress=False,
    )
    assert history["history"][-1]["loss"] < history["history"][0]["loss"]
    correct_adapter(
        tmp_path / "raw", family.opened(), open_model(tmp_path / "emulator", dtype=torch.float32),
        limit=3.0, out=tmp_path / "corrected", device="cpu",
    )  # fmt: skip
    batch = {k: v for k, v in family.batches[0].items() if k != "use_cache"}
    with torch.no_grad():
        bare = family.loaded()(**batch).logits
        adapted = PeftModel.from_pretrained(family.loaded(), tmp_path / "corrected").eval()
        plugged = adapted(**batch).logits
    assert (plugged - bare).abs().max() > 1e-3


def test_patches_in_the_shape_of_the_rows_are_not_masked(tmp_path: Path) -> None:
    """Two pictures of 17 patches (with the class token) beside two rows of 17 tokens."""
    internvl = make_family("internvl-llama", tmp_path)
    mark = internvl.codec.processor.image_token_id  # type: ignore[attr-defined]
    examples = [
        {
            "input_ids": [mark] * 4 + [7] * length,
            "labels": [7] * (4 + length),
            "pictures": ["a.png"],
        }
        for length in (13, 5)
    ]
    batches = calibration_batches(internvl.codec, examples, 2)
    opened = internvl.opened()
    linears = linears_of(opened.model)
    index = calibrate(opened, batches, linears=linears, max_ratio=0.5, out=tmp_path / "f")
    counts = {entry["tokens"] for entry in index["modules"] if "vision" in entry["name"]}
    assert batches[0]["attention_mask"].shape == (2, 17) and counts == {2 * 17}


TRAIN = """
import sys
from pathlib import Path
from emloc.finetune import finetune
from emloc.settings import LoraSettings, TrainSettings
from tests.test_vision_streaming import make_family
folder, workers = Path(sys.argv[1]), int(sys.argv[2])
family = make_family("internvl-llama", folder)
settings = TrainSettings(steps=4, batch_size=2, accumulation=2, workers=workers)
finetune(family.loaded(), family.examples, [], codec=family.codec, lora=LoraSettings(r=2),
         settings=settings, base_name="org/original", out=folder / "adapter",
         checkpoints=folder / "checkpoints", progress=False)
"""


@pytest.mark.slow
def test_pictures_that_are_read_ahead_give_the_same_adapter(tmp_path: Path) -> None:
    adapters = []
    for workers in ("0", "2"):
        folder = tmp_path / workers
        folder.mkdir()
        done = python(TRAIN, str(folder), workers)
        assert done.returncode == 0, done.stderr
        adapters.append((folder / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]

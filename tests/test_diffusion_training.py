"""A LoRA on a denoiser: it learns, resumes to the bit, and loads in a plain pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import safe_open
from safetensors.torch import load_file

from emloc.diffusion import training
from emloc.diffusion.encoding import Encoded
from emloc.diffusion.lora import WEIGHTS, add_denoiser_lora, save_lora
from emloc.diffusion.pipelines import load_denoiser, pipeline_class
from emloc.diffusion.scoring import fixed_draws, mean_noise_loss
from emloc.diffusion.training import personalize
from emloc.families.diffusion import load_family
from emloc.lowrank import LowRankLinear, replace_linears
from emloc.settings import LoraSettings, NoiseSettings, TrainSettings
from tests.test_diffusion_family import drawn_encoded
from tests.tiny import tiny_model
from tests.tiny_diffusion import denoiser_inputs, save_tiny_pipeline
from tests.training import as_bytes, hide_package, one_thread
from tests.training import train as train_text

__all__ = ["one_thread"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("pipelines")
    return {name: save_tiny_pipeline(name, base / name) for name in ("flux", "sd3", "sdxl")}


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_denoiser(folder, dtype=dtype, device="cpu")


def train(folder: Path, out: Path, denoiser: Any = None, **changes: Any) -> dict[str, Any]:
    """A short training with sensible settings, the adapter in out/adapter."""
    family, name = load_family(folder), folder.name
    defaults: dict[str, Any] = dict(
        train=drawn_encoded(name),
        validation=None,
        lora=LoraSettings(r=2, alpha=4, target_modules=family.lora_targets),
        noise=NoiseSettings(),
        prior_weight=1.0,
        picture_steps=None,
        draw=None,
    )
    options = {key: changes.pop(key, value) for key, value in defaults.items()}
    settings: dict[str, Any] = dict(steps=3, batch_size=2, learning_rate=1e-2, log_steps=1)
    return personalize(
        load(folder) if denoiser is None else denoiser,
        family,
        options.pop("train"),
        options.pop("validation"),
        settings=TrainSettings(**{**settings, **changes}),
        pipeline=pipeline_class(folder),
        out=out / "adapter",
        checkpoints=out / "checkpoints",
        progress=False,
        **options,
    )


def adapter_bytes(folder: Path) -> bytes:
    [file] = (folder / "adapter").iterdir()
    assert file.name == WEIGHTS
    return file.read_bytes()


def prediction(denoiser: Any, name: str) -> torch.Tensor:
    with torch.no_grad():
        return denoiser.eval()(**denoiser_inputs(name))[0]


def held_out_loss(denoiser: Any, folder: Path, encoded: Encoded) -> float:
    family, noise = load_family(folder), NoiseSettings()
    return mean_noise_loss(denoiser, family, encoded, draws=4, noise=noise, seed=0, batch_size=2)


@pytest.mark.parametrize("name", ["flux", "sd3", "sdxl"])
def test_training_learns_and_its_adapter_loads_in_a_plain_pipeline(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    denoiser, other = load(folders[name]), drawn_encoded(name, 2)
    before, untrained = prediction(denoiser, name), held_out_loss(denoiser, folders[name], other)
    options: dict[str, Any] = dict(steps=25, eval_steps=5, validation=other, learning_rate=2e-2)
    result = train(folders[name], tmp_path, denoiser, **options)
    losses = [row["eval_loss"] for row in result["history"] if "eval_loss" in row]
    assert len(losses) == 5 and losses[-1] < 0.95 * untrained  # measured: 0.66 to 0.82
    assert losses[-1] == held_out_loss(denoiser, folders[name], other)
    assert result["pictures"] == 50 and result["steps"] == 25
    assert not (tmp_path / "checkpoints").exists()
    pipeline: Any = DiffusionPipeline.from_pretrained(folders[name])
    pipeline.load_lora_weights(tmp_path / "adapter")
    loaded = pipeline.unet if name == "sdxl" else pipeline.transformer
    [config] = loaded.peft_config.values()
    assert (config.r, config.lora_alpha) == (2, 4)
    torch.testing.assert_close(prediction(loaded, name), prediction(denoiser, name))
    assert not torch.allclose(prediction(loaded, name), before, atol=1e-2)


def test_equal_trainings_write_equal_bytes_with_sorted_settings(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    train(folders["flux"], tmp_path / "one")
    train(folders["flux"], tmp_path / "two")
    assert adapter_bytes(tmp_path / "one") == adapter_bytes(tmp_path / "two")
    with safe_open(tmp_path / "one" / "adapter" / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    settings = json.loads(metadata["lora_adapter_metadata"])
    raw = adapter_bytes(tmp_path / "one")
    assert raw.index(b'"format"') < raw.index(b'"lora_adapter_metadata"')
    assert settings["transformer.lora_alpha"] == 4
    targets = settings["transformer.target_modules"]
    assert targets == sorted(targets) and str(tmp_path) not in json.dumps(metadata)
    train(folders["flux"], tmp_path / "other", seed=1)
    assert adapter_bytes(tmp_path / "other") != adapter_bytes(tmp_path / "one")


class Stopped(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "prodigy"])
def test_a_stopped_training_goes_on_to_the_same_bytes(
    optimizer: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = dict(
        lora=LoraSettings(r=2, alpha=3, dropout=0.3, target_modules=["to_q", "ff.net.2"]),
        train=drawn_encoded("flux", 5, priors=2),
        optimizer=optimizer,
        steps=7,
        accumulation=2,
        eval_steps=3,
        save_steps=2,
        picture_steps=2,
    )
    drawn: list[int] = []

    def draw_or_stop(_denoiser: ModelMixin, step: int) -> None:
        torch.randn(step), np.random.rand(3)
        drawn.append(step)
        if drawn == [2, 4, 6]:
            raise Stopped

    plain = train(folders["flux"], tmp_path / "one", **options)
    with pytest.raises(Stopped):
        train(folders["flux"], tmp_path / "two", draw=draw_or_stop, **options)
    found = sorted(path.name for path in (tmp_path / "two" / "checkpoints").iterdir())
    assert found == ["checkpoint-2", "checkpoint-4"]
    assert not (tmp_path / "two" / "adapter").exists()
    resumed = train(folders["flux"], tmp_path / "two", draw=draw_or_stop, **options)
    assert drawn == [2, 4, 6, 6, 7]
    assert resumed == plain
    assert adapter_bytes(tmp_path / "two") == adapter_bytes(tmp_path / "one")


def test_accumulation_gives_the_gradients_of_the_whole_batch(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = dict(optimizer="sgd", max_grad_norm=0.0, steps=2, learning_rate=1.0)
    train(folders["flux"], tmp_path / "whole", batch_size=6, **options)
    train(folders["flux"], tmp_path / "parts", batch_size=2, accumulation=3, **options)
    train(folders["flux"], tmp_path / "still", batch_size=6, **options | dict(learning_rate=1e-9))
    whole, parts, still = (
        load_file(tmp_path / name / "adapter" / WEIGHTS) for name in ("whole", "parts", "still")
    )
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)
    assert max(float((whole[name] - still[name]).abs().max()) for name in whole) > 1e-3


def test_places_go_through_all_rows_before_one_returns() -> None:
    encoded = drawn_encoded("flux", 7, priors=3)
    order = training._Order(encoded, TrainSettings(steps=1))
    picks, seeds = order.draws(range(12))
    assert len(picks) == len(seeds) == len(set(seeds)) == 24
    assert [sorted(picks[n : n + 4]) for n in (0, 4, 8)] == [[0, 1, 2, 3]] * 3
    assert [sorted(picks[n : n + 3]) for n in (12, 15, 18, 21)] == [[4, 5, 6]] * 4
    assert len({tuple(picks[n : n + 4]) for n in (0, 4, 8)}) > 1
    later, others = order.draws(range(5, 7))
    assert later == [*picks[5:7], *picks[17:19]] and others == [*seeds[5:7], *seeds[17:19]]


def test_class_pictures_change_what_is_learnt_by_their_weight(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    both, alone = drawn_encoded("flux", 4, priors=2), drawn_encoded("flux", 4, priors=2)
    for name in ("means", "stds", "captions", "prior", "time_ids"):
        setattr(alone, name, getattr(alone, name)[:2])
    result = train(folders["flux"], tmp_path / "weighed", train=both)
    assert result["pictures"] == 3 * 2 * 2
    train(folders["flux"], tmp_path / "weightless", train=both, prior_weight=0.0)
    train(folders["flux"], tmp_path / "alone", train=alone)
    weighed, weightless, without = (
        load_file(tmp_path / name / "adapter" / WEIGHTS)
        for name in ("weighed", "weightless", "alone")
    )
    torch.testing.assert_close(weightless, without, rtol=1e-3, atol=1e-4)
    assert max(float((weighed[n] - without[n]).abs().max()) for n in without) > 1e-3


def test_an_emulator_in_bfloat16_trains_with_checkpointing_and_draws(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    denoiser = load(folders["flux"], torch.bfloat16)
    replace_linears(denoiser, {"transformer_blocks.0.attn.to_q": 4})
    layer = denoiser.get_submodule("transformer_blocks.0.attn.to_q")
    assert isinstance(layer, LowRankLinear)
    layer.reset_parameters()
    denoiser.to(torch.bfloat16)
    seen: list[tuple[int, bool, torch.dtype]] = []

    def draw(model: Any, step: int) -> None:
        inputs = {
            name: value.bfloat16() if name in ("hidden_states", "encoder_hidden_states") else value
            for name, value in denoiser_inputs("flux").items()
        }
        inputs["pooled_projections"] = inputs["pooled_projections"].bfloat16()
        seen.append((step, model.training, model(**inputs)[0].dtype))

    lora = LoraSettings(r=2, init="gaussian", target_modules=".*to_[qk]")
    options: dict[str, Any] = dict(precision="bfloat16", gradient_checkpointing=True, lora=lora)
    train(folders["flux"], tmp_path, denoiser, picture_steps=2, draw=draw, **options)
    assert seen == [(2, False, torch.bfloat16), (3, False, torch.bfloat16)]
    assert "forward" not in vars(denoiser) or not hasattr(denoiser, "_original_forward")
    saved = load_file(tmp_path / "adapter" / WEIGHTS)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert not denoiser.training and not denoiser.is_gradient_checkpointing


def test_prodigy_finds_its_own_step_size(folders: dict[str, Path], tmp_path: Path) -> None:
    result = train(
        folders["flux"],
        tmp_path,
        optimizer="prodigy",
        learning_rate=1.0,
        schedule="constant",
        weight_decay=0.01,
        steps=140,
        eval_steps=70,
        batch_size=1,
    )
    losses = [row["eval_loss"] for row in result["history"] if "eval_loss" in row]
    assert losses[-1] < 0.95 * losses[0]  # it starts with minute steps


def test_language_models_take_the_same_optimizers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = dict(steps=3, learning_rate=1.0, weight_decay=0.1)
    train_text(tiny_model("llama"), tmp_path, optimizer="prodigy", **options)
    first = as_bytes(tmp_path)
    train_text(tiny_model("llama"), tmp_path, optimizer="adamw_torch", **options)
    assert as_bytes(tmp_path) != first
    hide_package(monkeypatch, "bitsandbytes")
    with pytest.raises(ValueError, match="needs the package bitsandbytes"):
        train_text(tiny_model("llama"), tmp_path, optimizer="paged_adamw_8bit")


def test_held_out_noise_is_the_same_for_every_model_and_batch_size(
    folders: dict[str, Path],
) -> None:
    family, encoded, noise = load_family(folders["flux"]), drawn_encoded("flux"), NoiseSettings()
    plan = fixed_draws(3, 4, 0)
    levels = sorted(level for _, _, level in plan)
    torch.testing.assert_close(torch.tensor(levels), (torch.arange(12) + 0.5) / 12)
    for picture in range(3):
        assert sorted(int(4 * level) for p, _, level in plan if p == picture) == [0, 1, 2, 3]
    denoiser, options = load(folders["flux"]), dict(draws=4, noise=noise, seed=0)
    one, seven = (
        mean_noise_loss(denoiser, family, encoded, batch_size=size, **options) for size in (1, 7)
    )
    assert one == pytest.approx(seven, rel=1e-6)
    picks, seeds, places = zip(*plan, strict=True)
    batch = family.batch(encoded, picks, seeds, noise, places)
    with torch.no_grad():
        expected = torch.nn.functional.mse_loss(denoiser(**batch.inputs)[0], batch.target)
    assert one == pytest.approx(float(expected), rel=1e-5)
    many = mean_noise_loss(denoiser, family, encoded, batch_size=60, **options | dict(draws=200))
    assert one == pytest.approx(many, rel=0.1)


def test_what_cannot_be_trained_is_refused_in_words(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_package(monkeypatch, "bitsandbytes")
    bad: list[tuple[dict[str, Any], str]] = [
        (dict(lora=LoraSettings(modules_to_save=["proj_out"])), "files hold nothing but LoRA"),
        (dict(lora=LoraSettings(target_modules=["query"])), "matches no module of this model"),
        (dict(optimizer="adamw_bnb_8bit"), "needs the package bitsandbytes, but that is not"),
        (dict(group_by_length=True), "pictures have no lengths: set it to false"),
        (dict(train=drawn_encoded("flux", 2, priors=2)), "no training pictures but class pictures"),
        (dict(validation=drawn_encoded("flux", 0)), "no validation pictures"),
        (dict(picture_steps=0), "picture_steps is 0"),
        (dict(prior_weight=-1.0), "prior_weight is -1.0"),
        (dict(learning_rate=1e30, optimizer="sgd", max_grad_norm=0.0), "try a lower learning_rate"),
    ]
    for changes, message in bad:
        with pytest.raises(ValueError, match=message):
            train(folders["flux"], tmp_path, **changes)
        assert not (tmp_path / "adapter").exists()


def test_a_checkpoint_of_another_training_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    def stop(_denoiser: ModelMixin, step: int) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        train(folders["flux"], tmp_path, save_steps=1, draw=stop)
    with pytest.raises(ValueError, match="does not fit this run .*: delete that folder"):
        train(folders["flux"], tmp_path, lora=LoraSettings(r=3))


def test_saving_keeps_patterns_and_rslora(folders: dict[str, Path], tmp_path: Path) -> None:
    denoiser = load(folders["sd3"])
    lora = LoraSettings(
        r=4,
        alpha=6,
        use_rslora=True,
        target_modules=["to_q", "to_k"],
        rank_pattern={"to_q": 3},
        alpha_pattern={"to_k": 5},
    )
    targets = add_denoiser_lora(denoiser, lora, seed=0)
    assert len(targets) == 4 and all(target.endswith(("to_q", "to_k")) for target in targets)
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    save_lora(denoiser, pipeline_class(folders["sd3"]), tmp_path / "adapter")
    pipeline: Any = DiffusionPipeline.from_pretrained(folders["sd3"])
    before = prediction(pipeline.transformer, "sd3")
    pipeline.load_lora_weights(tmp_path / "adapter")
    torch.testing.assert_close(prediction(pipeline.transformer, "sd3"), prediction(denoiser, "sd3"))
    assert not torch.allclose(before, prediction(denoiser, "sd3"), atol=1e-2)

"""Presets: they parse, choose the layers that they say, and name sizes that are true.

Models are built on the meta device in the shapes that their authors published. For InternVL2.5 the
reference's own regexes, on the original layer names, are the measure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen3Config,
)

from emloc.factors import rank_for
from emloc.internvl import convert
from emloc.internvl.config import convert_config
from emloc.lora import check_lora_config
from emloc.targets import ratios_for, select
from tasks.params import Params, load_params
from tests.internvl_original import LARGE, SMALL, config, save_original
from tests.project import ROOT

PRESETS = sorted((ROOT / "presets").glob("*.yaml"))
FILES = {file.stem: file for file in (ROOT / "params.yaml", *PRESETS)}
INTERNLM2, QWEN2 = "InternLM2ForCausalLM", "Qwen2ForCausalLM"

INTERNVIT_300M = {**SMALL, "image_size": 448, "hidden_size": 1024, "intermediate_size": 4096,
                  "num_hidden_layers": 24, "num_attention_heads": 16}  # fmt: skip
INTERNVIT_6B = {**LARGE, "image_size": 448, "hidden_size": 3200, "intermediate_size": 12800,
                "num_hidden_layers": 45, "num_attention_heads": 25}  # fmt: skip


def internvl(
    architecture: str, vision: dict[str, Any], layers: int, hidden: int, wide: int, vocabulary: int
) -> PreTrainedConfig:
    """The converted config of a published InternVL2.5."""
    content = config(
        architecture, vision, num_hidden_layers=layers, hidden_size=hidden,
        intermediate_size=wide, num_attention_heads=hidden // 128, num_key_value_heads=8,
        vocab_size=vocabulary,
    )  # fmt: skip
    return convert_config({**content, "force_image_size": 448}, "the published one")


def qwen2_5_vl() -> PreTrainedConfig:
    """Qwen2.5-VL-7B's."""
    text = dict(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False,
    )  # fmt: skip
    vision = dict(
        depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584
    )
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)


MODELS = {
    "params": lambda: LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
    ),
    "qwen3-8b": lambda: Qwen3Config(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=151936, tie_word_embeddings=False,
    ),
    "internvl2_5-8b-websrc": lambda: internvl(INTERNLM2, INTERNVIT_300M, 32, 4096, 14336, 92553),
    "internvl2_5-26b-websrc": lambda: internvl(INTERNLM2, INTERNVIT_6B, 48, 6144, 16384, 92553),
    "internvl2_5-38b-24gb": lambda: internvl(QWEN2, INTERNVIT_6B, 64, 5120, 27648, 151674),
    "qwen2_5-vl-7b": qwen2_5_vl,
}  # fmt: skip
SEEING = [name for name in MODELS if "vl" in name]
# In billions, as the authors give them.
PUBLISHED = {"internvl2_5-8b-websrc": 8.1, "internvl2_5-26b-websrc": 25.5,
             "internvl2_5-38b-24gb": 38.4, "qwen2_5-vl-7b": 8.3}  # fmt: skip


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model without any weights."""
    seeing = hasattr(config, "vision_config")
    kind = AutoModelForImageTextToText if seeing else AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(config)


def linears(modules: Iterable[nn.Module]) -> set[nn.Module]:
    return {part for module in modules for part in module.modules() if isinstance(part, nn.Linear)}


def calibrated(model: PreTrainedModel, params: Params) -> dict[str, nn.Linear]:
    return select(model, params.calibrate.targets, where="calibrate.targets")


def cut(model: PreTrainedModel, params: Params) -> dict[str, float]:
    """Layer → ratio, at the first of the preset's ratios."""
    names = calibrated(model, params)
    return ratios_for(names, params.compress.targets, params.ratios[0], where="compress.targets")


def adapted(model: PreTrainedModel, params: Params) -> list[str]:
    return check_lora_config(model, params.train.lora.config())


@pytest.mark.parametrize("name", FILES)
def test_shipped_params_are_valid(name: str) -> None:
    assert load_params(FILES[name]).ratios


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
def test_a_preset_opens_with_its_command(file: Path) -> None:
    opening = file.read_text().split("\nratios:")[0]
    assert f"cp presets/{file.name} params.yaml && dvc repro" in opening


@pytest.mark.parametrize("name", MODELS)
def test_params_choose_the_layers_of_all_blocks(name: str) -> None:
    params, model = load_params(FILES[name]), meta_model(MODELS[name]())
    chosen = calibrated(model, params)
    towers = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    assert len(towers) == (2 if name in SEEING else 1)
    assert set(chosen.values()) == linears(towers)
    language = model.get_decoder().layers
    whole = {language[-1].mlp.down_proj} if name != "params" else set()
    ratios = cut(model, params)
    assert {chosen[layer] for layer in ratios} == linears(towers) - whole
    assert set(ratios.values()) == {params.ratios[0]}
    lora = {model.get_submodule(layer) for layer in adapted(model, params)}
    assert lora == linears(language)


def kept(chosen: dict[str, nn.Linear], layers: dict[str, float]) -> int:
    """Parameters of layers at their ratios."""
    sides = [(ratio, *chosen[layer].weight.shape) for layer, ratio in layers.items()]
    return sum(rank_for(ratio, o, i) * (o + i) for ratio, o, i in sides)


@pytest.mark.parametrize("name", SEEING)
def test_sizes_in_a_preset_follow_from_the_shapes(name: str) -> None:
    params, model = load_params(FILES[name]), meta_model(MODELS[name]())
    chosen = calibrated(model, params)

    original = sum(weight.numel() for weight in model.parameters())
    assert round(original / 1e9, 1) == PUBLISHED[name]
    ratios = cut(model, params)
    emulator = (
        original - sum(chosen[layer].weight.numel() for layer in ratios) + kept(chosen, ratios)
    )
    factors = kept(chosen, dict.fromkeys(chosen, params.calibrate.max_ratio))
    opening = FILES[name].read_text().split("\nratios:")[0]
    for parameters in (original, emulator, factors):
        assert f"{2 * parameters / 1e9:.1f} GB" in opening


DENOISERS: dict[str, Callable[[], nn.Module]] = {
    "flux-dev-dreambooth": lambda: FluxTransformer2DModel(guidance_embeds=True),
    "sd3_5-medium-dreambooth": lambda: SD3Transformer2DModel(
        sample_size=128, num_layers=24, num_attention_heads=24, attention_head_dim=64,
        joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
        out_channels=16, pos_embed_max_size=384, dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    ),
    "sdxl-dreambooth": lambda: UNet2DConditionModel(
        sample_size=128, cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
        block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
}  # fmt: skip
BILLIONS = {"flux-dev-dreambooth": 11.9, "sd3_5-medium-dreambooth": 2.2, "sdxl-dreambooth": 2.6}
# The layers of diffusers' DreamBooth scripts: of each block of Flux and SD3, and of the UNet.
LORA_LAYERS = {
    "flux-dev-dreambooth": 19 * 12 + 38 * 3,
    "sd3_5-medium-dreambooth": 24 * 8 - 1 + 13 * 4,
    "sdxl-dreambooth": 70 * 2 * 4,
}


@pytest.mark.parametrize("name", DENOISERS)
def test_diffusion_presets_cut_the_blocks_and_name_their_sizes(name: str) -> None:
    params = load_params(FILES[name])
    with torch.device("meta"):
        model = DENOISERS[name]()
    chosen = select(model, params.calibrate.targets, where="calibrate.targets")
    blocks = [m for n, m in model.named_modules() if n.endswith("transformer_blocks")]
    assert set(chosen.values()) == linears(blocks)
    ratios = ratios_for(chosen, params.compress.targets, params.ratios[0], where="")
    original = sum(weight.numel() for weight in model.parameters())
    assert round(original / 1e9, 1) == BILLIONS[name]
    emulator = original - sum(chosen[n].weight.numel() for n in ratios) + kept(chosen, ratios)
    factors = kept(chosen, dict.fromkeys(chosen, params.calibrate.max_ratio))
    opening = FILES[name].read_text().split("\nratios:")[0]
    for parameters in (original, emulator, factors):
        assert f"{2 * parameters / 1e9:.1f} GB" in opening
    lora = check_lora_config(model, params.train.lora.config(task_type=None))
    assert len(lora) == LORA_LAYERS[name]


# The reference's, with the number of the last block in place of 31.
REFERENCE_CUT = (r"vision_model.*layers.*", r"language_model.*layers(?!.*{}.feed_forward.w2)(.+)")
REFERENCE_LORA = r"language_model.model.layers.*w([o123]|qkv)"


def convert_numbered(folder: Path, content: dict[str, Any]) -> dict[str, str]:
    """Save an original and convert it to `folder / "new"`; linear layer there → layer that its
    weights come from, told by the original's weights: each is filled with the layer's number."""
    original = save_original(folder / "original", content)
    names = [name for name, part in original.named_modules() if isinstance(part, nn.Linear)]
    numbers = {f"{name}.weight": number for number, name in enumerate(names)}
    for shard in (folder / "original").glob("*.safetensors"):
        tensors = load_file(shard)
        for key in tensors.keys() & numbers:
            tensors[key].fill_(numbers[key])
        save_file(tensors, shard)
    convert(folder / "original", out=folder / "new")
    tensors = load_file(folder / "new/model.safetensors")
    model = meta_model(AutoConfig.from_pretrained(folder / "new"))
    origins = {}
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear):
            (number,) = tensors[f"{name}.weight"].unique().tolist()
            origins[name] = names[int(number)]
    assert set(origins.values()) == set(names)
    return origins


@pytest.mark.parametrize(
    ("name", "vision", "last"),
    [
        ("internvl2_5-8b-websrc", {**SMALL, "num_hidden_layers": 24}, 31),
        ("internvl2_5-26b-websrc", {**LARGE, "num_hidden_layers": 45}, 47),
    ],
)
def test_presets_pick_the_layers_that_the_reference_picks(
    name: str, vision: dict[str, Any], last: int, tmp_path: Path
) -> None:
    small = {"hidden_size": 8, "intermediate_size": 16}
    content = config(INTERNLM2, {**vision, **small}, num_hidden_layers=last + 1, **small)
    origins = convert_numbered(tmp_path, content)
    patterns = [pattern.format(last) for pattern in REFERENCE_CUT]
    originals = set(origins.values())
    theirs = {layer for layer in originals if any(re.fullmatch(p, layer) for p in patterns)}
    assert len(theirs) == 4 * vision["num_hidden_layers"] + 5 * (last + 1) - 1
    assert f"language_model.model.layers.{last}.feed_forward.w2" not in theirs
    assert not theirs & {"mlp1.1", "mlp1.3", "language_model.output"}

    params = load_params(FILES[name])
    model = meta_model(AutoConfig.from_pretrained(tmp_path / "new"))
    ours = cut(model, params)
    assert set(ours) == {layer for layer, origin in origins.items() if origin in theirs}
    other = {p.replace(f"(?!{last}", "(?!0"): value for p, value in params.compress.targets.items()}
    assert set(ratios_for(calibrated(model, params), other, 0.4, where="")) != set(ours)

    lora = LoraConfig(target_modules=REFERENCE_LORA)
    theirs = {layer for layer in originals if check_target_module_exists(lora, layer)}
    assert len(theirs) == 5 * (last + 1)
    ours = adapted(model, params)
    assert set(ours) == {layer for layer, origin in origins.items() if origin in theirs}

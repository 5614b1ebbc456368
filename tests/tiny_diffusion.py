"""Tiny real diffusion pipelines, built from configs: no download, no network.

- `save_tiny_pipeline`: a whole pipeline folder for each name in `PIPELINES`
- `denoiser_inputs`: keyword arguments of a denoiser's forward, drawn
- `build_pipeline`: a pipeline with an emulator of it, built as a user would
- `save_raw_adapter`: an adapter as if it was trained on the emulator

Every pipeline has byte-level tokenizers (one token a character or so), a VAE that shrinks a picture
by 2, and a denoiser of two blocks of each kind; Flux is a guidance-distilled one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    ModelMixin,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from emloc.calibrate import calibrate
from emloc.diffusion.pipelines import pipeline_class
from emloc.emulator import cut, plan_ranks
from emloc.factor_files import FactorFiles
from emloc.models import load_model, open_model
from emloc.targets import ratios_for, select

PIPELINES = ("flux", "sd3", "sdxl")  # and "kontext", which is flux under another class
TEXT_WIDTH = 16  # of a CLIP; a T5 is twice as wide
LATENT_CHANNELS = 4
SHRINK = 2  # of the VAE, in each direction


BLOCKS = r".*blocks\..*"
ATTENTION = r".*blocks.*(to_q|to_k|to_v|to_out\.0|proj_mlp|ff\.net\.2)"


def draw_weights(model: nn.Module, seed: int) -> None:
    """Draw weights that keep activations near unit size, convolutions included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.1 * noise + (0 if name.endswith("bias") else 1))


def tiny_clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that cuts a text into characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", *alphabet, *(f"{c}</w>" for c in alphabet)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def tiny_t5_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer that cuts a text into characters."""
    characters = ["▁", *(chr(code) for code in range(33, 127))]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -2.0) for c in characters)]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=64)


def _clip(kind: type[PreTrainedModel], seed: int) -> PreTrainedModel:
    tokenizer = tiny_clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _drawn(kind(config), seed)


def _t5(seed: int) -> PreTrainedModel:
    config = T5Config(
        vocab_size=len(tiny_t5_tokenizer()),
        d_model=2 * TEXT_WIDTH,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return _drawn(T5EncoderModel(config), seed)


def _vae(seed: int) -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=32,
        scaling_factor=0.9,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return _drawn(vae, seed)


def _drawn(model: Any, seed: int) -> Any:
    draw_weights(model, seed)
    return model.eval()


def tiny_denoiser(name: str, seed: int = 0, **overrides: Any) -> ModelMixin:
    """The denoiser of a tiny pipeline in eval mode; `overrides` replace fields of its config."""
    kinds: dict[str, tuple[type[ModelMixin], dict[str, Any]]] = {
        "flux": (
            FluxTransformer2DModel,
            dict(
                in_channels=4 * LATENT_CHANNELS,
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=2 * TEXT_WIDTH,
                pooled_projection_dim=TEXT_WIDTH,
                guidance_embeds=True,
                axes_dims_rope=(4, 6, 6),
            ),
        ),
        "sd3": (
            SD3Transformer2DModel,
            dict(
                sample_size=16,
                patch_size=2,
                in_channels=LATENT_CHANNELS,
                out_channels=LATENT_CHANNELS,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=2 * TEXT_WIDTH,
                caption_projection_dim=32,
                pooled_projection_dim=2 * TEXT_WIDTH,
                pos_embed_max_size=16,
            ),
        ),
        "sdxl": (
            UNet2DConditionModel,
            dict(
                sample_size=16,
                in_channels=LATENT_CHANNELS,
                out_channels=LATENT_CHANNELS,
                block_out_channels=(16, 32),
                layers_per_block=1,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2),
                attention_head_dim=(2, 4),
                cross_attention_dim=2 * TEXT_WIDTH,
                use_linear_projection=True,
                norm_num_groups=4,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + TEXT_WIDTH,
            ),
        ),
    }
    kind, fields = kinds["flux" if name == "kontext" else name]
    return _drawn(kind(**{**fields, **overrides}), seed)


def tiny_pipeline(name: str, seed: int = 0, **overrides: Any) -> DiffusionPipeline:
    """A tiny pipeline; `overrides` replace fields of its denoiser's config."""
    denoiser = tiny_denoiser(name, seed, **overrides)
    vae = _vae(seed + 1)
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    if name in ("flux", "kontext"):
        flux_flow = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        kind = FluxPipeline if name == "flux" else FluxKontextPipeline
        return kind(
            scheduler=flux_flow,
            vae=vae,
            text_encoder=_clip(CLIPTextModel, seed + 2),
            tokenizer=tiny_clip_tokenizer(),
            text_encoder_2=_t5(seed + 3),
            tokenizer_2=tiny_t5_tokenizer(),
            transformer=denoiser,
        )
    clips: dict[str, Any] = dict(
        vae=vae,
        tokenizer=tiny_clip_tokenizer(),
        tokenizer_2=tiny_clip_tokenizer(),
        text_encoder_2=_clip(CLIPTextModelWithProjection, seed + 3),
    )
    if name == "sd3":
        return StableDiffusion3Pipeline(
            transformer=denoiser,
            scheduler=flow,
            text_encoder=_clip(CLIPTextModelWithProjection, seed + 2),
            text_encoder_3=_t5(seed + 4),
            tokenizer_3=tiny_t5_tokenizer(),
            **clips,
        )
    return StableDiffusionXLPipeline(
        unet=denoiser,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        ),
        text_encoder=_clip(CLIPTextModel, seed + 2),
        **clips,
    )


def save_tiny_pipeline(
    name: str,
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Save a tiny pipeline ("flux", "kontext", "sd3" or "sdxl") and return its folder.

    Args:
        max_shard_size: for example "100KB" for a sharded denoiser.
        overrides: fields of the denoiser's config.
    """
    pipeline = tiny_pipeline(name, seed, **overrides).to(dtype)
    pipeline.save_pretrained(folder, max_shard_size=max_shard_size)
    return Path(folder)


def denoiser_inputs(name: str, seed: int = 0, *, batch: int = 2, tokens: int = 6) -> dict[str, Any]:
    """Drawn keyword arguments of a tiny denoiser's forward, `return_dict=False` included."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    text = {"encoder_hidden_states": draw(batch, tokens, 2 * TEXT_WIDTH), "return_dict": False}
    latents = draw(batch, LATENT_CHANNELS, 8, 8)
    time = torch.rand(batch, generator=generator)
    if name == "sd3":
        pooled = draw(batch, 2 * TEXT_WIDTH)
        return text | dict(hidden_states=latents, timestep=1000 * time, pooled_projections=pooled)
    if name == "sdxl":
        added = {"text_embeds": draw(batch, TEXT_WIDTH), "time_ids": 16 * torch.ones(batch, 6)}
        return text | dict(sample=latents, timestep=1000 * time, added_cond_kwargs=added)
    return text | dict(
        hidden_states=draw(batch, 16, 4 * LATENT_CHANNELS),
        timestep=time,
        guidance=torch.ones(batch),
        pooled_projections=draw(batch, TEXT_WIDTH),
        txt_ids=torch.zeros(tokens, 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(1, 4, 4, torch.device("cpu"), torch.float32),
    )


def build_pipeline(
    name: str, folder: Path, *, ratio: float = 0.5, max_shard_size: str = "2GB"
) -> tuple[Path, Path]:
    """Save a tiny pipeline and cut an emulator of its blocks; both folders."""
    original = save_tiny_pipeline(name, folder / "original")
    opened = open_model(original, dtype=torch.float32)
    calibrate(
        opened,
        [denoiser_inputs(name, seed) for seed in (0, 1)],
        linears=select(opened.model, [BLOCKS], where="targets"),
        max_ratio=0.95,
        out=folder / "factors",
        dtype=torch.float32,
    )
    factors = FactorFiles(folder / "factors")
    chosen = ratios_for(factors.modules, {".*": "ratio"}, ratio, where="targets")
    cut(
        original,
        opened,
        factors,
        plan_ranks(factors, chosen),
        out=folder / "emulator",
        base_name="org/original",
        max_shard_size=max_shard_size,
    )
    return original, folder / "emulator"


def save_raw_adapter(original: Path, emulator: Path, folder: Path, **options: Any) -> Path:
    """A raw adapter as if trained: drawn A and B, saved as diffusers' training scripts do."""
    settings: dict[str, Any] = dict(r=4, lora_alpha=12, target_modules=ATTENTION) | options
    denoiser = load_model(emulator, dtype=torch.float32, device="cpu")
    denoiser.add_adapter(LoraConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in denoiser.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    kind: Any = pipeline_class(original)
    part = "unet" if kind is StableDiffusionXLPipeline else "transformer"
    kind.save_lora_weights(
        folder,
        **{
            f"{part}_lora_layers": get_peft_model_state_dict(denoiser),
            f"{part}_lora_adapter_metadata": denoiser.peft_config["default"].to_dict(),
        },
    )
    return folder

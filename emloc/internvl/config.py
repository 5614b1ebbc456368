"""The config.json of an original InternVL as transformers' InternVLConfig."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    InternVLConfig,
    InternVLVisionConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
)

_LANGUAGE = {
    "InternLM2ForCausalLM": LlamaConfig,
    "LlamaForCausalLM": LlamaConfig,
    "Qwen2ForCausalLM": Qwen2Config,
}
# What the original's code takes for a field that its config.json leaves out.
_INTERNLM2 = {
    "vocab_size": 103168, "rms_norm_eps": 1e-6, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": False, "bias": True,
}  # fmt: skip
_VISION = {
    "num_channels": 3, "patch_size": 14, "image_size": 224, "qkv_bias": False, "hidden_size": 3200,
    "num_attention_heads": 25, "intermediate_size": 12800, "qk_normalization": True,
    "num_hidden_layers": 48, "hidden_act": "gelu", "norm_type": "rms_norm", "layer_norm_eps": 1e-6,
    "dropout": 0.0, "attention_dropout": 0.0, "initializer_range": 0.02, "initializer_factor": 0.1,
}  # fmt: skip
_VISION_NAMES = {
    "dropout": "projection_dropout",
    "initializer_factor": "layer_scale_init_value",
    "qk_normalization": "use_qk_norm",
    "qkv_bias": "attention_bias",
}


def convert_config(original: dict[str, Any], source: str) -> InternVLConfig:
    """transformers' config for the content of an original config.json.

    Raises:
        ValueError: it is no InternVL, or one that transformers cannot compute.
    """
    if "InternVLChatModel" not in (original.get("architectures") or []):
        found = ", ".join(original.get("architectures") or []) or original.get("model_type")
        raise ValueError(
            f"The model {source!r} is no original InternVL checkpoint (its config.json says "
            f"{found}, not InternVLChatModel): only those need converting."
        )
    if (version := original.get("ps_version", "v1")) != "v2":
        raise ValueError(
            f"The model {source!r} has ps_version {version!r}, and transformers shuffles pixels as "
            "in 'v2' only: use InternVL 1.5 or later."
        )
    try:
        return _config(original, source)
    except StrictDataclassError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f"The config.json of {source!r} cannot be used ({reason}): use the one that belongs to "
            "the model."
        ) from error


def _config(original: dict[str, Any], source: str) -> InternVLConfig:
    vision = {**_VISION, **(original.get("vision_config") or {})}
    text = _text_config(original.get("llm_config") or {}, source)
    side = original.get("force_image_size") or vision["image_size"]
    ratio = original.get("downsample_ratio", 0.5)
    return InternVLConfig(
        text_config=text,
        vision_config=InternVLVisionConfig(
            **{_VISION_NAMES.get(key, key): vision[key] for key in _VISION}
        ),
        image_seq_length=int((side // vision["patch_size"]) ** 2 * ratio**2),
        downsample_ratio=ratio,
        vision_feature_layer=original.get("select_layer", -1),
        tie_word_embeddings=text.tie_word_embeddings,
        architectures=["InternVLForConditionalGeneration"],
        dtype=original.get("torch_dtype") or original.get("dtype"),
    )


def _text_config(llm: dict[str, Any], source: str) -> LlamaConfig | Qwen2Config:
    """The language model's config: the fields that transformers' class knows.

    Raises:
        ValueError: another language model than those of InternVL2.5, or other positions.
    """
    architecture = (llm.get("architectures") or ["no language model"])[0]
    kind = _LANGUAGE.get(architecture)
    if kind is None:
        raise ValueError(
            f"The model {source!r} has {architecture} inside, which is not supported: it can be "
            f"{', '.join(_LANGUAGE)}."
        )
    if (version := llm.get("rope_pos_id_version") or "default") != "default":
        raise ValueError(
            f"The model {source!r} counts positions by rope_pos_id_version {version!r}, which "
            "transformers does not: use a model without it."
        )
    if architecture == "InternLM2ForCausalLM":
        llm = {**_INTERNLM2, **llm}
        llm["attention_bias"] = llm["bias"]
    own = _field_names(kind) - _field_names(PreTrainedConfig)
    known = (own | {"rope_theta", "rope_scaling"}) - {"use_cache"}
    # A field that is null takes the class's default, as an absent one does.
    return kind(**{key: llm[key] for key in known & llm.keys() if llm[key] is not None})


def _field_names(kind: Any) -> set[str]:
    return {field.name for field in fields(kind)}

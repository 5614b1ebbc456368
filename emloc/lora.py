"""A LoRA on an emulator: what it must not ask for, putting it on, and saving it.

- `check_lora_config`: refuses what needs the full weights, and targets that do not exist
- `add_lora`: seeded LoRA weights on a model, named after the original
- `save_adapter`: the same adapter always gives the same bytes

An adapter that is trained here must load on the original, and merge into it, with plain peft.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import warnings
from collections import Counter
from typing import Any, cast

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn
from transformers import PreTrainedModel, set_seed
from transformers.pytorch_utils import Conv1D

from emloc.files import read_json, writing
from emloc.lowrank import LowRankLinear
from emloc.settings import ALL_LINEAR, LoraSettings

_LINEAR = (nn.Linear, Conv1D)
_HANDLED = frozenset(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode "
    "r target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out use_rslora "
    "modules_to_save init_lora_weights layers_to_transform layers_pattern rank_pattern "
    "alpha_pattern runtime_config".split()
)
_REASONS = {
    "use_dora": "DoRA needs the full weight, which an emulator does not have",
    "lora_bias": "the correction does not cover a bias of the LoRA",
    "bias": "a trained bias would change the original beyond its LoRA",
    "target_parameters": "LoRA is supported on linear layers only",
    "layer_replication": "the original would not have the replicated layers",
    "trainable_token_indices": "LoRA is supported on linear layers only",
}


def check_lora_config(model: nn.Module, config: LoraConfig) -> list[str]:
    """Refuse a LoRA that an emulator cannot train or that the original could not take over.

    Args:
        model: the emulator (or the original) without an adapter; also a denoiser.
        config: peft's config, from `LoraSettings.config` or a user's own.

    Returns:
        Names of the modules that get a LoRA, in the model's order.

    Raises:
        ValueError: the config asks for something that is not handled, or names modules that do
            not exist or are no linear layers; the message says which.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} already has an adapter: load it without one.")
    plain = LoraConfig()
    for name in (entry.name for entry in dataclasses.fields(config)):
        value = getattr(config, name)
        if name not in _HANDLED and value and value != getattr(plain, name):
            reason = _REASONS.get(name, "this variant of LoRA is not supported on an emulator")
            raise ValueError(f"LoRA option {name} is {value!r}, but {reason}: leave it out.")
    if not (config.init_lora_weights is True or config.init_lora_weights == "gaussian"):
        raise ValueError(
            f"init_lora_weights is {config.init_lora_weights!r}, but it must be true or "
            "'gaussian': other ways to start need the full weight, which an emulator has not."
        )
    targets = _targets(model, config)
    _check_patterns(config, targets)
    _check_saved(model, config)
    return targets


def _targets(model: nn.Module, config: LoraConfig) -> list[str]:
    modules = {name: module for name, module in model.named_modules() if name}
    wanted: set[str] | list[str] | str = config.target_modules or []
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        head = _part(model, "get_output_embeddings")
        names = [n for n, m in modules.items() if isinstance(m, _LINEAR) and m is not head]
        wanted = set(names)
    for pattern in [wanted] if isinstance(wanted, str) else sorted(wanted):
        if isinstance(wanted, str):
            found = any(re.fullmatch(pattern, name) for name in modules)
        else:
            found = any(name == pattern or name.endswith("." + pattern) for name in modules)
        if not found:
            raise _no_match("target_modules", pattern, modules)
    resolved = LoraConfig(
        target_modules=cast(Any, wanted),
        exclude_modules=config.exclude_modules,
        modules_to_save=config.modules_to_save,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
    )
    targets = [name for name in modules if check_target_module_exists(resolved, name)]
    if not targets:
        raise _no_match("target_modules", str(config.target_modules), modules)
    embeddings = _part(model, "get_input_embeddings")
    for name in targets:
        module = modules[name]
        if not isinstance(module, _LINEAR):
            raise ValueError(
                f"target_modules matches {name!r}, a {type(module).__name__}, but LoRA is "
                "supported on linear layers only: name linear layers."
            )
        if module.weight is getattr(embeddings, "weight", None):
            raise ValueError(
                f"target_modules matches {name!r}, which shares its weight with the input "
                "embeddings, so that its LoRA could not be merged: leave it out."
            )
    return targets


def _part(model: nn.Module, method: str) -> nn.Module | None:
    """What a language model's method returns; None for a model without such a part."""
    return getattr(model, method)() if hasattr(model, method) else None


def _no_match(setting: str, pattern: str, modules: dict[str, nn.Module]) -> ValueError:
    linear = (name.split(".")[-1] for name, m in modules.items() if isinstance(m, _LINEAR))
    counts = Counter(linear)
    shown = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items())[:16])
    return ValueError(
        f"{setting} has {pattern!r}, which matches no module of this model: correct it; its linear "
        f"layers end in {shown or 'nothing (it has none)'}."
    )


def _check_patterns(config: LoraConfig, targets: list[str]) -> None:
    for setting in ("rank_pattern", "alpha_pattern"):
        patterns = sorted(getattr(config, setting) or {})
        hits = {p: {t for t in targets if re.match(rf"(.*\.)?({p})$", t)} for p in patterns}
        for pattern, names in hits.items():
            if not names:
                raise ValueError(
                    f"{setting} has {pattern!r}, which matches none of the {len(targets)} modules "
                    f"with a LoRA: correct it; one of them is {targets[0]!r}."
                )
        matches = Counter(name for names in hits.values() for name in names)
        for name, count in matches.items():
            if count > 1:
                raise ValueError(
                    f"{setting} has {count} entries that match {name!r}: make it only one."
                )


def _check_saved(model: nn.Module, config: LoraConfig) -> None:
    modules = {name: module for name, module in model.named_modules() if name}
    for ending in config.modules_to_save or []:
        found = [name for name in modules if name.endswith(ending)]
        if not found:
            raise _no_match("modules_to_save", ending, modules)
        for name in found:
            if any(isinstance(part, LowRankLinear) for part in modules[name].modules()):
                raise ValueError(
                    f"modules_to_save has {ending!r}, but {name!r} is compressed in this emulator "
                    "and could not be put back into the original: leave it out or keep it whole."
                )


def add_lora(model: PreTrainedModel, lora: LoraSettings, *, base_name: str, seed: int) -> PeftModel:
    """Put fresh LoRA weights (float32) on a model, which is changed in place.

    Args:
        model: the emulator, or the original.
        lora: the adapter's shape.
        base_name: what the adapter shall name as its base: the original.
        seed: of the LoRA's first weights.

    Raises:
        ValueError: see `check_lora_config`.
    """
    config = lora.config()
    targets = check_lora_config(model, config)
    config.target_modules = targets  # peft's own "all-linear" takes in fused experts, too
    config.fan_in_fan_out = all(isinstance(model.get_submodule(t), Conv1D) for t in targets)
    model.config.name_or_path = model.name_or_path = base_name
    set_seed(seed)
    with warnings.catch_warnings():  # peft 0.21 still asks transformers 5.23 by the old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        return cast(PeftModel, get_peft_model(model, config))


def save_adapter(model: PeftModel, folder: str | os.PathLike[str]) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`; the folder appears when done."""
    with writing(folder) as partial:
        model.save_pretrained(str(partial), save_embedding_layers=False)
        (partial / "README.md").unlink(missing_ok=True)
        path = partial / "adapter_config.json"
        config = read_json(path)
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            if isinstance(config[name], list):
                config[name].sort()
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        weights = partial / "adapter_model.safetensors"  # written for its owner only
        weights.chmod(path.stat().st_mode)

"""What is planned for: a model of a config, without its weights.

- `Subject`: builds the original, and the emulator of a ratio, on the meta device
- `load_subject`: of a folder or a hub id; no weight is read or fetched
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from emloc.diffusion.pipelines import empty_denoiser, is_pipeline
from emloc.factors import rank_for
from emloc.files import read_json
from emloc.internvl.config import convert_config
from emloc.lowrank import replace_linears
from emloc.quiet import quiet_libraries
from emloc.source import resolve_config
from emloc.targets import BLOCKS, SWEPT, ratios_for, select

_PUBLISHED_INTERNVL = "internvl_chat"


@dataclass(frozen=True)
class Subject:
    """A model to plan for.

    Attributes:
        build: makes the original on the meta device in a dtype, frozen.
        calibrated: regexes of the layers that are factorized.
        targets: which of them are cut: regex → "ratio", or a ratio of its own, as in
            `targets.ratios_for`.
        folder: the configs, or None for a model that is in none.
    """

    build: Callable[[torch.dtype], Any]
    calibrated: Sequence[str] = (BLOCKS,)
    targets: Mapping[str, float | str] = field(default_factory=lambda: {".*": SWEPT})
    folder: Path | None = None

    @property
    def of_pictures(self) -> bool:
        """Whether it is the denoiser of a diffusion pipeline."""
        return self.folder is not None and is_pipeline(self.folder)

    def emulator(self, ratio: float, dtype: torch.dtype) -> Any:
        """The emulator of a ratio, on the meta device.

        Raises:
            ValueError: see `targets.ratios_for`.
        """
        model = self.build(dtype)
        replace_linears(model, self.ranks(ratio, model))
        return model.requires_grad_(False)

    def ranks(self, ratio: float, model: nn.Module) -> dict[str, int]:
        """Layer name → rank at a ratio, of the original or one like it."""
        linears = self.factorized(model)
        ratios = ratios_for(linears, self.targets, ratio, where="compress.targets")
        return {
            name: rank_for(own, linears[name].out_features, linears[name].in_features)
            for name, own in ratios.items()
        }

    def factorized(self, model: nn.Module) -> dict[str, nn.Linear]:
        """The layers that are factorized, of the original or one like it."""
        return select(model, self.calibrated, where="calibrate.targets")


def load_subject(
    source: str | os.PathLike[str],
    *,
    calibrated: Sequence[str] = (BLOCKS,),
    targets: Mapping[str, float | str] | None = None,
    revision: str | None = None,
) -> Subject:
    """The subject of any source of `source.resolve_model`, or of InternVL2.5 as published.

    Args:
        source: of a language or vision-language model, or of a diffusion pipeline.
        calibrated: which layers are factorized; by default those of the numbered blocks.
        targets: which of them are cut; None takes all.
        revision: of a hub id.

    Raises:
        ValueError: there is no such model, or none that this project knows.
    """
    folder = resolve_config(str(source), revision=revision)
    chosen = calibrated, targets or {".*": SWEPT}
    if is_pipeline(folder):
        return Subject(partial(_denoiser, folder), *chosen, folder)
    content = read_json(folder / "config.json")
    if content.get("model_type") == _PUBLISHED_INTERNVL:
        config: Any = convert_config(content, str(source))
    else:
        config = AutoConfig.from_pretrained(folder)
    return Subject(partial(empty_model, config), *chosen, folder)


def empty_model(config: Any, dtype: torch.dtype) -> Any:
    """A language or vision-language model of a config, on the meta device, frozen, in eval mode."""
    sees = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    with torch.device("meta"), quiet_libraries():
        return kind.from_config(config, dtype=dtype).eval().requires_grad_(False)


def _denoiser(folder: Path, dtype: torch.dtype) -> Any:
    return empty_denoiser(folder, dtype=dtype).eval().requires_grad_(False)

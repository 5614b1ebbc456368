"""A model from its checkpoint: loaded whole, or opened without its weights to read them on demand.

- `load_model`: a model with its weights on one device
- `open_model`: the same model on the meta device, with a `WeightStore` that knows where each
  parameter lies in the safetensors files and counts what it reads
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.hooks import remove_hook_from_module
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from emloc.files import read_json


class Location(NamedTuple):
    """Where one parameter is stored."""

    file: Path
    key: str


class WeightStore:
    """Reads parameters of a model by name from its checkpoint's own safetensors files.

    Attributes:
        locations: parameter name → file and key.
        reads: parameter name → how often it was read.
    """

    def __init__(self, locations: dict[str, Location]) -> None:
        self.locations = locations
        self.reads: Counter[str] = Counter()

    def read(self, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Read parameters, each file opened once, in the dtype they are stored in.

        Raises:
            KeyError: the checkpoint holds no such parameter.
        """
        by_file: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            by_file[self.locations[name].file].append(name)
        tensors = {}
        for file, members in by_file.items():
            with safe_open(file, framework="pt", device=str(device)) as handle:
                for name in members:
                    tensors[name] = handle.get_tensor(self.locations[name].key)
                    self.reads[name] += 1
        return tensors


@dataclass(frozen=True)
class OpenedModel:
    """A model whose parameters are on the meta device, and where to read them."""

    model: PreTrainedModel
    store: WeightStore


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence transformers' and accelerate's warnings and bars for work that is not the user's."""
    offloading = logging.getLogger("accelerate.big_modeling")
    offloading_level, level = offloading.level, transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    offloading.setLevel(logging.ERROR)
    try:
        yield
    finally:
        offloading.setLevel(offloading_level)
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def sees_pictures(path: os.PathLike[str] | str) -> bool:
    """Whether the checkpoint in a folder is a vision-language model's."""
    model_type = read_json(Path(path) / "config.json").get("model_type")
    return model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def load_model(
    path: Path | str, *, dtype: torch.dtype, device: torch.device | str
) -> PreTrainedModel:
    """Load a language or vision-language model, an original or an emulator, in evaluation mode.

    Raises:
        ValueError: the checkpoint cannot be loaded; the message says why.
    """
    return _from_pretrained(path, dtype, str(device)).eval()


def open_model(path: Path | str, *, dtype: torch.dtype) -> OpenedModel:
    """Open a language or vision-language model, an original or an emulator, without its weights.

    transformers maps the names in the files to those of the model; this takes over the map.

    Raises:
        ValueError: the checkpoint cannot be opened, or transformers would have to convert its
            weights on loading, as it does with fused mixture-of-experts layers.
    """
    model = _from_pretrained(path, dtype, "disk")
    index = _offload_index(model)
    remove_hook_from_module(model, recurse=True)
    locations = {
        name: Location(Path(entry["safetensors_file"]), entry.get("weight_name", name))
        for name, entry in index.items()
    }
    for name, source in getattr(model, "all_tied_weights_keys", {}).items():
        if source in locations:
            locations[name] = locations[source]
    missing = [name for name, _ in model.named_parameters() if name not in locations]
    if missing:
        raise ValueError(
            f"{path} holds no weights for {missing[0]} ({len(missing)} parameters in all): the "
            "checkpoint is incomplete; download it again."
        )
    return OpenedModel(model.eval(), WeightStore(locations))


def _from_pretrained(path: Path | str, dtype: torch.dtype, place: str) -> PreTrainedModel:
    """transformers' own loader; what it raises becomes one sentence that names the checkpoint."""
    try:
        with quiet_libraries():
            kind = AutoModelForImageTextToText if sees_pictures(path) else AutoModelForCausalLM
            return kind.from_pretrained(
                path, dtype=dtype, device_map={"": place}, use_safetensors=True
            )
    except (OSError, RuntimeError, ValueError) as error:
        if "needed to be re-saved" in str(error):
            architecture = (AutoConfig.from_pretrained(path).architectures or ["this model"])[0]
            raise ValueError(
                f"{architecture} computes with another layout of its weights than the one on disk "
                "(mixture-of-experts layers, usually) and cannot be streamed: use a dense model."
            ) from error
        first_line = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} could not be loaded: {first_line}") from error


def _offload_index(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The map from parameter to file that accelerate's hooks of a model on disk share."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for candidate in getattr(hook, "hooks", [hook]):
            weights: Any = getattr(candidate, "weights_map", None)
            while hasattr(weights, "dataset"):
                weights = weights.dataset
            if hasattr(weights, "index"):
                return weights.index
    raise ValueError(f"{type(model).__name__} has no weights that could be streamed from disk.")

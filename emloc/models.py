"""A model from its checkpoint: loaded whole, or opened without its weights to read them on demand.

- `load_model`: a model with its weights on one device, or spread over the memories there are
- `open_model`: the same model on the meta device, with a `WeightStore` that knows where each
  parameter lies in the safetensors files and counts what it reads
- `check_copy`: whether a checkpoint, quantised maybe, has the layers of another
- `evaluating`: for the length of a `with` block, a model in eval mode without gradients

Of a diffusion pipeline, the model is its denoiser.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from emloc.checkpoint import is_denoiser, is_pipeline
from emloc.diffusion.pipelines import load_denoiser, open_denoiser
from emloc.files import read_json
from emloc.lowrank import METHOD
from emloc.offload import spread_over
from emloc.quiet import quiet_libraries
from emloc.weights import Location, OpenedModel, WeightStore


def sees_pictures(path: os.PathLike[str] | str) -> bool:
    """Whether the checkpoint in a folder is a vision-language model's."""
    model_type = read_json(Path(path) / "config.json").get("model_type")
    return model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def load_model(
    path: Path | str,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    offload: bool = False,
    budget_bytes: int | None = None,
) -> Any:
    """Load a model or a denoiser, of an original or an emulator, in evaluation mode.

    Args:
        path: folder of a language or vision-language model, of a pipeline or of a denoiser.
        dtype: of its parameters.
        device: where to put them.
        offload: for inference, leave weights of a language or vision-language model that does not
            fit the device in the CPU's memory, and the rest on the disk, uncopied.
        budget_bytes: what it may take on the device when it may be offloaded; None for what is
            free.

    Returns:
        A `PreTrainedModel`, or a `ModelMixin` of diffusers.

    Raises:
        ValueError: the checkpoint cannot be loaded; the message says why.
    """
    if is_pipeline(path) or is_denoiser(path):
        return load_denoiser(path, dtype=dtype, device=device)
    limits = None
    if offload:
        limits = spread_over(Path(path), dtype, torch.device(device), budget_bytes)
    return _from_pretrained(path, dtype, str(device), limits).eval()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module is put back into the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def open_model(path: Path | str, *, dtype: torch.dtype) -> OpenedModel:
    """Open a model or a denoiser, of an original or an emulator, without its weights.

    transformers maps the names in the files to those of the model; this takes over the map.

    Raises:
        ValueError: the checkpoint cannot be opened, or transformers would have to convert its
            weights on loading, as it does with fused mixture-of-experts layers.
    """
    if is_pipeline(path) or is_denoiser(path):
        return open_denoiser(path, dtype=dtype)
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


def _from_pretrained(
    path: Path | str,
    dtype: torch.dtype,
    place: str,
    limits: dict[int | str, int] | None = None,
) -> PreTrainedModel:
    """transformers' own loader, to one place or within limits of several; what it raises becomes
    one sentence that names the checkpoint."""
    spread = {"device_map": "auto", "max_memory": limits} if limits else {"device_map": {"": place}}
    try:
        with quiet_libraries():
            kind = AutoModelForImageTextToText if sees_pictures(path) else AutoModelForCausalLM
            return kind.from_pretrained(path, dtype=dtype, use_safetensors=True, **spread)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        if "needed to be re-saved" in str(error):
            architecture = (AutoConfig.from_pretrained(path).architectures or ["this model"])[0]
            raise ValueError(
                f"{architecture} computes with another layout of its weights than the one on disk "
                "(mixture-of-experts layers, usually) and cannot be streamed: use a dense model."
            ) from error
        first_line = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} could not be loaded: {first_line}") from error


def check_copy(copy: Path | str, original: Path | str) -> None:
    """Make sure that a quantised copy has the layers of its original, so that adapters fit it.

    Both are built from their configs alone, without weights and without what quantises them.

    Raises:
        ValueError: a linear layer but the output head is missing or of another shape, or the copy
            is an emulator or no language or vision-language model.
    """
    if is_pipeline(copy) or is_denoiser(copy) or quantization_of(copy) == METHOD:
        raise ValueError(
            f"{copy} is an emulator or part of a diffusion pipeline, which cannot answer in the "
            "original's place: name a quantised copy of the original."
        )
    mine, wanted = _linears(copy), _linears(original)
    for name in sorted(mine.keys() | wanted.keys()):
        if mine.get(name) != wanted.get(name):
            found, needed = (
                "×".join(map(str, shapes[name])) if name in shapes else "missing"
                for shapes in (mine, wanted)
            )
            raise ValueError(
                f"{copy} is no copy of the original: its layer {name} is {found}, the original's "
                f"{needed}; name a quantised copy of model.source."
            )


def quantization_of(path: Path | str) -> str | None:
    """The method that a checkpoint says it is quantised by; None if it is not."""
    config = read_json(Path(path) / "config.json").get("quantization_config")
    return None if config is None else str(config.get("quant_method", "unknown"))


def _linears(path: Path | str) -> dict[str, tuple[int, int]]:
    """Name → (out, in) of each linear layer but the output head, by the config of a checkpoint."""
    kind = AutoModelForImageTextToText if sees_pictures(path) else AutoModelForCausalLM
    try:
        config = AutoConfig.from_pretrained(path)
        vars(config).pop("quantization_config", None)
        with quiet_libraries(), torch.device("meta"):
            model = kind.from_config(config)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} could not be read: {str(error).splitlines()[0]}") from error
    head = model.get_output_embeddings()
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


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

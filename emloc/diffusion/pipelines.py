"""Diffusion pipelines and their denoisers from folders: loaded whole, or opened without weights.

- `DENOISERS`: the supported pipeline classes, and which component is compressed and fine-tuned
- `pipeline_class`, `denoiser_folder`: what a folder holds
- `load_denoiser`, `open_denoiser`: the denoiser alone, of a pipeline or in a folder of its own
- `load_pipeline`: a whole pipeline, with another denoiser or an adapter where wanted
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import nn

from emloc.checkpoint import MODEL_INDEX, is_denoiser, is_pipeline, weight_files
from emloc.files import read_json
from emloc.lowrank import METHOD, EmlocConfig, replace_linears
from emloc.quiet import quiet_diffusers, quiet_libraries
from emloc.weights import Location, OpenedModel, WeightStore

__all__ = [
    "DENOISERS",
    "GUIDED",
    "denoiser_folder",
    "denoiser_of",
    "is_denoiser",
    "is_pipeline",
    "load_denoiser",
    "load_pipeline",
    "open_denoiser",
    "pipeline_class",
]

DENOISERS = {
    "FluxPipeline": "transformer",
    "FluxKontextPipeline": "transformer",
    "StableDiffusion3Pipeline": "transformer",
    "StableDiffusionXLPipeline": "unet",
}
GUIDED = ("StableDiffusion3Pipeline", "StableDiffusionXLPipeline")
"""Those whose guidance runs the denoiser on a negative prompt, too; Flux is told a number."""


def pipeline_class(path: os.PathLike[str] | str) -> type[DiffusionPipeline]:
    """The class of the pipeline in a folder.

    Raises:
        ValueError: there is no pipeline, or it is of a class that is not supported.
    """
    if not is_pipeline(path):
        raise ValueError(
            f"{path} is no diffusion pipeline ({MODEL_INDEX} is missing): give a folder that the "
            "`save_pretrained` of a pipeline wrote."
        )
    name = read_json(Path(path) / MODEL_INDEX).get("_class_name")
    if name not in DENOISERS:
        raise ValueError(
            f"{path} is a pipeline of class {name!r}, and those supported are "
            f"{', '.join(DENOISERS)}: give a pipeline of one of them."
        )
    return getattr(diffusers, name)


def denoiser_folder(path: os.PathLike[str] | str) -> Path:
    """The folder of a pipeline's denoiser; a denoiser's own folder as it is.

    Raises:
        ValueError: the path is neither.
    """
    if is_pipeline(path):
        return Path(path) / DENOISERS[pipeline_class(path).__name__]
    if is_denoiser(path):
        return Path(path)
    raise ValueError(
        f"{path} holds neither a diffusion pipeline ({MODEL_INDEX}) nor a denoiser (a config.json "
        "with _class_name): give a folder that diffusers' `save_pretrained` wrote."
    )


def denoiser_of(pipeline: DiffusionPipeline) -> ModelMixin:
    """The part of a loaded pipeline that is compressed and fine-tuned."""
    return getattr(pipeline, DENOISERS[type(pipeline).__name__])


def load_denoiser(
    path: os.PathLike[str] | str, *, dtype: torch.dtype, device: torch.device | str
) -> ModelMixin:
    """Load a denoiser, of an original or an emulator, in evaluation mode.

    Args:
        path: folder of a pipeline or of a denoiser.
        dtype: of its parameters.
        device: where to put them.

    Raises:
        ValueError: the checkpoint cannot be loaded; the message says why.
    """
    folder = denoiser_folder(path)
    kind, _ = _class_and_config(folder)
    try:
        with quiet_diffusers():
            model, info = kind.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{folder} could not be loaded: {_first_line(error)}") from error
    parameters = dict(model.named_parameters())
    if missing := sorted(name for name in info["missing_keys"] if name in parameters):
        raise _incomplete(folder, missing)
    return model.to(device).eval()


def empty_denoiser(path: os.PathLike[str] | str, *, dtype: torch.dtype) -> ModelMixin:
    """A denoiser, of an original or an emulator, with its parameters on the meta device and those
    of its buffers that its config says."""
    kind, config = _class_and_config(denoiser_folder(path))
    quantization = config.pop("quantization_config", None)
    with quiet_diffusers(), _default_dtype(dtype), init_empty_weights():
        model = kind.from_config(config)
    if quantization is not None:
        replace_linears(model, quantization["ranks"])
        model.register_to_config(quantization_config=EmlocConfig.from_dict(quantization))
    _keep_in_float32(model)
    return model


def open_denoiser(path: os.PathLike[str] | str, *, dtype: torch.dtype) -> OpenedModel:
    """Open a denoiser, of an original or an emulator, with its parameters on the meta device.

    Its buffers are real: those in the files are read, the others computed.

    Raises:
        ValueError: the checkpoint is incomplete or no denoiser; the message says what it lacks.
    """
    folder = denoiser_folder(path)
    quantization = _class_and_config(folder)[1].get("quantization_config")
    if quantization is not None and quantization.get("quant_method") != METHOD:
        raise ValueError(
            f"{folder} is quantised (method {quantization.get('quant_method', 'unknown')!r}), and "
            "only full weights can be streamed: name the unquantised checkpoint."
        )
    model = empty_denoiser(folder, dtype=dtype)
    store = WeightStore(_locations(folder))
    missing = [name for name, _ in model.named_parameters() if name not in store.locations]
    if missing:
        raise _incomplete(folder, missing)
    _load_buffers(model, store, dtype)
    return OpenedModel(model.eval(), store)


def load_pipeline(
    path: os.PathLike[str] | str,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    denoiser: ModelMixin | None = None,
    adapter: Path | None = None,
    encoders: bool = True,
    offload: bool = False,
) -> DiffusionPipeline:
    """Load a whole pipeline, its progress bars off.

    Args:
        path: folder of the pipeline.
        dtype: of what is loaded.
        device: where to put it.
        denoiser: another one (an emulator, one in training) in place of its own.
        adapter: folder of an adapter, loaded by the pipeline's `load_lora_weights`.
        encoders: whether to load the text encoders; without them prompts are given as embeddings.
        offload: on an accelerator, keep only the component that runs there.

    Raises:
        ValueError: the pipeline or the adapter cannot be loaded; the message says why.
    """
    kind = pipeline_class(path)
    listed = read_json(Path(path) / MODEL_INDEX)
    parts: dict[str, Any] = {name: None for name, kept in listed.items() if kept == [None, None]}
    if denoiser is not None:
        parts[DENOISERS[kind.__name__]] = denoiser
    if not encoders:
        parts |= {name: None for name in listed if name.startswith("text_encoder")}
    try:
        with quiet_diffusers(), quiet_libraries():
            pipeline = kind.from_pretrained(path, dtype=dtype, use_safetensors=True, **parts)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} could not be loaded: {_first_line(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        _put_on(pipeline, adapter)
    if offload and torch.device(device).type != "cpu":
        pipeline.enable_model_cpu_offload(device=device)
        return pipeline
    return pipeline.to(device)


def _put_on(pipeline: Any, adapter: Path) -> None:
    try:
        with quiet_diffusers():
            pipeline.load_lora_weights(str(adapter))
    except (KeyError, NotImplementedError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"the adapter {adapter} could not be loaded: {_first_line(error)}"
        ) from error
    if not getattr(denoiser_of(pipeline), "peft_config", None):
        raise ValueError(
            f"the adapter {adapter} holds nothing for the denoiser of {type(pipeline).__name__}: "
            "name an adapter that was trained for this pipeline."
        )


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _class_and_config(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The class of a denoiser, and its config.json."""
    if not is_denoiser(folder):
        raise ValueError(
            f"{folder} is no denoiser (it has no config.json with _class_name): copy or download "
            "the pipeline again."
        )
    config = read_json(folder / "config.json")
    kind = getattr(diffusers, config["_class_name"], None)
    if not (isinstance(kind, type) and issubclass(kind, ModelMixin)):
        raise ValueError(
            f"{folder / 'config.json'} names the class {config['_class_name']!r}, which is no "
            "model of the installed diffusers: install the version that wrote it."
        )
    return kind, config


def _keep_in_float32(model: ModelMixin) -> None:
    """Give the parameters that diffusers always loads in float32 that dtype."""
    kept: set[str] = set(model._keep_in_fp32_modules or [])
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and kept & {*name.split("."), key}:
                module._parameters[key] = nn.Parameter(parameter.float(), requires_grad=False)


def _locations(folder: Path) -> dict[str, Location]:
    """Where each tensor of a denoiser's files lies."""
    locations: dict[str, Location] = {}
    for file in weight_files(folder, str(folder)):
        try:
            with safe_open(folder / file, framework="pt") as handle:
                locations |= {key: Location(folder / file, key) for key in handle.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{folder / file} is missing, cut short or corrupt ({error}): copy or download "
                "it again."
            ) from error
    return locations


def _load_buffers(model: ModelMixin, store: WeightStore, dtype: torch.dtype) -> None:
    """Read the buffers that are stored, in the dtype that diffusers gives them."""
    stored = {name for name, _ in model.named_buffers()} & set(store.locations)
    for name, value in store.read(sorted(stored)).items():
        parent, _, key = name.rpartition(".")
        owner = model.get_submodule(parent)
        kept: set[str] = set(model._keep_in_fp32_modules or [])
        wanted = torch.float32 if kept & {*name.split(".")} else dtype
        owner._buffers[key] = value.to(wanted) if value.is_floating_point() else value


def _incomplete(folder: Path, missing: list[str]) -> ValueError:
    return ValueError(
        f"{folder} holds no weights for {missing[0]} ({len(missing)} parameters in all): the "
        "checkpoint is incomplete; copy or download it again."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

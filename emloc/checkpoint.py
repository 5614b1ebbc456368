"""A checkpoint folder on the disk: is it whole, which files matter, what are their hashes.

A checkpoint is a model's folder, or that of a diffusion pipeline with a folder for each component.

- `is_pipeline`, `is_denoiser`: what diffusers wrote, or else transformers
- `check_whole`: a config and every weight there and readable, safetensors only
- `deciding_files`: weights, index, config, tokenizer, processor and scheduler
- `copy_companions`: tokenizer and processor
- `digests`: hashes, remembered beside size and modification time so that big files are read once
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from emloc.files import read_json, write_json

WEIGHTS = "model.safetensors"
DENOISER_WEIGHTS = "diffusion_pytorch_model.safetensors"  # of any model that diffusers saves
INDEX = "model.safetensors.index.json"
MODEL_INDEX = "model_index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Files besides the weights that decide what a model computes and what it says.
_SIDE_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.*", "vocab.*", "merges.txt",
    "*.model", "*.tiktoken", "*processor_config.json", "scheduler_config.json",
)  # fmt: skip


def is_pipeline(path: os.PathLike[str] | str) -> bool:
    """Whether a folder is a diffusion pipeline's, with a folder for each component."""
    return (Path(path) / MODEL_INDEX).is_file()


def is_denoiser(path: os.PathLike[str] | str) -> bool:
    """Whether a folder is one that diffusers saved a single model in, such as an emulator's."""
    file = Path(path) / "config.json"
    config = read_json(file) if file.is_file() else None
    return isinstance(config, dict) and "_class_name" in config


def index_of(weights: str) -> str:
    """Name of the index beside the shards of a checkpoint; `weights` names it in one file."""
    return f"{weights}.index.json"


def components(pipeline: Path) -> list[str]:
    """Names of a pipeline's components, those that are switched off left out.

    Raises:
        ValueError: the pipeline's list is malformed.
    """
    content = read_json(pipeline / MODEL_INDEX)
    if not isinstance(content, dict) or not isinstance(content.get("_class_name"), str):
        raise ValueError(
            f"The file {pipeline / MODEL_INDEX} names no pipeline class: use the one that belongs "
            "to the pipeline."
        )
    return sorted(
        name
        for name, kind in content.items()
        if isinstance(kind, list) and kind[:1] not in ([], [None])
    )


def check_whole(folder: Path, source: str) -> None:
    """Make sure that a folder holds a config and every weight, readable.

    Raises:
        ValueError: the first thing that is missing or broken, by name; `source` says whose it is.
    """
    if is_pipeline(folder):
        for name in components(folder):
            _check_component(folder / name, source)
        return
    if not folder.is_dir() or not (folder / "config.json").is_file():
        raise ValueError(
            f"The model {source!r} has no config.json in {folder}: give a folder that "
            "`save_pretrained` wrote, or a folder with one GGUF file."
        )
    config = read_json(folder / "config.json")
    if isinstance(config, dict) and "_class_name" in config:
        raise ValueError(
            f"The model {source!r} is one component of a diffusion pipeline "
            f"({config['_class_name']}): give the folder of the whole pipeline, which holds "
            f"{MODEL_INDEX}."
        )
    if not isinstance(config, dict) or not config.get("model_type"):
        raise ValueError(
            f"The file {folder / 'config.json'} names no model_type: use the config.json that "
            "belongs to the model."
        )
    _check_weights(folder, source)


def _check_component(folder: Path, source: str) -> None:
    """One component of a pipeline: a model with all its weights, or a tokenizer or a scheduler."""
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        if "quantization_config" in config:
            raise ValueError(
                f"The model {source!r} is quantised ({folder / 'config.json'}), and an emulator is "
                "cut from full weights: give the unquantised pipeline."
            )
        _check_weights(folder, source)
    elif not any(side for glob in _SIDE_FILES for side in folder.glob(glob)):
        raise ValueError(
            f"The component {folder} has no config, though {MODEL_INDEX} lists it: copy or "
            "download the pipeline again."
        )


def _check_weights(folder: Path, source: str) -> None:
    for shard, tensors in weight_files(folder, source).items():
        _check_shard(folder / shard, tensors)


def _check_shard(path: Path, tensors: set[str]) -> None:
    """Read a weight file's header; compare it with what the index says that it holds."""
    if not path.is_file():
        raise ValueError(
            f"The weight file {path} is missing, though {INDEX} lists it: copy or download it "
            "again."
        )
    try:
        with safe_open(path, "pt") as file:
            absent = tensors - set(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"The weight file {path} is cut short or corrupt ({error}): copy or download it again."
        ) from error
    if absent:
        raise ValueError(
            f"The weight file {path} lacks {min(absent)!r}, which {INDEX} says it holds: copy or "
            "download both again."
        )


def weight_files(folder: Path, source: str) -> dict[str, set[str]]:
    """The weight files of a checkpoint, each with the tensors that the index says it holds.

    Raises:
        ValueError: there are no safetensors weights, or the index is malformed.
    """
    name = DENOISER_WEIGHTS if is_denoiser(folder) else WEIGHTS
    whole, index = folder / name, folder / index_of(name)
    if index.is_file() and (name == DENOISER_WEIGHTS or not whole.is_file()):
        return _shards(index)  # of both, diffusers reads the shards and transformers the one file
    if whole.is_file():
        return {name: set()}
    if variants := sorted(path.name for path in folder.glob(f"{Path(name).stem}.*.safetensors*")):
        raise ValueError(
            f"The model {source!r} has only the variant {variants[0]} of its weights in {folder}: "
            f"give one with {name}, which the `save_pretrained` of the loaded model writes."
        )
    if pickles := sorted(path.name for glob in _PICKLES for path in folder.glob(glob)):
        kind = "DiffusionPipeline" if is_denoiser(folder) else "AutoModelForCausalLM"
        raise ValueError(
            f"The model {source!r} has its weights only in a pickle file ({pickles[0]}), and only "
            "safetensors or GGUF are read, because a pickle can run code: convert it where you "
            f"trust it, with {kind}.from_pretrained(FOLDER).save_pretrained(NEW)."
        )
    raise ValueError(
        f"The model {source!r} has no safetensors weights in {folder}: give a model with "
        f"{name}, or with {index_of(name)} and its shards."
    )


def _shards(index: Path) -> dict[str, set[str]]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"The file {index} has no weight_map: copy or download it again, with its shards."
        )
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        shards.setdefault(shard, set()).add(tensor)
    return dict(sorted(shards.items()))


def deciding_files(folder: Path, source: str) -> list[str]:
    """The names of the files that decide what a model computes and what it says, sorted.

    Those of a pipeline's components are relative, like "vae/config.json".

    Raises:
        ValueError: as in `weight_files`.
    """
    if not is_pipeline(folder):
        return sorted(_deciding(folder, source))
    names = {MODEL_INDEX}
    for name in components(folder):
        names |= {f"{name}/{file}" for file in _deciding(folder / name, source)}
    return sorted(names)


def _deciding(folder: Path, source: str) -> set[str]:
    names = {side.name for glob in _SIDE_FILES for side in folder.glob(glob)}
    if "config.json" in names:
        shards = weight_files(folder, source)
        names |= shards.keys()
        weights = DENOISER_WEIGHTS if is_denoiser(folder) else WEIGHTS
        if weights not in shards:
            names.add(index_of(weights))
    return names


def copy_companions(source: Path, folder: Path) -> None:
    """Copy what a model is used with (tokenizer, processor, templates, generation settings)."""
    for file in (file for pattern in _SIDE_FILES for file in source.glob(pattern)):
        if file.name != "config.json":
            shutil.copyfile(file, folder / file.name)


def digests(
    folder: Path, names: list[str], *, stamps: Path, expected: dict[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """Size in bytes and hex SHA-256 of the named files, with a bar over the bytes to be read.

    Args:
        folder: where the files lie.
        names: file names inside `folder`.
        stamps: folder for local notes (size, modification time, hash). A noted hash is used again
            while the file's size and modification time have not changed.
        expected: hex SHA-256 of every name; a noted hash is then used only if it is this one.
    """
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    stamp_file = stamps / f"{key}.json"
    known: dict[str, dict[str, Any]] = read_json(stamp_file) if stamp_file.is_file() else {}
    stamp: dict[str, dict[str, Any]] = {}
    for name in names:
        status = (folder / name).stat()
        entry: dict[str, Any] = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
        old = known.get(name, {})
        digest = old.get("sha256")
        trusted = {field: old.get(field) for field in entry} == entry and digest is not None
        if trusted and (expected is None or expected[name] == digest):
            entry["sha256"] = digest
        stamp[name] = entry
    unread = [name for name, entry in stamp.items() if "sha256" not in entry]
    total = sum(stamp[name]["size"] for name in unread)
    with tqdm(total=total, unit="B", unit_scale=True, desc="hashing the model", delay=1) as bar:
        for name in unread:
            stamp[name]["sha256"] = _hash(folder / name, bar)
    if unread:
        write_json(stamp_file, {**known, **stamp})
    return {
        name: {"size": entry["size"], "sha256": entry["sha256"]} for name, entry in stamp.items()
    }


def _hash(path: Path, bar: tqdm[Any]) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()

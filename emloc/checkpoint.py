"""A checkpoint folder on the disk: is it whole, which files matter, what are their hashes.

- `check_whole`: a config and every weight there and readable, safetensors only
- `deciding_files`: weights, index, config, tokenizer and processor
- `copy_companions`: the last two
- `digests`: hashes, remembered beside size and modification time so that big files are read once
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from emloc.files import read_json, write_json

_WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Files besides the weights that decide what a model computes and what it says.
_SIDE_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.*", "vocab.*", "merges.txt",
    "*.model", "*.tiktoken", "*processor_config.json",
)  # fmt: skip


def check_whole(folder: Path, source: str) -> None:
    """Make sure that a folder holds a config and every weight, readable.

    Raises:
        ValueError: the first thing that is missing or broken, by name; `source` says whose it is.
    """
    if not folder.is_dir() or not (folder / "config.json").is_file():
        raise ValueError(
            f"The model {source!r} has no config.json in {folder}: give a folder that "
            "`save_pretrained` wrote, or a folder with one GGUF file."
        )
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or not config.get("model_type"):
        raise ValueError(
            f"The file {folder / 'config.json'} names no model_type: use the config.json that "
            "belongs to the model."
        )
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
    if (folder / _WEIGHTS).is_file():
        return {_WEIGHTS: set()}
    if (folder / INDEX).is_file():
        return _shards(folder / INDEX)
    if pickles := sorted(path.name for glob in _PICKLES for path in folder.glob(glob)):
        raise ValueError(
            f"The model {source!r} has its weights only in a pickle file ({pickles[0]}), and only "
            "safetensors or GGUF are read, because a pickle can run code: convert it where you "
            "trust it, with AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)."
        )
    raise ValueError(
        f"The model {source!r} has no safetensors weights in {folder}: give a model with "
        f"{_WEIGHTS}, or with {INDEX} and its shards."
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

    Raises:
        ValueError: as in `weight_files`.
    """
    shards = weight_files(folder, source)
    names = {*shards, *(side.name for glob in _SIDE_FILES for side in folder.glob(glob))}
    if _WEIGHTS not in shards:
        names.add(INDEX)
    return sorted(names)


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

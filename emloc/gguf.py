"""A GGUF file turned into a plain safetensors checkpoint.

- every weight is dequantised and saved as bfloat16, with the tokenizer and its chat template
- converted once: the folder's name comes from the file's content
- the written bytes hold no path, so that equal files give equal folders on any machine
"""

from __future__ import annotations

import hashlib
import struct
import sys
from pathlib import Path
from typing import Any

from filelock import FileLock

from emloc.files import read_json, sha256, write_json, writing

FORMAT = 1  # raise when the written bytes change, so that older folders are not found again
_LOCAL_KEYS = {"transformers_version", "quantization_config", "is_local", "local_files_only"}


def converted(gguf: Path, models: Path) -> Path:
    """Return the folder under `models` that holds `gguf` as safetensors, converting it if need be.

    Two processes may ask for the same file at once: one converts, the other waits for it.

    Raises:
        ValueError: the file is no GGUF, is cut short, or holds an architecture that transformers
            cannot read from a GGUF.
    """
    key = hashlib.sha256(f"{sha256(gguf)} bfloat16 {FORMAT}".encode()).hexdigest()[:32]
    folder = models / key
    models.mkdir(parents=True, exist_ok=True)
    with FileLock(models / f".{key}.lock"):
        if not folder.is_dir():
            with writing(folder) as partial:
                convert(gguf, partial)
    return folder


def convert(gguf: Path, folder: Path) -> None:
    """Write the model and the tokenizer of `gguf` into the new folder `folder`.

    The weights are dequantised in memory: it takes 2 bytes a parameter, and as much on the disk.

    Raises:
        ValueError: as in `converted`.
    """
    with open(gguf, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(
                f"{gguf} is not a GGUF file (its first bytes are not 'GGUF'): download it again, "
                "or use a folder with safetensors weights."
            )
    print(f"converting {gguf.name} to safetensors (once) ...", file=sys.stderr, flush=True)
    try:
        _save(gguf, folder)
    except (ValueError, KeyError, IndexError, TypeError, NotImplementedError, OSError,
            RuntimeError, struct.error) as error:  # fmt: skip
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(
            f"{gguf} cannot be converted to safetensors ({reason}): download it again if it may be "
            "cut short, or use the same model in safetensors format."
        ) from error


def _save(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        local_files_only=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, local_files_only=True
    )
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A model that came from a GGUF refuses to be saved, so an empty one of the same shape lends
    # its `save_pretrained`.
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shell.generation_config = model.generation_config
    shell.save_pretrained(folder, state_dict=model.state_dict())
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            write_json(folder / name, _without_local_keys(read_json(folder / name)))


def _without_local_keys(content: dict[str, Any]) -> dict[str, Any]:
    """Drop what depends on the machine or on the way in which the model was loaded."""
    return {
        key: value
        for key, value in content.items()
        if key not in _LOCAL_KEYS and not key.endswith("name_or_path")
    }

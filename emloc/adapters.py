"""LoRA adapters in files: those that peft saves, and those that diffusers saves for a pipeline.

- `find_adapter`: which of the two a folder holds
- `AdapterFolder`: its tensors, its LoRA config and their names; written back marked as corrected

peft writes `adapter_model.safetensors` and `adapter_config.json`. A pipeline's `save_lora_weights`
writes `pytorch_lora_weights.safetensors`, with the config as JSON in the file's header.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

WEIGHTS = "adapter_model.safetensors"
PIPELINE_WEIGHTS = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"  # where diffusers keeps the config in the header
PREFIX = "base_model.model"
COMPONENTS = ("transformer", "unet")
MARK = {"format": "pt", "emloc": "corrected"}  # in the header of a corrected adapter's weights


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on the disk.

    Attributes:
        folder: where it lies.
        weights: name of its weight file.
        prefix: what stands before a layer's name in the file, without the dot.
    """

    folder: Path
    weights: str
    prefix: str

    @property
    def file(self) -> Path:
        """The weight file."""
        return self.folder / self.weights

    def keys(self, name: str) -> tuple[str, str]:
        """Names of A and B of a layer in the file."""
        return f"{self.prefix}.{name}.lora_A.weight", f"{self.prefix}.{name}.lora_B.weight"

    def header(self) -> dict[str, str]:
        """What the file says of itself."""
        with safe_open(self.file, framework="pt") as handle:
            return handle.metadata() or {}

    def read_raw(self) -> dict[str, Tensor]:
        """The tensors of an adapter that may be corrected.

        Raises:
            ValueError: it was corrected already, or holds values that are not finite.
        """
        if self.header().get("emloc") == MARK["emloc"]:
            raise ValueError(
                f"{self.folder} was corrected already, and correcting it twice would spoil it: "
                "name the raw adapter."
            )
        with safe_open(self.file, framework="pt") as handle:
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}
        for key, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise ValueError(
                    f"{self.file} holds values in {key} that are not finite (NaN or infinite): "
                    "train the adapter again, with a lower learning rate."
                )
        return tensors

    def config(self) -> LoraConfig:
        """The settings it was trained with.

        Raises:
            ValueError: they are missing, or not those of plain LoRA.
        """
        config = self._peft_config() if self.weights == WEIGHTS else self._header_config()
        if type(config) is not LoraConfig or config.use_dora or config.lora_bias:
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise ValueError(
                f"{self.folder} is a {kind} adapter with settings other than plain LoRA (no DoRA, "
                "no lora_bias), which is all that can be corrected: train it without them."
            )
        return config

    def _peft_config(self) -> PeftConfig:
        try:
            return PeftConfig.from_pretrained(str(self.folder))
        except ValueError as error:
            raise ValueError(
                f"{self.folder / 'adapter_config.json'} is missing or cannot be read ({error}): "
                "train the adapter again."
            ) from error

    def _header_config(self) -> PeftConfig:
        try:
            metadata: dict[str, Any] = json.loads(self.header()[METADATA])
            start = f"{self.prefix}."
            fields = {k.removeprefix(start): v for k, v in metadata.items() if k.startswith(start)}
            if "r" not in fields:
                raise KeyError(f"{self.prefix}.r")
            return PeftConfig.from_peft_type(**{"peft_type": "LORA", **fields})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.file} does not say in its header ({METADATA}) how the adapter is scaled "
                f"({error}): save it with its LoRA config, as `save_lora_weights` does when it is "
                "given one."
            ) from error

    def write_corrected(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """Copy the adapter to a new folder, with other tensors and the mark."""
        shutil.copytree(self.folder, folder)
        others = {key: text for key, text in sorted(self.header().items()) if key not in MARK}
        save_with_header(tensors, folder / self.weights, {**MARK, **others})


def find_adapter(folder: Path | str) -> AdapterFolder:
    """The adapter in a folder.

    Raises:
        ValueError: there is none, or its file cannot be read.
    """
    folder = Path(folder)
    of_pipeline = (folder / PIPELINE_WEIGHTS).is_file() and not (folder / WEIGHTS).is_file()
    weights = PIPELINE_WEIGHTS if of_pipeline else WEIGHTS
    if not (folder / weights).is_file():
        raise ValueError(
            f"{folder} is no adapter folder: {WEIGHTS} is missing, as is {PIPELINE_WEIGHTS}, which "
            "a diffusion pipeline would have; train it first."
        )
    try:
        with safe_open(folder / weights, framework="pt") as handle:
            starts = {key.partition(".")[0] for key in handle.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"{folder / weights} cannot be read ({error}): train the adapter again."
        ) from error
    if not of_pipeline:
        return AdapterFolder(folder, weights, PREFIX)
    components = [name for name in COMPONENTS if name in starts]
    if not components:
        raise ValueError(
            f"{folder / weights} holds nothing for a denoiser (its names start with "
            f"{', '.join(sorted(starts)) or 'nothing'} instead of {' or '.join(COMPONENTS)}): name "
            "an adapter that a pipeline's `save_lora_weights` wrote."
        )
    return AdapterFolder(folder, weights, components[0])


def save_with_header(tensors: dict[str, Tensor], file: Path, header: dict[str, str]) -> None:
    """Save tensors; safetensors writes several header entries in random order, this in theirs."""
    content = save(tensors, metadata=header)
    start = 8 + int.from_bytes(content[:8], "little")
    whole = {**json.loads(content[8:start]), "__metadata__": header}
    text = json.dumps(whole, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[start:])

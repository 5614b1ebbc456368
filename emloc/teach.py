"""What the original says at each token of some rows: the targets that an emulator is healed with.

- `teach`: stream rows through the original, in waves, and keep its likeliest next tokens
- `Targets`: read them back row by row
- `divergence`: how far another model's logits are from them

The original is never resident: each wave of rows reads its weights once (see `emloc.streaming`).

Letters: n taught positions, m likeliest tokens kept of each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from emloc.families import Codec, labelled_batches
from emloc.files import read_json, write_json, writing
from emloc.streaming import Stream
from emloc.weights import OpenedModel

_INDEX = "targets.json"
_ENTRY_BYTES = 8  # an id and a log-probability
_PICTURE_TOKENS = ("image_token_id", "image_token_index")
_LEAST = 1e-6  # of a probability, so that its logarithm is finite


def taught_labels(config: Any, example: Mapping[str, Any]) -> list[int]:
    """The tokens of an example that are learnt from, -100 for the others: all but the first, and
    but what stands for a picture."""
    pictures = {getattr(config, name, None) for name in _PICTURE_TOKENS}
    ids = example["input_ids"]
    return [-100, *(-100 if token in pictures else token for token in ids[1:])]


def teach(
    opened: OpenedModel,
    examples: Sequence[Mapping[str, Any]],
    *,
    codec: Codec,
    top_k: int,
    batch_size: int,
    wave: int,
    out: Path | str,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> dict[str, Any]:
    """Write the original's `top_k` highest log-probabilities before each taught token.

    Peak memory: that of streaming a wave (one unit, the next one being read, a hidden state for
    each batch of the wave), and the logits of one batch.

    Args:
        opened: the original.
        examples: as the codec's `encode` gives them; the whole rows are learnt from, not only what
            is labelled.
        codec: the one that encoded them.
        top_k: m; the rest of the vocabulary is one more outcome.
        batch_size: rows in one forward.
        wave: rows that stream together; a larger wave reads the weights less often.
        out: folder to create: a safetensors file a wave, and targets.json.
        device: where to compute.
        progress: show a bar over the waves, and one over the units of each.

    Returns:
        What targets.json holds.

    Raises:
        ValueError: `top_k` is not from 1 to V, the rows have nothing to teach, or the disk has no
            room.
    """
    config: Any = opened.model.config
    vocabulary = config.get_text_config().vocab_size
    if not 1 <= top_k <= vocabulary:
        raise ValueError(
            f"top_k is {top_k}, but it must be from 1 to {vocabulary}, the size of the vocabulary."
        )
    labels = [taught_labels(config, example) for example in examples]
    counts = [sum(label != -100 for label in row) for row in labels]
    if not sum(counts):
        raise ValueError("there is no token to teach: give at least one row of two tokens.")
    rows = [{**e, "labels": row} for e, row in zip(examples, labels, strict=True)]
    index = {"top_k": top_k, "wave": wave, "counts": counts}
    stream = Stream(opened, device)
    starts = range(0, len(rows), wave)
    with writing(out, size=sum(counts) * top_k * _ENTRY_BYTES) as folder:
        folder.mkdir()
        for number, start in enumerate(tqdm(starts, desc="teach", disable=not progress)):
            found = _wave(stream, rows[start : start + wave], codec, top_k, batch_size)
            save_file(found, wave_file(folder, number))
        write_json(folder / _INDEX, index)
    return index


def _wave(
    stream: Stream, rows: Sequence[Mapping[str, Any]], codec: Codec, top_k: int, batch_size: int
) -> dict[str, Tensor]:
    """The targets of some rows: `ids` (n, m) int32, `logprobs` (n, m) float32."""
    batches = labelled_batches(codec, rows, batch_size)
    masks = [labels[:, 1:] != -100 for _, labels in batches]
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(place: int, output: Any) -> None:
        logits = output.logits[:, :-1][masks[place].to(output.logits.device)]  # (n, V)
        logprobs, ids = logits.float().log_softmax(-1).topk(top_k)
        found[place] = ids.int().cpu(), logprobs.cpu()

    stream.run([send_to_device(batch, stream.device) for batch, _ in batches], on_output=keep)
    ids, logprobs = zip(*(found[place] for place in range(len(batches))), strict=True)
    return {"ids": torch.cat(ids), "logprobs": torch.cat(logprobs)}


def wave_file(folder: Path, number: int) -> Path:
    """What a wave of rows gave, as safetensors."""
    return folder / f"{number:05}.safetensors"


def open_waves(folder: Path, rows: int, wave: int) -> list[Any]:
    """The files of all waves, mapped into memory."""
    return [safe_open(wave_file(folder, number), "pt") for number in range(-(-rows // wave))]


class Targets:
    """Reads what `teach` wrote.

    Attributes:
        top_k: m.
        counts: taught positions of each row.

    Raises:
        FileNotFoundError: the folder holds no targets.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        index = read_json(self.folder / _INDEX)
        self.top_k: int = index["top_k"]
        self.counts: list[int] = index["counts"]
        self._wave: int = index["wave"]

    def row(self, number: int) -> tuple[Tensor, Tensor]:
        """`ids` (n, m) int64 and `logprobs` (n, m) float32 of one row."""
        wave = number // self._wave
        first = sum(self.counts[wave * self._wave : number])
        part = slice(first, first + self.counts[number])
        file = self._files[wave]
        return file.get_slice("ids")[part].long(), file.get_slice("logprobs")[part]

    @cached_property
    def _files(self) -> list[Any]:
        return open_waves(self.folder, len(self.counts), self._wave)


def divergence(logits: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(original ‖ model) at each position, in nats.

    The outcomes are the m kept tokens and the rest of the vocabulary as one, so it is a lower bound
    of the divergence over all tokens, and 0 where both models agree.

    Args:
        logits: of the model, (n, V).
        ids, logprobs: of the original, (n, m).

    Returns:
        (n,) in float32.
    """
    mine = logits.float().log_softmax(-1).gather(-1, ids)
    kept = logprobs.exp()
    rest, rest_of_mine = ((1 - p.sum(-1)).clamp_min(_LEAST) for p in (kept, mine.exp()))
    return (kept * (logprobs - mine)).sum(-1) + rest * (rest.log() - rest_of_mine.log())

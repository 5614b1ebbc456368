"""Let a model answer the test rows and score it; `baseline` and `evaluate` both do it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from emloc.devices import pick_dtype
from emloc.files import read_jsonl, write_jsonl
from emloc.generate import generate_answers, mean_loss
from emloc.metrics import references_of, score
from emloc.models import load_model
from emloc.offload import shares
from emloc.plug import plug
from tasks import layout
from tasks.encoding import codec_of, encode
from tasks.original import find_original
from tasks.params import Params


def score_answers(
    base: Path,
    adapter: Path | None,
    params: Params,
    *,
    label: str,
    predictions: Path,
    device: torch.device,
    placed: dict[str, dict[str, float]] | None = None,
) -> dict[str, float]:
    """Metrics of greedy answers to the test rows.

    Args:
        base: the original, a quantised copy of it, or an emulator.
        adapter: on top of it, if any.
        label: of the progress bars.
        predictions: where the answers go, `.jsonl` added to its name.
        device: to compute on; weights that do not fit it are left in other memory or on the disk.
        placed: filled in with where the weights of `label` are.
    """
    dtype = pick_dtype(params.model.dtype)
    budget = params.memory.budget_bytes
    model: nn.Module = load_model(
        base, dtype=dtype, device=device, offload=True, budget_bytes=budget
    )
    if placed is not None:
        placed[label] = shares(model)
    if adapter is not None:
        model = plug(model, adapter)
    codec = codec_of(find_original(params)[0], params)  # a quantised copy may lack its files
    settings = params.evaluate
    rows = read_jsonl(layout.rows("test"))
    examples = encode("test", codec, params)
    answers = generate_answers(
        model,
        codec,
        examples,
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        progress=f"{label}: answers",
    )
    loss = mean_loss(
        model,
        codec,
        examples,
        batch_size=settings.batch_size,
        progress=f"{label}: loss",
    )
    write_jsonl(
        predictions.with_name(f"{predictions.name}.jsonl"),
        ({**row, "prediction": answer} for row, answer in zip(rows, answers, strict=True)),
    )
    references = [references_of(row) for row in rows]
    return {**score(answers, references, settings.metrics), "loss": loss}


def validation_loss_of_answers(
    params: Params, adapter: Path, label: str, device: torch.device
) -> float:
    """Mean loss of the original with an adapter on the validation rows."""
    path, _ = find_original(params)
    model = load_model(
        path,
        dtype=pick_dtype(params.model.dtype),
        device=device,
        offload=True,
        budget_bytes=params.memory.budget_bytes,
    )
    codec = codec_of(path, params)
    return mean_loss(
        plug(model, adapter),
        codec,
        encode("validation", codec, params),
        batch_size=params.evaluate.batch_size,
        progress=f"{label}: loss",
    )

"""Let a model answer the test rows and score it; `baseline` and `evaluate` both do it."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from emloc.families import Codec
from emloc.files import read_jsonl, write_jsonl
from emloc.generate import generate_answers, mean_loss
from emloc.metrics import references_of, score
from tasks import layout
from tasks.encoding import encode
from tasks.params import Params


def score_answers(
    model: nn.Module,
    codec: Codec,
    params: Params,
    *,
    label: str,
    predictions: Path,
) -> dict[str, float]:
    """Metrics of greedy answers to the test rows; the answers go to a JSON Lines file."""
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
        predictions,
        ({**row, "prediction": answer} for row, answer in zip(rows, answers, strict=True)),
    )
    references = [references_of(row) for row in rows]
    return {**score(answers, references, settings.metrics), "loss": loss}

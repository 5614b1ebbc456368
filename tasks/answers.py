"""Let a model answer the test rows and score it; `baseline` and `evaluate` both do it."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from emloc.families.text import answer_of
from emloc.files import read_jsonl, write_jsonl
from emloc.generate import generate_answers, mean_loss
from emloc.metrics import score
from tasks import layout
from tasks.encoding import encode
from tasks.params import Params


def score_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    params: Params,
    *,
    label: str,
    predictions: Path,
) -> dict[str, float]:
    """Metrics of greedy answers to the test rows; the answers go to a JSON Lines file."""
    settings = params.evaluate
    rows = read_jsonl(layout.rows("test"))
    examples = encode("test", tokenizer, params)
    answers = generate_answers(
        model,
        tokenizer,
        examples,
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        progress=f"{label}: answers",
    )
    loss = mean_loss(
        model,
        examples,
        pad_token_id=tokenizer.pad_token_id,
        batch_size=settings.batch_size,
        progress=f"{label}: loss",
    )
    write_jsonl(
        predictions,
        ({**row, "prediction": answer} for row, answer in zip(rows, answers, strict=True)),
    )
    return {**score(answers, [answer_of(row) for row in rows]), "loss": loss}

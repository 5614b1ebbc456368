"""How good answers are, each from 0 to 1: the metrics that benchmarks of questions use.

- `METRICS`: metric by name, a function of one prediction and all its accepted answers
- `score`: means over many predictions
- `references_of`: the accepted answers of a row
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from emloc.metrics.choice import multiple_choice
from emloc.metrics.texts import anls, exact_match, normalized_match, relaxed_accuracy, token_f1
from emloc.metrics.vqa import vqa_accuracy

if TYPE_CHECKING:
    from emloc.data.rows import Row

Metric = Callable[[str, Sequence[str]], float]

METRICS: Mapping[str, Metric] = {
    metric.__name__: metric
    for metric in (
        exact_match,
        normalized_match,
        token_f1,
        vqa_accuracy,
        anls,
        relaxed_accuracy,
        multiple_choice,
    )
}


def score(
    predictions: Sequence[str], references: Sequence[Sequence[str]], metrics: Sequence[str]
) -> dict[str, float]:
    """Mean of each metric over all predictions.

    Args:
        predictions: one text a row.
        references: the accepted answers of each row.
        metrics: names in `METRICS`.

    Raises:
        ValueError: an unknown metric; no rows, or not as many predictions as references; a row
            without an accepted answer, or with one text where a list of them is due.
    """
    functions = {name: _metric(name) for name in metrics}
    if len(predictions) != len(references) or not references:
        raise ValueError(
            f"there are {len(predictions)} predictions and references for {len(references)}, but "
            "there must be as many of one as of the other, and at least one."
        )
    for number, answers in enumerate(references, start=1):
        if isinstance(answers, str) or not answers:
            raise ValueError(
                f"the references of prediction {number} are {answers!r}, but they must be a list "
                "of the answers that count as right, at least one."
            )
    return {
        name: sum(map(function, predictions, references)) / len(references)
        for name, function in functions.items()
    }


def references_of(row: Row) -> list[str]:
    """The answers to a row that metrics accept: its `answers`, or else the one it is trained on."""
    if "answers" in row:
        return list(row["answers"])
    content = row["messages"][-1]["content"] if "messages" in row else row["answer"]
    if isinstance(content, str):
        return [content]
    return ["".join(part["text"] for part in content if part["type"] == "text")]


def _metric(name: str) -> Metric:
    if name in METRICS:
        return METRICS[name]
    near = difflib.get_close_matches(name, METRICS, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ValueError(f"metric is {name!r}{hint}, but it must be one of {', '.join(METRICS)}.")

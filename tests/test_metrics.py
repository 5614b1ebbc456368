"""Metrics against the behaviour of the SQuAD evaluation script."""

from __future__ import annotations

import re
import string
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emloc.metrics import exact_match, normalized_match, score, token_f1


def squad_tokens(text: str) -> list[str]:
    """SQuAD's normal form, step by step: lower, punctuation, articles, white space."""
    kept = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def squad_f1(prediction: str, answer: str) -> float:
    """SQuAD 2.0's compute_f1, from its definition by precision and recall."""
    gold, predicted = squad_tokens(answer), squad_tokens(prediction)
    same = sum((Counter(gold) & Counter(predicted)).values())
    if not gold or not predicted:
        return float(gold == predicted)
    if not same:
        return 0.0
    precision, recall = same / len(predicted), same / len(gold)
    return 2 * precision * recall / (precision + recall)


TEXTS = st.lists(st.sampled_from("The a AN the, cat. Cat cats U.S. -- é 10,000 ( an".split())).map(
    " ".join
)


@given(TEXTS, TEXTS)
def test_metrics_agree_with_squad_and_stay_in_range(prediction: str, answer: str) -> None:
    assert token_f1(prediction, answer) == pytest.approx(squad_f1(prediction, answer))
    assert normalized_match(prediction, answer) == (
        squad_tokens(prediction) == squad_tokens(answer)
    )
    assert token_f1(prediction, answer) == token_f1(answer, prediction)
    assert 0 <= exact_match(prediction, answer) <= normalized_match(prediction, answer)
    assert normalized_match(prediction, answer) <= token_f1(prediction, answer) <= 1


@pytest.mark.parametrize(
    ("prediction", "answer", "exact", "normalized", "f1"),
    [
        ("Denver Broncos", "Denver Broncos", 1, 1, 1),
        (" Denver Broncos\n", "Denver Broncos", 1, 1, 1),
        ("the denver  broncos!", "Denver Broncos", 0, 1, 1),
        ("Broncos", "Denver Broncos", 0, 0, 2 / 3),
        ("Denver Broncos won", "Denver Broncos", 0, 0, 4 / 5),
        ("broncos broncos", "Broncos of Denver", 0, 0, 2 / 5),
        ("Carolina", "Denver", 0, 0, 0),
        ("", "Denver", 0, 0, 0),
        ("The.", "a", 0, 1, 1),
        ("Denver  Broncos", "Denver Broncos", 0, 1, 1),
    ],
)
def test_worked_examples(
    prediction: str, answer: str, exact: float, normalized: float, f1: float
) -> None:
    assert exact_match(prediction, answer) == exact
    assert normalized_match(prediction, answer) == normalized
    assert token_f1(prediction, answer) == pytest.approx(f1)


def test_score_is_the_mean_of_the_pairs() -> None:
    means = score(["Paris", "the rome", "x"], ["Paris", "Rome", "y z"])
    assert means == pytest.approx(
        {"exact_match": 1 / 3, "normalized_match": 2 / 3, "token_f1": 2 / 3}
    )


@pytest.mark.parametrize(("predictions", "answers"), [([], []), (["x"], []), (["x"], ["x", "y"])])
def test_score_of_unlike_lists_raises(predictions: list[str], answers: list[str]) -> None:
    with pytest.raises(ValueError, match=f"{len(predictions)} predictions and {len(answers)}"):
        score(predictions, answers)

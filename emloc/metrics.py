"""How good an answer is: metrics of one prediction against one answer, each from 0 to 1.

`normalized_match` and `token_f1` are the exact match and F1 of the SQuAD evaluation script
(Rajpurkar et al., 2016): lower case, no punctuation, no articles, single spaces.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(prediction: str, answer: str) -> float:
    """1.0 if the two are the same text but for white space around it."""
    return float(prediction.strip() == answer.strip())


def normalized_match(prediction: str, answer: str) -> float:
    """1.0 if the two are the same once case, punctuation, articles and spacing are dropped."""
    return float(_normalize(prediction) == _normalize(answer))


def token_f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall over the normalised words.

    Where one of the two has no words left, it is 1.0 if the other has none either, else 0.0.
    """
    predicted, expected = _normalize(prediction).split(), _normalize(answer).split()
    if not predicted or not expected:
        return float(predicted == expected)
    shared = (Counter(predicted) & Counter(expected)).total()
    return 2 * shared / (len(predicted) + len(expected))


def score(predictions: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Means of `exact_match`, `normalized_match` and `token_f1` over all pairs.

    Raises:
        ValueError: no pairs, or not as many predictions as answers.
    """
    if len(predictions) != len(answers) or not answers:
        raise ValueError(
            f"there are {len(predictions)} predictions and {len(answers)} answers, but there must "
            "be as many of one as of the other, and at least one."
        )
    return {
        metric.__name__: sum(map(metric, predictions, answers)) / len(answers)
        for metric in (exact_match, normalized_match, token_f1)
    }


def _normalize(text: str) -> str:
    """SQuAD's normal form of a text."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())

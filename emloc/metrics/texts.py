"""Metrics that compare texts: the best over all accepted answers.

- `exact_match`
- `normalized_match`, `token_f1`: exact match and F1 of SQuAD's evaluation script (Rajpurkar et al.,
  2016): lower case, no punctuation, no articles, single spaces
- `anls`: average normalized Levenshtein similarity of DocVQA, InfographicVQA and ST-VQA (Biten et
  al., 2019, equation 1)
- `relaxed_accuracy`: of ChartQA (Masry et al., 2022, section 5.1), as pix2struct computes it
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

ANLS_THRESHOLD = 0.5
RELAXED_CHANGE = 0.05

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if it is the same text as an answer but for white space around it."""
    return float(prediction.strip() in [answer.strip() for answer in answers])


def normalized_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if it is the same as an answer once case, punctuation, articles and spacing are
    dropped."""
    return float(normalize(prediction) in [normalize(answer) for answer in answers])


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over the normalised words.

    Where one of two texts has no words left, it is 1.0 if the other has none either, else 0.0.
    """
    predicted = normalize(prediction).split()
    return max(_f1(predicted, normalize(answer).split()) for answer in answers)


def anls(prediction: str, answers: Sequence[str]) -> float:
    """1 - edits / length of the longer text, case and spacing aside; 0.0 below one half."""
    said = _plain(prediction)
    return max(
        Levenshtein.normalized_similarity(said, _plain(answer), score_cutoff=ANLS_THRESHOLD)
        for answer in answers
    )


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if it is a number within 5 % of an answer, or the same text, case aside.

    50% is the number 0.5. As in the published evaluation, an answer of zero must be said as it is
    written, and so must one with a thousands separator or a unit.
    """
    return float(any(_is_close(prediction.strip(), answer.strip()) for answer in answers))


def normalize(text: str) -> str:
    """SQuAD's normal form of a text."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def _f1(predicted: Sequence[str], expected: Sequence[str]) -> float:
    if not predicted or not expected:
        return float(predicted == expected)
    shared = (Counter(predicted) & Counter(expected)).total()
    return 2 * shared / (len(predicted) + len(expected))


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _is_close(prediction: str, answer: str) -> bool:
    said, meant = _number(prediction), _number(answer)
    if said is None or not meant:
        return prediction.lower() == answer.lower()
    return abs(said - meant) / abs(meant) <= RELAXED_CHANGE


def _number(text: str) -> float | None:
    """A finite number, if the text is one."""
    try:
        number = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None

"""Metrics against the evaluation scripts that define them, by their published examples."""

from __future__ import annotations

import random
import re
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emloc.metrics import METRICS, references_of, score
from emloc.metrics.pictures import PICTURE_METRICS
from emloc.metrics.texts import anls, exact_match, normalized_match, relaxed_accuracy, token_f1
from tasks.params import load_params
from tasks.report import METRIC_LABELS
from tasks.sections import MetricName, PictureMetric, TextMetric
from tests.project import ROOT


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


WORDS = "The a AN the, cat. Cat cats U.S. -- é 10,000 ( an 5% 0.05 B: (b) yes? two 2 dont".split()
TEXTS = st.lists(st.sampled_from(WORDS), max_size=4).map(" ".join)
ANSWERS = st.lists(TEXTS, min_size=1, max_size=10)


@given(TEXTS, TEXTS)
def test_metrics_agree_with_squad(prediction: str, answer: str) -> None:
    assert token_f1(prediction, [answer]) == pytest.approx(squad_f1(prediction, answer))
    assert normalized_match(prediction, [answer]) == (
        squad_tokens(prediction) == squad_tokens(answer)
    )
    assert token_f1(prediction, [answer]) == token_f1(answer, [prediction])
    assert exact_match(prediction, [answer]) <= normalized_match(prediction, [answer])
    assert normalized_match(prediction, [answer]) <= token_f1(prediction, [answer])


@pytest.mark.parametrize("name", METRICS)
@given(TEXTS, ANSWERS, st.randoms(use_true_random=False))
def test_every_metric_is_a_share_and_looks_at_answers_in_no_order(
    name: str, prediction: str, answers: list[str], order: random.Random
) -> None:
    value = METRICS[name](prediction, answers)
    assert 0 <= value <= 1
    assert value == pytest.approx(METRICS[name](f" {prediction}\n", answers))
    order.shuffle(answers)
    assert value == pytest.approx(METRICS[name](prediction, answers))


@pytest.mark.parametrize("name", sorted(set(METRICS) - {"vqa_accuracy"}))
@given(TEXTS, ANSWERS)
def test_the_best_answer_counts(name: str, prediction: str, answers: list[str]) -> None:
    best = max(METRICS[name](prediction, [answer]) for answer in answers)
    assert METRICS[name](prediction, answers) == pytest.approx(best)


@pytest.mark.parametrize("name", sorted(set(METRICS) - {"multiple_choice"}))
@given(TEXTS)
def test_saying_the_answer_is_right(name: str, answer: str) -> None:
    assert METRICS[name](answer, [answer]) == 1


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
def test_worked_examples_of_squad(
    prediction: str, answer: str, exact: float, normalized: float, f1: float
) -> None:
    assert exact_match(prediction, [answer]) == exact
    assert normalized_match(prediction, [answer]) == normalized
    assert token_f1(prediction, [answer]) == pytest.approx(f1)


def test_the_example_of_pix2struct() -> None:
    """google-research/pix2struct, metrics_test.py: test_pix2struct_metrics."""
    predictions = ["abc", "abc", "Abc", "100%", "100%", "100%", "100%", "Don't"]
    targets = ["abc", "Abc", "abc", "96%", "94%", "0.96", "0.94", "Won't"]
    names = ["exact_match", "anls", "relaxed_accuracy"]
    assert score(predictions, [[target] for target in targets], names) == pytest.approx(
        {"exact_match": 0.125, "anls": 0.475, "relaxed_accuracy": 0.625}
    )


@pytest.mark.parametrize(
    ("prediction", "value"),
    [("The Coca", 0), ("CocaCola", 0.89), ("Coca cola", 1), ("Cola", 0), ("Cat", 0)],
)
def test_the_anls_example_of_the_robust_reading_competition(prediction: str, value: float) -> None:
    """rrc.cvc.uab.es, Scene Text VQA, Tasks: "What soft drink company name is on the red disk?"."""
    answers = ["Coca Cola", "Coca Cola Company"]
    assert anls(prediction, answers) == pytest.approx(value, abs=0.005)


@pytest.mark.parametrize(
    ("prediction", "answer", "value"),
    [
        ("ab", "abcd", 0.5),
        ("CocaCola", "Coca Cola Company", 0),  # 0.47
        ("", "a", 0),
        ("", " ", 1),
        ("a  b", "A b", 1),
    ],
)
def test_anls_at_its_threshold(prediction: str, answer: str, value: float) -> None:
    assert anls(prediction, [answer]) == value


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("105", "100", True),
        ("105.1", "100", False),
        ("95", "100", True),
        ("-95", "-100", True),
        ("-95", "100", False),
        ("1e2", "100", True),
        ("52%", "50%", True),
        ("52", "50%", False),
        ("Red", "red", True),
        ("reds", "red", False),
        ("0", "0", True),
        ("0.0", "0", False),
        ("0.01", "0", False),
        ("1,234", "1234", False),
        ("1,234", "1,234", True),
        ("nan", "NaN", True),
        ("inf", "100", False),
        ("%", "%", True),
        ("five", "5", False),
    ],
)
def test_relaxed_accuracy_follows_chartqa(prediction: str, answer: str, right: bool) -> None:
    """Masry et al. (2022), section 5.1, and the code of pix2struct for what it leaves open."""
    assert relaxed_accuracy(prediction, [answer]) == right


def test_score_is_the_mean_of_the_rows_for_the_metrics_asked_for() -> None:
    references = [["Paris"], ["Athens", "Rome"], ["y z"]]
    assert score(["Paris", "the rome", "x"], references, list(METRICS)[:3]) == pytest.approx(
        {"exact_match": 1 / 3, "normalized_match": 2 / 3, "token_f1": 2 / 3}
    )
    assert list(score(["B"], [["B"]], ["multiple_choice", "anls"])) == ["multiple_choice", "anls"]


@pytest.mark.parametrize(("predictions", "answers"), [([], []), (["x"], []), (["x"], ["x", "y"])])
def test_score_of_unlike_lists_raises(predictions: list[str], answers: list[str]) -> None:
    references = [[answer] for answer in answers]
    with pytest.raises(ValueError, match=f"{len(predictions)} predictions.*for {len(references)}"):
        score(predictions, references, ["exact_match"])


@pytest.mark.parametrize("reference", [[], "yes"])
def test_score_of_a_row_without_a_list_of_answers_raises(reference: Sequence[str]) -> None:
    with pytest.raises(ValueError, match=f"prediction 2 are {re.escape(repr(reference))}, but"):
        score(["x", "y"], [["x"], reference], ["exact_match"])


def test_an_unknown_metric_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError) as raised:
        score(["x"], [["x"]], ["exact_match", "exact-match"])
    assert "'exact-match' (did you mean exact_match?)" in str(raised.value)
    assert all(name in str(raised.value) for name in METRICS)
    with pytest.raises(ValueError, match="metric is 'bleu', but"):
        score(["x"], [["x"]], ["bleu"])


@pytest.mark.parametrize(
    ("row", "references"),
    [
        ({"prompt": "?", "answer": "yes"}, ["yes"]),
        ({"prompt": "?", "answer": "yes", "answers": ["yes", "yes", "no"]}, ["yes", "yes", "no"]),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, ["hi"]),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "image": "images/x.png"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
                ]
            },
            ["a cat"],
        ),
    ],
)
def test_references_are_all_accepted_answers_or_the_rows_own(
    row: dict[str, object], references: list[str]
) -> None:
    assert references_of(row) == references


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ("[bleu]", "evaluate.metrics.0 is 'bleu', but it should be 'exact_match', "),
        ("[anls, vqa_accuracy, anls]", "names a metric twice"),
        ("[]", "evaluate.metrics is []"),
        ("anls", "evaluate.metrics is 'anls', but it should be a valid list"),
        ("null", "evaluate.metrics is None"),
    ],
)
def test_params_with_other_metrics_are_refused(tmp_path: Path, metrics: str, message: str) -> None:
    text = (ROOT / "params.yaml").read_text()
    changed = re.sub(r"(?m)^  metrics: .*$", f"  metrics: {metrics}", text)
    (tmp_path / "params.yaml").write_text(changed)
    with pytest.raises(ValueError) as raised:
        load_params(tmp_path / "params.yaml")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_params_and_report_know_all_metrics() -> None:
    assert get_args(TextMetric) == tuple(METRICS)
    assert get_args(PictureMetric) == ("loss", *PICTURE_METRICS)
    assert set(get_args(MetricName)) == set(METRIC_LABELS)

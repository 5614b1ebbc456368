"""VQA accuracy and multiple choice, by the evaluation code and the examples that define them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emloc.metrics.choice import multiple_choice
from emloc.metrics.vqa import normalize, vqa_accuracy


@pytest.mark.parametrize("said", range(11))
def test_three_of_ten_people_make_an_answer_right(said: int) -> None:
    """visualqa.org/evaluation: min(#/3, 1), averaged over all sets of nine of the ten people."""
    answers = ["red"] * said + [f"other {number}" for number in range(10 - said)]
    expected = {0: 0, 1: 0.3, 2: 0.6, 3: 0.9}.get(said, 1)
    assert vqa_accuracy("red", answers) == pytest.approx(expected)


def leave_one_out(prediction: str, answers: Sequence[str]) -> float:
    """The formula as it is written, on texts that need no normalisation."""
    shares = []
    for place in range(len(answers)):
        others = [*answers[:place], *answers[place + 1 :]]
        shares.append(min(1, others.count(prediction) / 3))
    return sum(shares) / len(shares)


@given(st.lists(st.sampled_from(["red", "blue", "green"]), min_size=2, max_size=12))
def test_vqa_accuracy_leaves_out_each_answer_in_turn(answers: list[str]) -> None:
    assert vqa_accuracy("red", answers) == pytest.approx(leave_one_out("red", answers))


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Dont", "don't"),
        ("100,978", "100978"),
        ("the girl's hat", "girl's hat"),
        ("2:50 pm", "2:50 pm"),
        ("A dog.", "dog"),
        ("3.5 miles.", "3.5 miles"),
        ("Two", "2"),
        ("none", "0"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("T-shirt", "t shirt"),
        ("black -white", "black white"),
        ("1,000-2,000", "10002000"),
        ("couldnt've", "couldn't've"),
        ("yallll yall'd've", "yallll y'all'd've"),
    ],
)
def test_texts_are_normalised_as_in_the_vqa_evaluation(text: str, normal: str) -> None:
    """The first five are those of visualqa.org/evaluation, the others of its code."""
    assert normalize(text) == normal


@pytest.mark.parametrize(
    ("prediction", "answers", "value"),
    [
        ("Yes.", ["yes"] * 10, 0),  # where all agree, the code compares texts as they are
        ("Yes.", ["yes"] * 9 + ["no"], 1),
        ("a dog", ["dog", "the dog", "Dog!"] + ["cat"] * 7, 0.9),
        ("2", ["two", "2"] + ["3"] * 8, 0.6),
        ("x-ray", ["x ray", "X-Ray", "xray", "xray", "xray"], 2 * (1 / 3) / 5 + 3 * (2 / 3) / 5),
    ],
)
def test_answers_of_the_vqa_evaluation_code(
    prediction: str, answers: list[str], value: float
) -> None:
    """Values that GT-Vision-Lab/VQA's vqaEval.py gives for the same texts."""
    assert vqa_accuracy(prediction, answers) == pytest.approx(value)


@pytest.mark.parametrize(("prediction", "value"), [("Yes.", 1), ("no", 0), ("the yes", 1)])
def test_one_answer_alone_is_a_match_of_normalised_texts(prediction: str, value: float) -> None:
    assert vqa_accuracy(prediction, ["yes"]) == value


# The example of PMC-VQA's data card: "What is the uptake pattern in the breast?"
UPTAKE = "B:Focal uptake pattern"


@pytest.mark.parametrize("answer", ["B", "b", "(B)", UPTAKE, "B: Focal uptake pattern"])
@pytest.mark.parametrize(
    "prediction",
    [
        "B",
        "b",
        " B.\n",
        "(B)",
        "**B**",
        UPTAKE,
        "B. Focal uptake pattern",
        "(b) focal uptake pattern",
        "B\n\nThe uptake is focal.",
        "The answer is B",
        "the answer is b.",
        "Answer: (B) Focal uptake pattern",
        "The correct option is B because option C shows none.",
        "Option A is wrong. Option D, too. The answer is (B).",
        "Is the answer D? No, the answer is B.",
        "Option B fits best",
        r"\boxed{B}",
        "It is focal (B), clearly.",
    ],
)
def test_an_option_is_found_however_it_is_named(prediction: str, answer: str) -> None:
    assert multiple_choice(prediction, [answer]) == 1
    assert multiple_choice(prediction, ["C: Focal"]) == 0


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("", "B"),
        ("C", "B"),
        ("Focal uptake pattern", "B"),
        ("A dog", "A"),
        ("The answer is a dog", "A"),
        ("The answer isn't B", "B"),
        ("U.S.", "U"),
        ("either (B) or (C)", "B"),
        ("neither option B nor option C", "B"),
        ("Diffuse uptake pattern", UPTAKE),
        ("C: Focal uptake pattern", UPTAKE),
        ("B", "Focal uptake pattern"),
        ("", "the"),
    ],
)
def test_no_option_or_another_one_is_wrong(prediction: str, answer: str) -> None:
    assert multiple_choice(prediction, [answer]) == 0


@pytest.mark.parametrize("prediction", ["focal uptake pattern.", "Focal Uptake Pattern", UPTAKE])
@pytest.mark.parametrize("answer", [UPTAKE, "Focal uptake pattern"])
def test_an_options_text_names_it(prediction: str, answer: str) -> None:
    assert multiple_choice(prediction, [answer]) == 1


def test_a_letter_within_an_options_text_is_not_its_letter() -> None:
    assert multiple_choice("Vitamin B", ["C: Vitamin B"]) == 1
    assert multiple_choice("Vitamin B", ["B: Vitamin C"]) == 0

"""VQA accuracy (Antol et al., 2015), as the evaluation code of VQA v2 computes it.

Of the people who were asked (ten in VQA, TextVQA, OK-VQA), an answer needs three who gave it to be
right; to be comparable with a person, who cannot agree with themselves, it is averaged over leaving
out each of them in turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_WITH_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = ("a", "an", "the")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_CONTRACTED = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
    hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
    might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't shan't she'd've
    should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've there're
    there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're
    you've
""".split()
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # as the evaluation code has it


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Mean of min(1, others who said so / 3), leaving out each of the answers in turn.

    The texts are normalised unless all answers are the same, as in the evaluation code. Ten answers
    are usual; with fewer the formula stays as it is, so that three agreeing ones give 2/3. Of a
    single answer nobody can be left out: it is normalised and gives 1.0 on a match.
    """
    said, given = _trim(prediction), [_trim(answer) for answer in answers]
    if len(given) == 1 or len(set(given)) > 1:
        said, given = normalize(said), [normalize(answer) for answer in given]
    agreeing = given.count(said)
    if len(given) == 1:
        return float(agreeing)
    left_out_agrees = agreeing * min(1.0, (agreeing - 1) / 3)
    left_out_differs = (len(given) - agreeing) * min(1.0, agreeing / 3)
    return (left_out_agrees + left_out_differs) / len(given)


def normalize(text: str) -> str:
    """Lower case; no articles and punctuation; digits for numbers; apostrophes in contractions.

    A punctuation mark becomes a space, or vanishes where one stands beside a space or the text has
    a comma between digits. Apostrophes, colons and decimal points stay.
    """
    joined = _NUMBER_WITH_COMMA.search(text)
    bare = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if joined or beside_space else " ")
    words = [_DIGITS.get(word, word) for word in _PERIOD.sub("", bare).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _trim(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()

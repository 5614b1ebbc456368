"""Multiple choice: the letter of an option in a text, however it is dressed."""

from __future__ import annotations

import re
from collections.abc import Sequence

from emloc.metrics.texts import normalize

# A letter after which no sentence goes on: "A dog" names no option, "B because" and "a." do.
_LETTER = r"[\s*\"'(\[{]*(?:(?-i:([B-Z]))(?!\w)|([A-Z])(?=\s*(?:[^\w\s]|$)))"

# "B", "b.", "(B)", "**B**"
_ALONE = re.compile(r"\W*([A-Za-z])\W*")
# "B: lung", "b) lung", "(B) lung", "**B.** lung", "B, because"; but not "U.S."
_FIRST = re.compile(
    r"[\s*]*(?:[(\[{]([A-Za-z])[)\]}][:.]?|([A-Za-z])(?:[.:,)\]]|[ \t]*\n))(?!\w\.)(.*)", re.DOTALL
)
# "The answer is B", "Answer: (b)", "the correct option is B"
_STATED = re.compile(
    r"\b(?:answer(?:\s+(?:is|would\s+be)\b)?|(?:option|choice)\s+is\b)\s*[:=]?\s*"
    rf"(?:(?:option|choice)\b)?{_LETTER}",
    re.IGNORECASE,
)
# "Option B is right", "I would say (C)", "\boxed{D}"
_MENTIONED = re.compile(rf"(?:\b(?:option|choice)\b|(?=[(\[{{][A-Z][)\]}}])){_LETTER}", re.I)


def multiple_choice(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction names the option of an answer.

    An answer is an option's letter ("B"), its letter and text ("B: lung") or its text alone. A
    prediction names an option by its text, or by its letter: alone, first, after "the answer is",
    or as the only one after "option" or in brackets. What names none, or several, gets 0.0.
    """
    return float(any(_names(prediction, answer) for answer in answers))


def _names(prediction: str, answer: str) -> bool:
    letter, option = _parts(answer)
    said, text = _parts(prediction)
    words = normalize(option)
    if words and words == normalize(prediction):
        return True
    if letter is None:
        return bool(words) and words == normalize(text)
    return (said or _letter_within(prediction)) == letter


def _parts(text: str) -> tuple[str | None, str]:
    """The letter that a text begins with, if any, and the option's text."""
    if alone := _ALONE.fullmatch(text):
        return alone[1].upper(), ""
    if found := _FIRST.fullmatch(text):
        return (found[1] or found[2]).upper(), found[3].strip(" *\n")
    return None, text


def _letter_within(text: str) -> str | None:
    """The letter that a sentence states last as the answer, or the only one that it mentions."""
    text = " ".join(text.split())
    if stated := [found[1] or found[2] for found in _STATED.finditer(text)]:
        return stated[-1].upper()
    mentioned = {(found[1] or found[2]).upper() for found in _MENTIONED.finditer(text)}
    return mentioned.pop() if len(mentioned) == 1 else None

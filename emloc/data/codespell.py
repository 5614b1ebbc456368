"""The spelling task: codespell's list of common typing errors as prompts and answers.

A line of its `dictionary.txt` is `typo->correction`. Several candidates, or a reason, stand after
a comma (`aas->ass, as,`); such lines have no single right answer and are left out.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from emloc.data.rows import Row

PROMPT = "Correct the spelling: {typo}\n"

_ENTRY = re.compile(r"([^,>]+)->([^\s>][^>]*)")
_WORD = re.compile(r"[a-z]+")


def codespell_rows(dictionary: str | os.PathLike[str]) -> list[Row]:
    """One row for each correct word that is a single lower-case word (a to z).

    A word that many typos lead to gets one of them, drawn by a hash of the typo and not by its
    place in the file, so that no correct word can stand in two splits. The same file always gives
    the same rows, in the order of the file.

    Raises:
        ValueError: no such file, a line that is not an entry (line named), or no usable entry.
    """
    path = Path(dictionary)
    if not path.is_file():
        raise ValueError(f"{path} is not a file: give the path of codespell's dictionary.txt.")
    chosen: dict[str, str] = {}
    for typo, word in _single_words(path):
        if word not in chosen or _draw(typo) < _draw(chosen[word]):
            chosen[word] = typo
    if not chosen:
        raise ValueError(
            f"{path} has no entry with one lower-case word as its correction: give the path of "
            "codespell's dictionary.txt."
        )
    rows = [(typo, word) for typo, word in _single_words(path) if chosen[word] == typo]
    return [{"prompt": PROMPT.format(typo=typo), "answer": word} for typo, word in rows]


def _single_words(path: Path) -> list[tuple[str, str]]:
    """The (typo, correction) pairs of a dictionary with one word on either side."""
    pairs = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        text = line.decode("utf-8", errors="replace").strip()
        if not text:
            continue
        entry = _ENTRY.fullmatch(text)
        if entry is None or "\ufffd" in text:
            raise ValueError(
                f"{path}:{number}: {text[:60]!r} is not an entry like 'teh->the': give the path "
                "of codespell's dictionary.txt."
            )
        typo, correction = entry.groups()
        if _WORD.fullmatch(typo) and _WORD.fullmatch(correction):
            pairs[typo] = correction
    return list(pairs.items())


def _draw(typo: str) -> str:
    """A value that orders typos by chance, but the same way everywhere and always."""
    return hashlib.sha256(typo.encode("utf-8")).hexdigest()

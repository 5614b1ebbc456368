"""Yes/no questions about pictures as tensors, with every picture kept once.

- `read_questions`: the yes/no questions of one part of easy-VQA, and no others
- `Questions.split`: pictures to learn from, and pictures held out

Letters: P pictures, Q different questions, C × H × W a picture's channels and pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from emloc.data import easy_vqa_rows
from emloc.pictures import load_picture, pictures_of

NOT_ASKED = -1


@dataclass(frozen=True)
class Questions:
    """Pictures, and what is known of the answer to each question about each of them.

    Attributes:
        pictures: (P, C, H, W) float32, as the model takes them.
        texts: the Q different questions, sorted.
        answers: (P, Q) int64: 1 yes, 0 no, -1 not asked.
    """

    pictures: Tensor
    texts: list[str]
    answers: Tensor

    def at(self, index: Tensor) -> Questions:
        """The same for the pictures of these numbers."""
        return Questions(self.pictures[index], self.texts, self.answers[index])

    def split(self, share: float, generator: torch.Generator) -> tuple[Questions, Questions]:
        """The pictures to learn from, and a share of all (at least one) that is held out."""
        order = torch.randperm(len(self.pictures), generator=generator)
        held_out = max(1, round(share * len(order)))
        return self.at(order[held_out:]), self.at(order[:held_out])

    def yes_share(self) -> Tensor:
        """(Q,) float32: the share of yes among the answers to a question; 0.5 if it has none."""
        asked = (self.answers != NOT_ASKED).sum(0)
        return torch.where(asked > 0, (self.answers == 1).sum(0) / asked.clamp(min=1), 0.5)


def read_questions(
    folder: str | os.PathLike[str], to_pixels: Callable[[list[Image.Image]], Tensor]
) -> Questions:
    """Read the yes/no questions of a part of easy-VQA; other questions are not looked at.

    Args:
        folder: as for `emloc.data.easy_vqa_rows`.
        to_pixels: pictures → (P, C, H, W) float32.

    Raises:
        ValueError: the folder is unusable, a picture cannot be read, or there are fewer than two
            pictures, so that none could be held out.
    """
    rows = easy_vqa_rows(folder, subset="yes-no")
    asked = [(pictures_of(row)[0], _question(row), row["messages"][-1]["content"]) for row in rows]
    texts = sorted({text for _, text, _ in asked})
    paths = list(dict.fromkeys(path for path, _, _ in asked))
    if len(paths) < 2:
        raise ValueError(
            f"{folder} has yes/no questions about {len(paths)} picture only, but two are needed to "
            "hold one out: take a whole part of easy-vqa."
        )
    row_of = {path: number for number, path in enumerate(paths)}
    column_of = {text: number for number, text in enumerate(texts)}
    answers = torch.full((len(paths), len(texts)), NOT_ASKED)
    for path, text, answer in asked:
        answers[row_of[path], column_of[text]] = int(answer == "yes")
    pictures = to_pixels([load_picture(path, path) for path in paths])
    return Questions(pictures, texts, answers)


def _question(row: dict[str, Any]) -> str:
    parts = row["messages"][0]["content"]
    return str(next(part["text"] for part in parts if part["type"] == "text"))

"""Several questions about one picture in one row, so that the picture's tokens are computed once.

A row is the picture's part of a conversation and then, for each question, what follows that part. A
question's tokens see the picture's and their own, at the positions that they would have alone. So
the model computes exactly what it would for each question in a row of its own.

Letters: B rows (pictures), Q questions in all, k of them in a row, n tokens of the picture's part,
L of the longest rest, T = n + k·L.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from emloc.bases.internvl import END, TILE_TOKENS, number_of
from emloc.bases.questions import NOT_ASKED, Questions
from emloc.internvl.processor import CONTEXT

ANSWERS = ("no", "yes")  # by their number in `Questions.answers`


@dataclass(frozen=True)
class Packed:
    """Rows as a model's inputs, and what is to be learnt from them.

    Attributes:
        inputs: pixel_values (B, C, H, W), input_ids (B, T), attention_mask (B, 1, T, T) bool and
            position_ids (B, T).
        weights: (B, T) float32: how much a token counts in the loss.
        decisive: (B, T) bool: the one token of each answer that says yes or no.
    """

    inputs: dict[str, Tensor]
    weights: Tensor
    decisive: Tensor


class Packer:
    """Packs questions into rows, as token ids of conversations in the tokenizer's chat template.

    An answer and the token that ends it count 1 each. A question's own tokens count
    `question_weight` where the answer is the rarer one for that question: then the question names
    what is in the picture, and its words can be learnt from the picture.

    Args:
        tokenizer: as `build_tokenizer` gives it.
        questions: says which questions there are, and which answers are rare.
        question_weight: 0 or more.
        device: where the rows shall be.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        questions: Questions,
        *,
        question_weight: float,
        device: torch.device,
    ) -> None:
        self.device = device
        pairs = [
            [_split(tokenizer, text, answer) for answer in ANSWERS] for text in questions.texts
        ]
        longest = max(len(context) + len(answer) for pair in pairs for _, context, answer in pair)
        shape = (len(pairs), len(ANSWERS), longest)
        end = number_of(tokenizer, END)
        self.picture = torch.tensor(pairs[0][0][0])  # (n,)
        self.rest = torch.full(shape, int(tokenizer.pad_token_id or 0))
        self.weights = torch.zeros(shape)
        self.decisive = torch.zeros(shape, dtype=torch.bool)
        yes = questions.yes_share()
        for number, pair in enumerate(pairs):
            for answer, (_, context, said) in enumerate(pair):
                ids = torch.tensor([*context, *said])
                rare = (yes[number] if answer else 1 - yes[number]) < 0.5
                self.rest[number, answer, : len(ids)] = ids
                # In a row, the token before the first one is another question's.
                self.weights[number, answer, 1 : context.index(end)] = question_weight * rare
                self.weights[number, answer, len(context) : len(ids)] = 1.0
                self.decisive[number, answer, len(context)] = True

    def pack(self, questions: Questions, most: int, generator: torch.Generator) -> Packed:
        """A row for each picture, with `most` of the questions asked about it, or all if fewer.

        Args:
            questions: the same texts as the packer's.
            most: k.
            generator: draws the questions; one of the CPU.
        """
        order = torch.rand(questions.answers.shape, generator=generator)
        order[questions.answers == NOT_ASKED] = -1.0
        drawn, chosen = order.topk(min(most, order.shape[1]), dim=1)  # (B, k)
        cell = chosen, questions.answers.gather(1, chosen).clamp(min=0)
        asked = (drawn >= 0)[..., None]  # (B, k, 1)
        rows, count = chosen.shape
        size, length = len(self.picture), self.rest.shape[2]
        owner = torch.arange(1, count + 1).repeat_interleave(length)
        owner = torch.cat([torch.zeros(size, dtype=torch.int64), owner])  # (T,): 0 is the picture
        sees = (owner[:, None] == owner) | (owner == 0)
        sees = sees.tril().expand(rows, 1, -1, -1)
        places = torch.cat([torch.arange(size), size + torch.arange(length).repeat(count)])
        picture = self.picture.expand(rows, -1)
        inputs = {
            "pixel_values": questions.pictures,
            "input_ids": torch.cat([picture, self.rest[cell].flatten(1)], dim=1),
            "attention_mask": sees,
            "position_ids": places.expand(rows, -1),
        }
        weights = torch.cat([torch.zeros(rows, size), (self.weights[cell] * asked).flatten(1)], 1)
        decisive = (self.decisive[cell] & asked).flatten(1)
        decisive = torch.cat([torch.zeros(rows, size, dtype=torch.bool), decisive], dim=1)
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        return Packed(inputs, weights.to(self.device), decisive.to(self.device))


def _split(
    tokenizer: PreTrainedTokenizerFast, question: str, answer: str
) -> tuple[list[int], list[int], list[int]]:
    """Token ids up to the picture's end, from there to the answer, and of the answer."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    turns: Any = [{"role": "user", "content": content}]
    text = str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    ids = _tokens(tokenizer, text.replace(CONTEXT, f"<img>{CONTEXT * TILE_TOKENS}</img>", 1))
    cut = ids.index(number_of(tokenizer, "</img>")) + 1
    return ids[:cut], ids[cut:], _tokens(tokenizer, answer + END)


def _tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])

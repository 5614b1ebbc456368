"""Captions of pictures as a Flux reads them: from words to embeddings, and how many are padding.

- `Captions`: every caption of the training, encoded once
- `shorter`: less exact captions of the same picture

Letters: K captions, L tokens of a text, B pictures of a batch, n image tokens, d width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from emloc.bases.flux_parts import Encoders

LONGEST = 512  # tokens that a pipeline pads to unless told otherwise


def shorter(caption: str) -> list[str]:
    """Of "a red circle": ["a red shape", "a circle", "a shape"]."""
    _, color, shape = caption.split(" ")
    return [f"a {color} shape", f"a {shape}", "a shape"]


class Captions:
    """Captions encoded once, with as little padding as can be.

    A Flux attends to its padding, and its encoder's states are the same for every padding token
    here. So a few that count for many stand in for all, through a bias in the attention.

    Args:
        texts: the captions; equal ones are kept once.
        encoders: as `build_encoders` made them.
    """

    def __init__(self, texts: Iterable[str], encoders: Encoders) -> None:
        self.texts = sorted(set(texts))
        self._number = {text: number for number, text in enumerate(self.texts)}
        clip, t5 = encoders.tokenizer, encoders.tokenizer_2
        self.length = 1 + max(len(t5(text).input_ids) for text in self.texts)
        read = t5(self.texts, padding="max_length", max_length=self.length, return_tensors="pt")
        words = clip(self.texts, padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            self.embeds = encoders.text_encoder_2(read.input_ids)[0]  # (K, L, d)
            self.pooled = encoders.text_encoder(words).pooler_output  # (K, d)
        self.padding = read.attention_mask == 0  # (K, L), at least one in each row

    def numbers(self, texts: Sequence[str]) -> Tensor:
        """(len(texts),) int64: where each text stands."""
        return torch.tensor([self._number[text] for text in texts])

    def bias(self, numbers: Tensor, image_tokens: int, padded_to: int) -> Tensor:
        """(B, 1, 1, L + n) float32: added to the attention's logits, it makes up for padding.

        Args:
            numbers: (B,) int64 of captions.
            image_tokens: n.
            padded_to: tokens that a pipeline would pad to, at least L.
        """
        padding = self.padding[numbers]
        here = padding.sum(1, keepdim=True)
        weight = ((here + padded_to - self.length) / here).log()
        text = torch.where(padding, weight, 0.0)
        return torch.cat([text, text.new_zeros(len(numbers), image_tokens)], 1)[:, None, None]

    def draw_length(self, generator: torch.Generator) -> int:
        """A length to pad to, from L to 512, short ones as likely as long ones."""
        low, high = math.log(self.length), math.log(max(LONGEST, self.length))
        return round(math.exp(low + (high - low) * torch.rand((), generator=generator).item()))

"""Language models: rows of text as token ids, with labels on the answers only.

- `load_tokenizer`: a checkpoint's tokenizer, always with a pad token
- `TextCodec`: rows to examples (nothing is ever cut off), examples to padded tensors
- `prompt_ids`: what generation starts from

A text is cut at both ends of every answer and each piece is tokenised for itself. So the ids before
an answer in training are exactly the ids that generation starts from.

Letters: B rows of a batch, T tokens of the longest.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from emloc.families.chat import Chat, tokens

if TYPE_CHECKING:
    from emloc.data.jsonl import Row

Example = dict[str, Any]
"""`input_ids` and `labels` (lists of int, -100 outside answers), `row` (index among the rows)."""

Side = Literal["right", "left"]
IGNORED = -100

_log = logging.getLogger(__name__)


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a checkpoint's folder; one without a pad token pads with another.

    Raises:
        ValueError: the folder holds no tokenizer, or one without pad, end and unknown tokens.
    """
    folder = Path(path)
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if not any((folder / name).is_file() for name in names):
        raise ValueError(
            f"{folder} holds no tokenizer ({', '.join(names)}): copy the original's files there."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ValueError(f"the tokenizer in {folder} cannot be read: {error}") from error
    return padded(tokenizer, folder)


def padded(tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; one without a pad token gets another of its tokens for it.

    Raises:
        ValueError: it has no pad, end or unknown token.
    """
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer in {folder} has no pad, end or unknown token: set pad_token in its "
            "tokenizer_config.json."
        )
    return tokenizer


class TextCodec:
    """How the rows of a data set become the inputs of a language model.

    With a chat template, a prompt and its answer become one user and one assistant turn, and every
    assistant turn is labelled with the token that ends it. Without one, the ids are the beginning
    token (if the tokenizer adds one), the prompt, the answer and the end token: nothing is put
    between prompt and answer.

    Args:
        tokenizer: as `load_tokenizer` gives it.
        chat_template: whether to use the tokenizer's; None means if it has one.

    Raises:
        ValueError: a chat template is asked for, but missing; no end token.
    """

    _parts = False

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, chat_template: bool | None = None
    ) -> None:
        self.tokenizer = tokenizer
        use_template = bool(tokenizer.chat_template) if chat_template is None else chat_template
        if use_template and not tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template: set data.chat_template to false or null."
            )
        self._use_template = use_template
        self._chat = Chat(tokenizer, parts=self._parts)
        self.stop_ids = self._chat.stop_ids

    def encode(
        self, rows: Sequence[Row], *, max_length: int, skip_long: bool = False, source: str
    ) -> list[Example]:
        """Turn rows into token ids with labels; the last id of each ends its last answer.

        Args:
            rows: as `emloc.data` gives them.
            max_length: the most tokens that a row may have.
            skip_long: leave out longer rows (their number is logged) instead of refusing them.
            source: what to call the rows in errors, as a file name; row numbers start at 1.

        Returns:
            One example a kept row, in order; `row` is its index in `rows`, from 0.

        Raises:
            ValueError: a longer row, or none left; messages without a chat template; a template
                that refuses a row or changes its answer.
        """
        examples: list[Example] = []
        for index, row in enumerate(rows):
            where = f"{source}: row {index + 1}"
            example = self.encode_row(row, where)
            length = len(example["input_ids"])
            if length <= max_length:
                examples.append({**example, "row": index})
            elif not skip_long:
                raise ValueError(
                    f"{where} has {length} tokens, but max_length is {max_length}: raise "
                    "data.max_length, or set data.skip_long to leave such rows out."
                )
        skipped = len(rows) - len(examples)
        if not examples:
            raise ValueError(
                f"{source}: none of {skipped} rows has at most {max_length} tokens: raise "
                "data.max_length or give shorter rows."
            )
        if skipped:
            _log.warning("%s: left out %d rows over %d tokens", source, skipped, max_length)
        return examples

    def encode_row(self, row: Row, where: str) -> Example:
        """`input_ids` and `labels` of one row, up to the end of its last answer.

        Raises:
            ValueError: as in `encode`; `where` starts the sentence.
        """
        if "image" in row:
            raise ValueError(
                f"{where} is a picture with a caption, which only a diffusion pipeline learns: "
                "take rows of prompt and answer, or messages."
            )
        ids, labels = self._beginning(), list[int]()
        if self._use_template:
            pieces = self._chat.pieces(_turns(row), where)
        elif "messages" in row:
            raise ValueError(
                f"{where} has messages, which need a chat template: take a model whose tokenizer "
                "has one, do not switch it off, or write the row as prompt and answer."
            )
        else:
            pieces = [(row["prompt"], row["answer"])]
        for context, answer in self._expanded(pieces, row, where):
            ids += tokens(self.tokenizer, context)
            labels += [IGNORED] * (len(ids) - len(labels))
            ids += tokens(self.tokenizer, answer)
            labels += ids[len(labels) :]
        if ids[-1] not in self.stop_ids:
            ids.append(self._end())
            labels.append(ids[-1])
        return {"input_ids": ids, "labels": labels}

    def collate(self, examples: Sequence[Mapping[str, Any]], *, side: Side) -> dict[str, Tensor]:
        """Pad examples to the longest of them on one side.

        Returns:
            input_ids (padded with the pad token), attention_mask (0 on padding) and labels (-100
            on padding), each (B, T) int64.

        Raises:
            ValueError: `side` is neither right nor left.
        """
        if side not in ("right", "left"):
            raise ValueError(f"side is {side!r}, but padding goes to the right or to the left.")
        longest = max(len(example["input_ids"]) for example in examples)
        padding = {
            "input_ids": self.tokenizer.pad_token_id,
            "attention_mask": 0,
            "labels": IGNORED,
        }
        columns: dict[str, list[list[int]]] = {name: [] for name in padding}
        for example in examples:
            ids = example["input_ids"]
            values = {**example, "attention_mask": [1] * len(ids)}
            for name, filler in padding.items():
                fill = [filler] * (longest - len(ids))
                column = values[name] + fill if side == "right" else fill + values[name]
                columns[name].append(column)
        return {name: torch.tensor(column, dtype=torch.int64) for name, column in columns.items()}

    def _expanded(
        self, pieces: list[tuple[str, str]], row: Row, where: str
    ) -> list[tuple[str, str]]:
        """The pieces with room for what is no text in them."""
        return pieces

    def _beginning(self) -> list[int]:
        """The beginning token where the tokenizer adds it; a chat template writes its own."""
        first = self.tokenizer.bos_token_id
        adds = not self._use_template and self.tokenizer("a")["input_ids"][:1] == [first]
        return [first] if adds else []

    def _end(self) -> int:
        """The token to end an answer with where the text has none."""
        end = self.tokenizer.eos_token_id
        return min(self.stop_ids) if end is None else int(end)


def _turns(row: Row) -> list[dict[str, Any]]:
    return row.get("messages") or [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["answer"]},
    ]


def prompt_ids(example: Mapping[str, Any]) -> list[int]:
    """The ids before the last answer: what generation starts from."""
    labels = example["labels"]
    end = len(labels)
    while end and labels[end - 1] == IGNORED:
        end -= 1
    while end and labels[end - 1] != IGNORED:
        end -= 1
    return list(example["input_ids"][:end])

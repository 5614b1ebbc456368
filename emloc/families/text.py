"""Language models: rows of text as token ids, with labels on the answers only.

- `load_tokenizer`: a checkpoint's tokenizer, always with a pad token
- `encode_rows`: rows to examples; nothing is ever cut off
- `prompt_ids`, `answer_of`: what generation starts from, and what it should say
- `collate`: examples to padded tensors
- `stop_ids`: the tokens that end an answer

A text is cut at both ends of every answer and each piece is tokenised for itself. So the ids before
an answer in training are exactly the ids that generation starts from.

Letters: B rows of a batch, T tokens of the longest.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from emloc.data.jsonl import Row

Example = dict[str, Any]
"""`input_ids` and `labels` (lists of int, -100 outside answers), `row` (index among the rows)."""

IGNORED = -100

# Given to every template. Templates that know these names then leave no room for a reasoning block
# before the answer, and do not write today's date; other templates do not look at them.
_TEMPLATE_OPTIONS = {"enable_thinking": False, "date_string": "26 Jul 2024"}
_MARK = "emloc7answer7here"

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
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer in {folder} has no pad, end or unknown token: set pad_token in its "
            "tokenizer_config.json."
        )
    return tokenizer


def encode_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: bool | None = None,
    max_length: int,
    skip_long: bool = False,
    source: str,
) -> list[Example]:
    """Turn rows into token ids with labels; the last id of each is the end of its last answer.

    With a chat template, a prompt and its answer become one user and one assistant turn, and every
    assistant turn is labelled with the token that ends it. Without one, the ids are the beginning
    token (if the tokenizer adds one), the prompt, the answer and the end token: nothing is put
    between prompt and answer.

    Args:
        rows: as `emloc.data.read_rows` gives them.
        tokenizer: as `load_tokenizer` gives it.
        chat_template: whether to use the tokenizer's; None means if it has one.
        max_length: the most tokens that a row may have.
        skip_long: leave out longer rows (their number is logged) instead of refusing them.
        source: what to call the rows in errors, as a file name; row numbers start at 1.

    Returns:
        One example a kept row, in order; `row` is its index in `rows`, from 0.

    Raises:
        ValueError: a longer row, or none left; a chat template that is asked for, or that messages
            need, but missing; a template that refuses a row or changes its answer; no end token.
    """
    use_template = bool(tokenizer.chat_template) if chat_template is None else chat_template
    if use_template and not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template: set data.chat_template to false or null."
        )
    encoder = _Encoder(tokenizer, use_template, frozenset(stop_ids(tokenizer)))
    examples: list[Example] = []
    for index, row in enumerate(rows):
        where = f"{source}: row {index + 1}"
        example = encoder.encode(row, where)
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


def collate(
    examples: Sequence[Mapping[str, Any]], *, pad_token_id: int, side: Literal["right", "left"]
) -> dict[str, Tensor]:
    """Pad examples to the longest of them on one side.

    Returns:
        input_ids (padded with `pad_token_id`), attention_mask (0 on padding) and labels (-100 on
        padding), each (B, T) int64.

    Raises:
        ValueError: `side` is neither right nor left.
    """
    if side not in ("right", "left"):
        raise ValueError(f"side is {side!r}, but padding goes to the right or to the left.")
    longest = max(len(example["input_ids"]) for example in examples)
    padding = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORED}
    columns: dict[str, list[list[int]]] = {name: [] for name in padding}
    for example in examples:
        ids = example["input_ids"]
        values = {**example, "attention_mask": [1] * len(ids)}
        for name, filler in padding.items():
            fill = [filler] * (longest - len(ids))
            columns[name].append(values[name] + fill if side == "right" else fill + values[name])
    return {name: torch.tensor(column, dtype=torch.int64) for name, column in columns.items()}


def calibration_batches(
    examples: Sequence[Mapping[str, Any]], batch_size: int, *, pad_token_id: int
) -> list[dict[str, Any]]:
    """Keyword arguments of a model's forward for consecutive groups of examples.

    Each has `input_ids` and `attention_mask` (B, T) int64, and no cache.
    """
    batches = []
    for start in range(0, len(examples), batch_size):
        group = examples[start : start + batch_size]
        batch = collate(group, pad_token_id=pad_token_id, side="right")
        del batch["labels"]
        batches.append({**batch, "use_cache": False})
    return batches


def prompt_ids(example: Mapping[str, Any]) -> list[int]:
    """The ids before the last answer: what generation starts from."""
    labels = example["labels"]
    end = len(labels)
    while end and labels[end - 1] == IGNORED:
        end -= 1
    while end and labels[end - 1] != IGNORED:
        end -= 1
    return list(example["input_ids"][:end])


def answer_of(row: Row) -> str:
    """The reference answer of a row: its answer, or what its last message says."""
    return row["messages"][-1]["content"] if "messages" in row else row["answer"]


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the end token and the chat template's end of a turn.

    Raises:
        ValueError: there is no such token.
    """
    stops = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _MARK}]
        tail = _render(tokenizer, turns, "a trial row").partition(_MARK)[2]
        ids = _tokens(tokenizer, tail.strip())
        if ids and ids[0] in tokenizer.added_tokens_decoder and ids[0] not in stops:
            stops.append(ids[0])
    if not stops:
        raise ValueError(
            "the tokenizer has no end token, so that no answer could end: set eos_token in its "
            "tokenizer_config.json."
        )
    return stops


@dataclass(frozen=True)
class _Encoder:
    """How the rows of one data set become ids."""

    tokenizer: PreTrainedTokenizerBase
    use_template: bool
    stops: frozenset[int]

    def encode(self, row: Row, where: str) -> dict[str, list[int]]:
        """`input_ids` and `labels` of one row, up to the end of its last answer."""
        ids, labels = self._beginning(), list[int]()
        if self.use_template:
            pieces = self._chat_pieces(row, where)
        elif "messages" in row:
            raise ValueError(
                f"{where} has messages, which need a chat template: take a model whose tokenizer "
                "has one, do not switch it off, or write the row as prompt and answer."
            )
        else:
            pieces = [(row["prompt"], row["answer"])]
        for context, answer in pieces:
            ids += _tokens(self.tokenizer, context)
            labels += [IGNORED] * (len(ids) - len(labels))
            ids += _tokens(self.tokenizer, answer)
            labels += ids[len(labels) :]
        if ids[-1] not in self.stops:
            ids.append(self._end())
            labels.append(ids[-1])
        return {"input_ids": ids, "labels": labels}

    def _beginning(self) -> list[int]:
        """The beginning token where the tokenizer adds it; a chat template writes its own."""
        first = self.tokenizer.bos_token_id
        adds = not self.use_template and self.tokenizer("a")["input_ids"][:1] == [first]
        return [first] if adds else []

    def _end(self) -> int:
        """The token to end an answer with where the text has none."""
        end = self.tokenizer.eos_token_id
        return min(self.stops) if end is None else int(end)

    def _chat_pieces(self, row: Row, where: str) -> list[tuple[str, str]]:
        """The rendered conversation as (text before an answer, answer with its end) pairs."""
        turns = row.get("messages") or [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["answer"]},
        ]
        text = _render(self.tokenizer, turns, where)
        pieces, done = [], 0
        for index, turn in enumerate(turns):
            if turn["role"] == "assistant":
                start, end = self._find_answer(text, turns, index, where)
                pieces.append((text[done:start], text[start:end]))
                done = end
        return pieces

    def _find_answer(
        self, text: str, turns: list[dict[str, str]], index: int, where: str
    ) -> tuple[int, int]:
        """Where turn `index` stands in the rendered `text`: from its first letter to its end token.

        The place is found by rendering the conversation with a mark instead of the answer, which
        also works for templates that write earlier turns in another way than the last one.
        """
        marked = [*turns[:index], {**turns[index], "content": _MARK}, *turns[index + 1 :]]
        head, _, tail = _render(self.tokenizer, marked, where).partition(_MARK)
        content = turns[index]["content"]
        fitting = [form for form in (content, content.strip()) if text == head + form + tail]
        if not fitting:
            raise ValueError(
                f"{where}: the chat template changes the answer of message {index + 1}, so its "
                "place is not known: set data.chat_template to false or change the template."
            )
        start, end = len(head), len(head) + len(fitting[0])
        # A word and the space before it are often one token: leave that space to the answer.
        if any(turn["role"] == "user" for turn in turns[:index]):
            opening = _render(self.tokenizer, turns[:index], where, add_generation_prompt=True)
            if head.startswith(opening) and not head[len(opening) :].strip():
                start = len(opening)
        stop = next(filter(tail.lstrip().startswith, self._stop_texts()), None)
        if stop is not None:
            end += tail.index(stop) + len(stop)
        return start, end

    def _stop_texts(self) -> list[str]:
        """The stop tokens as the template writes them."""
        return [str(self.tokenizer.convert_ids_to_tokens(number)) for number in self.stops]


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a piece of text alone."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _render(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], where: str, **options: Any
) -> str:
    """The chat template's text of a conversation."""
    try:
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, **{**_TEMPLATE_OPTIONS, **options}
        )
    except TemplateError as error:
        raise ValueError(
            f"{where}: the model's chat template refuses the conversation ({error}): change the "
            "row, or set data.chat_template to false."
        ) from error
    return str(text)

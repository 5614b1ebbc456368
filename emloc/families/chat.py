"""A tokenizer's chat template: conversations as text that is cut at both ends of every answer.

- `Chat.pieces`: a conversation as (text before an answer, answer with its end) pairs
- `Chat.stop_ids`: the tokens that end an answer
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

# Given to every template. Templates that know these names then leave no room for a reasoning block
# before the answer, and do not write today's date; other templates do not look at them.
_OPTIONS = {"enable_thinking": False, "date_string": "26 Jul 2024"}
_MARK = "emloc7answer7here"

Turn = Mapping[str, Any]
"""`role` and `content`: a text, or a list of text and image parts."""


def tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a piece of text alone."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


class Chat:
    """Renders conversations by a tokenizer's chat template and finds the answers in the text.

    Args:
        tokenizer: with a chat template, or without one: then only `stop_ids` can be asked for.
        parts: whether the template takes contents as lists of parts, as those of vision-language
            models do, and not as text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, parts: bool = False) -> None:
        self.tokenizer, self.parts = tokenizer, parts

    @cached_property
    def stop_ids(self) -> list[int]:
        """The tokens that end an answer: the end token and the template's end of a turn.

        Raises:
            ValueError: there is no such token.
        """
        tokenizer = self.tokenizer
        stops = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _MARK}]
            tail = self._render(turns, "a trial row").partition(_MARK)[2]
            ids = tokens(tokenizer, tail.strip())
            if ids and ids[0] in tokenizer.added_tokens_decoder and ids[0] not in stops:
                stops.append(ids[0])
        if not stops:
            raise ValueError(
                "the tokenizer has no end token, so that no answer could end: set eos_token in its "
                "tokenizer_config.json."
            )
        return stops

    def pieces(self, turns: Sequence[Turn], where: str) -> list[tuple[str, str]]:
        """The rendered conversation as (text before an answer, answer with its end) pairs.

        Args:
            turns: the contents of the assistant's are text.
            where: what to call the conversation in errors.

        Raises:
            ValueError: the template refuses the conversation or changes an answer, or pictures
                are in it and the template takes text only.
        """
        text = self._render(turns, where)
        pieces, done = [], 0
        for index, turn in enumerate(turns):
            if turn["role"] == "assistant":
                start, end = self._find_answer(text, turns, index, where)
                pieces.append((text[done:start], text[start:end]))
                done = end
        return pieces

    def _find_answer(
        self, text: str, turns: Sequence[Turn], index: int, where: str
    ) -> tuple[int, int]:
        """Where turn `index` stands in the rendered `text`: from its first letter to its end token.

        The place is found by rendering the conversation with a mark instead of the answer, which
        also works for templates that write earlier turns in another way than the last one.
        """
        marked = [*turns[:index], {**turns[index], "content": _MARK}, *turns[index + 1 :]]
        head, _, tail = self._render(marked, where).partition(_MARK)
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
            opening = self._render(turns[:index], where, add_generation_prompt=True)
            if head.startswith(opening) and not head[len(opening) :].strip():
                start = len(opening)
        stop = next(filter(tail.lstrip().startswith, self._stop_texts), None)
        if stop is not None:
            end += tail.index(stop) + len(stop)
        return start, end

    @cached_property
    def _stop_texts(self) -> list[str]:
        """The stop tokens as the template writes them."""
        return [str(self.tokenizer.convert_ids_to_tokens(number)) for number in self.stop_ids]

    def _render(self, turns: Sequence[Turn], where: str, **options: Any) -> str:
        """The chat template's text of a conversation."""
        contents = (self._content(turn["content"], where) for turn in turns)
        given: Any = [{**t, "content": c} for t, c in zip(turns, contents, strict=True)]
        options = {**_OPTIONS, **options}
        try:
            text = self.tokenizer.apply_chat_template(given, tokenize=False, **options)
        except TemplateError as error:
            raise ValueError(
                f"{where}: the model's chat template refuses the conversation ({error}): change "
                "the row, or set data.chat_template to false."
            ) from error
        return str(text)

    def _content(self, content: Any, where: str) -> Any:
        """A content as the template takes it."""
        if isinstance(content, str):
            return [{"type": "text", "text": content}] if self.parts else content
        if not self.parts:
            raise ValueError(
                f"{where} has pictures, which a language model cannot see: take a vision-language "
                "model, or rows of text."
            )
        images = ({"type": "image"} if part["type"] == "image" else part for part in content)
        return list(images)

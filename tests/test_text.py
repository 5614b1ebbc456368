"""Rows as token ids: labels on answers only, nothing cut off, prompts as generation gets them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from emloc.families import calibration_batches, labelled_batches
from emloc.families.text import (
    TextCodec,
    load_tokenizer,
    prompt_ids,
)
from tests.tiny import CHATML, save_tiny, tiny_config, tiny_tokenizer

PAIR = {"prompt": "teh", "answer": "the"}
TALK = {
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": " uno "},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "dos"},
    ]
}
# Earlier answers lose the reasoning block that the last one has, as with Qwen3.
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
# The answer stands behind a header that the generation prompt lacks, and the last turn ends
# otherwise than the ones before, as with gpt-oss.
CHANNELS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}"
    "{% if m.role == 'assistant' %}[final]{% endif %}: {{ m.content }}"
    "{% if loop.last %}<|im_end|>{% else %}<|pad|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
# No token at the end of a turn, and a space before the answer, as with Alpaca's form.
NO_END = (
    "{% for m in messages %}{% if m.role == 'assistant' %}Answer: {{ m.content }}\n"
    "{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)
REFUSING = "{{ raise_exception('roles must alternate') }}"
SHOUTING = CHATML.replace("message['content']", "message['content'] | replace('o', '0')")


def encode(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast, **options: Any) -> Any:
    (example,) = TextCodec(tokenizer, **options).encode([row], max_length=999, source="s")
    assert len(example["input_ids"]) == len(example["labels"])
    pairs = zip(example["input_ids"], example["labels"], strict=True)
    assert all(label in (token, -100) for token, label in pairs)
    assert example["labels"][-1] != -100
    return example


def answers(example: Any, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The labelled stretches of an example as text."""
    runs: list[list[int]] = [[]]
    for label in example["labels"]:
        if label != -100:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def test_prompt_and_answer_become_two_turns() -> None:
    tokenizer = tiny_tokenizer()
    example = encode(PAIR, tokenizer)
    turns = [{"role": "user", "content": "teh"}]
    given = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert prompt_ids(example) == given
    assert tokenizer.decode(example["input_ids"]) == (
        "<|im_start|>user\nteh<|im_end|>\n<|im_start|>assistant\nthe<|im_end|>"
    )
    assert answers(example, tokenizer) == ["the<|im_end|>"]


def test_every_assistant_turn_is_labelled_and_no_other() -> None:
    tokenizer = tiny_tokenizer()
    example = encode(TALK, tokenizer)
    assert answers(example, tokenizer) == [" uno <|im_end|>", "dos<|im_end|>"]
    whole = tokenizer.apply_chat_template(TALK["messages"], tokenize=False)
    assert tokenizer.decode(example["input_ids"]) == whole.removesuffix("\n")
    given = tokenizer.apply_chat_template(
        TALK["messages"][:-1], add_generation_prompt=True, return_dict=False
    )
    assert prompt_ids(example) == given


@pytest.mark.parametrize(
    ("template", "expected", "before"),
    [
        (REASONING, ["uno<|im_end|>", "dos<|im_end|>"], "assistant\n<think>\n\n</think>\n\n"),
        (CHANNELS, [" uno ", "dos<|im_end|>"], "<|im_start|>assistant[final]: "),
        (NO_END, ["  uno ", " dos<|im_end|>"], "Answer:"),
    ],
)
def test_uncommon_templates_are_cut_at_the_answers(
    template: str, expected: list[str], before: str
) -> None:
    tokenizer = tiny_tokenizer(chat_template=template)
    example = encode(TALK, tokenizer)
    assert answers(example, tokenizer) == expected
    assert tokenizer.decode(prompt_ids(example)).endswith(before)
    whole = tokenizer.apply_chat_template(TALK["messages"], tokenize=False)
    assert whole.startswith(tokenizer.decode(example["input_ids"][:-1]))


def test_answer_that_also_stands_in_the_prompt_is_not_confused() -> None:
    tokenizer = tiny_tokenizer()
    example = encode({"prompt": "assistant\na", "answer": "a"}, tokenizer)
    assert answers(example, tokenizer) == ["a<|im_end|>"]
    assert len(prompt_ids(example)) == len(example["input_ids"]) - 2


def test_conversation_that_the_assistant_begins_is_encoded() -> None:
    tokenizer = tiny_tokenizer()
    turns = [{"role": "assistant", "content": "Hello!"}, *TALK["messages"][1:3]]
    example = encode({"messages": turns}, tokenizer)
    assert answers(example, tokenizer) == ["Hello!<|im_end|>", " uno <|im_end|>"]


@pytest.mark.parametrize("add_bos", [False, True])
def test_without_template_the_text_is_prompt_answer_and_end(add_bos: bool) -> None:
    tokenizer = tiny_tokenizer(chat_template=None, add_bos=add_bos)
    example = encode(PAIR, tokenizer)
    begin = "<|im_start|>" if add_bos else ""
    assert tokenizer.decode(prompt_ids(example)) == f"{begin}teh"
    assert answers(example, tokenizer) == ["the<|im_end|>"]
    switched_off = encode(PAIR, tiny_tokenizer(add_bos=add_bos), chat_template=False)
    assert switched_off == example


def test_template_writes_its_own_beginning_only() -> None:
    with_bos = encode(PAIR, tiny_tokenizer(add_bos=True))
    assert with_bos == encode(PAIR, tiny_tokenizer())


def test_template_does_not_write_todays_date() -> None:
    dated = "{% if not date_string is defined %}{{ strftime_now('%Y-%m-%d') }}{% endif %}" + CHATML
    assert encode(PAIR, tiny_tokenizer(chat_template=dated)) == encode(PAIR, tiny_tokenizer())


def test_reasoning_is_switched_off_in_templates_that_know_it() -> None:
    switch = "{% if enable_thinking is undefined or enable_thinking %}/think{% endif %}"
    switched = encode(PAIR, tiny_tokenizer(chat_template=switch + CHATML))
    assert switched == encode(PAIR, tiny_tokenizer())


@pytest.mark.parametrize(
    ("row", "template", "asked", "message"),
    [
        (PAIR, None, True, "the tokenizer has no chat template"),
        (TALK, None, None, "s: row 1 has messages, which need a chat template"),
        (TALK, CHATML, False, "s: row 1 has messages, which need a chat template"),
        (PAIR, REFUSING, None, "refuses the conversation .*roles must alternate"),
        (TALK, SHOUTING, None, "row 1: the chat template changes the answer of message 3"),
    ],
)
def test_rows_that_a_template_does_not_fit_raise(
    row: dict[str, Any], template: str | None, asked: bool | None, message: str
) -> None:
    tokenizer = tiny_tokenizer(chat_template=template)
    with pytest.raises(ValueError, match=message):
        encode(row, tokenizer, chat_template=asked)


def test_long_row_raises_or_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    codec = TextCodec(tiny_tokenizer(chat_template=None))
    rows = [PAIR, {"prompt": "x" * 50, "answer": "y"}, PAIR]
    with pytest.raises(ValueError, match="data.jsonl: row 2 has 52 tokens, but max_length is 51"):
        codec.encode(rows, max_length=51, source="data.jsonl")
    assert len(codec.encode(rows, max_length=52, source="data.jsonl")) == 3
    with caplog.at_level(logging.WARNING):
        kept = codec.encode(rows, max_length=51, skip_long=True, source="data.jsonl")
    assert [example["row"] for example in kept] == [0, 2]
    assert "data.jsonl: left out 1 rows over 51 tokens" in caplog.text
    with pytest.raises(ValueError, match="none of 3 rows has at most 5 tokens"):
        codec.encode(rows, max_length=5, skip_long=True, source="data.jsonl")


def test_stop_ids_hold_the_end_token_and_the_templates_end_of_turn() -> None:
    tokenizer = tiny_tokenizer()
    assert TextCodec(tokenizer).stop_ids == [2]
    tokenizer.eos_token = "<|pad|>"
    assert TextCodec(tokenizer).stop_ids == [0, 2]
    assert TextCodec(tiny_tokenizer(chat_template=NO_END)).stop_ids == [2]
    bare = tiny_tokenizer(chat_template=None)
    bare.eos_token = None
    with pytest.raises(ValueError, match="has no end token"):
        TextCodec(bare)


@pytest.mark.parametrize("side", ["right", "left"])
def test_collate_pads_one_side_and_hides_padding(side: Any) -> None:
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "row": 4},
        {"input_ids": [8], "labels": [8], "row": 5},
    ]
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token_id = 9
    batch = TextCodec(tokenizer).collate(rows, side=side)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert all(value.dtype == torch.int64 and value.shape == (2, 3) for value in batch.values())
    shown = batch["attention_mask"].bool()
    for number, row in enumerate(rows):
        assert batch["input_ids"][number][shown[number]].tolist() == row["input_ids"]
        assert batch["labels"][number][shown[number]].tolist() == row["labels"]
    assert (batch["input_ids"][~shown] == 9).all() and (batch["labels"][~shown] == -100).all()
    assert bool(shown[1, 0]) == (side == "right")
    assert len(rows[1]["input_ids"]) == 1  # the examples are not changed


def test_collate_refuses_another_side() -> None:
    wrong: Any = "middle"
    with pytest.raises(ValueError, match="side is 'middle'"):
        TextCodec(tiny_tokenizer()).collate([{"input_ids": [1], "labels": [1]}], side=wrong)


def test_loaded_tokenizer_has_a_pad_token(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path, tokenizer=tiny_tokenizer(pad=False))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    assert encode(PAIR, tokenizer) == encode(PAIR, tiny_tokenizer())


def test_folder_without_tokenizer_raises(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_batches_are_arguments_of_a_forward_that_keeps_no_cache() -> None:
    examples = [{"input_ids": [5] * n, "labels": [-100, *[5] * (n - 1)]} for n in (2, 4, 3)]
    codec = TextCodec(tiny_tokenizer())
    pairs = labelled_batches(codec, examples, 2)
    assert [labels.tolist() for _, labels in pairs] == [
        [[-100, 5, -100, -100], [-100, 5, 5, 5]],
        [[-100, 5, 5]],
    ]
    for (batch, labels), plain in zip(pairs, calibration_batches(codec, examples, 2), strict=True):
        assert "labels" not in batch and batch["use_cache"] is False
        assert batch["input_ids"].shape == batch["attention_mask"].shape == labels.shape
        assert batch.keys() == plain.keys()
        assert torch.equal(batch["input_ids"], plain["input_ids"])

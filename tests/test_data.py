"""Reading rows, the spelling task and the splits."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emloc.data import SPLITS, codespell_rows, read_rows, split_rows

PAIR = {"prompt": "2 + 2", "answer": "4"}
CHAT = {
    "messages": [
        {"role": "system", "content": ""},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
}


def write(folder: Path, *lines: str | bytes) -> Path:
    """A file of these lines."""
    path = folder / "rows.jsonl"
    path.write_bytes(b"".join((x if isinstance(x, bytes) else x.encode()) + b"\n" for x in lines))
    return path


def chat(*turns: tuple[str, object]) -> str:
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]})


def test_both_forms_are_read_and_other_keys_dropped(tmp_path: Path) -> None:
    turns = [{**turn, "name": "x"} for turn in CHAT["messages"]]
    path = write(
        tmp_path,
        json.dumps({**PAIR, "id": 7, "messages": None}),
        "",
        "  ",
        json.dumps({"messages": turns, "prompt": "ignored", "source": "y"}) + "\r",
    )
    assert read_rows(path) == [PAIR, CHAT]


def test_byte_order_mark_and_line_separators_inside_a_text_are_no_obstacle(tmp_path: Path) -> None:
    row = {"prompt": "a\u2028b\x85c é", "answer": "日本"}
    path = write(tmp_path, b"\xef\xbb\xbf" + json.dumps(row, ensure_ascii=False).encode())
    assert read_rows(path) == [row]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'prompt': 1}", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "is a list, but it must be a JSON object"),
        ("{}", "keys are none at all"),
        ('{"prompt": "x", "reply": "y"}', "keys are prompt, reply"),
        ('{"prompt": "x", "answer": 4}', "answer is a number"),
        ('{"prompt": null, "answer": "y"}', "prompt is null"),
        ('{"prompt": "x", "answer": " \\n"}', "answer is empty"),
        ('{"prompt": "", "answer": "y"}', "prompt is empty"),
        ('{"prompt": "x", "answer": "\\ud83d"}', "half of a character"),
        ('{"messages": []}', "messages is empty"),
        ('{"messages": "hi"}', "messages is a string"),
        ('{"messages": [{"role": "user"}]}', "message 1 must be an object with role and content"),
        (chat(("user", "x"), ("bot", "y")), "role of message 2 is 'bot'"),
        (chat(("user", ["x"]), ("assistant", "y")), "content of message 1 is a list"),
        (chat(("user", "x"), ("assistant", "")), "content of message 2 is empty"),
        (chat(("user", "x")), "last message is from the user"),
        (chat(("system", "x"), ("assistant", "y")), "no message is from the user"),
        (b'{"prompt": "\xe9", "answer": "y"}', "byte 13 of the line is not UTF-8"),
    ],
)
def test_bad_line_raises_with_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path, json.dumps(PAIR), "", line)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}:3: .*{re.escape(message)}"):
        read_rows(path)


def test_empty_and_missing_files_raise(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is empty"):
        read_rows(write(tmp_path, "", " "))
    with pytest.raises(ValueError, match="missing.jsonl is not a file"):
        read_rows(tmp_path / "missing.jsonl")


def test_codespell_keeps_one_typo_of_each_plain_word(tmp_path: Path) -> None:
    lines = ["teh->the", "hte->the", "eht->the", "aas->ass, as,", "clas->class, disabled because"]
    lines += [
        "1nd->1st",
        "alot->a lot",
        "dont->don't",
        "i'ts->its",
        "Grammer->grammar",
        "wich->which",
    ]
    rows = codespell_rows(write(tmp_path, *lines))
    assert sorted(row["answer"] for row in rows) == ["the", "which"]
    typo = next(row["prompt"].split()[-1] for row in rows if row["answer"] == "the")
    assert typo in ("teh", "hte", "eht")
    assert codespell_rows(write(tmp_path, *lines[::-1])) == rows[::-1]  # the place is of no matter


def test_codespell_does_not_always_choose_the_first_typo(tmp_path: Path) -> None:
    words = ["".join(chr(97 + int(digit)) for digit in str(number)) for number in range(50)]
    lines = [f"{start}{word}->{word}z" for word in words for start in "xy"]
    chosen = [row["prompt"].split()[-1][0] for row in codespell_rows(write(tmp_path, *lines))]
    assert len(chosen) == len(words) and 10 < chosen.count("x") < 40


@pytest.mark.parametrize("line", ["just words", "->the", "teh->", "a->b->c", b"\xff->the"])
def test_codespell_names_the_line_that_is_no_entry(tmp_path: Path, line: str) -> None:
    with pytest.raises(ValueError, match="jsonl:2: .*is not an entry"):
        codespell_rows(write(tmp_path, "teh->the", line))


def test_codespell_without_usable_entry_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no entry with one lower-case word"):
        codespell_rows(write(tmp_path, "aas->ass, as,"))
    with pytest.raises(ValueError, match="is not a file"):
        codespell_rows(tmp_path / "missing.txt")


def numbered(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"p{number}", "answer": "a"} for number in range(count)]


@given(
    st.lists(st.integers(0, 30), min_size=12, max_size=60),
    st.tuples(st.integers(1, 5), st.integers(0, 5), st.integers(0, 5)),
    st.integers(0, 2**32),
)
def test_splits_have_their_sizes_and_share_no_row(
    numbers: list[int], counts: tuple[int, int, int], seed: int
) -> None:
    rows = [{"prompt": f"p{number}", "answer": "a"} for number in numbers]
    sizes = dict(zip(SPLITS, counts, strict=True))
    if sum(counts) > len(set(numbers)):
        with pytest.raises(ValueError, match=f"there are {len(set(numbers))} different rows"):
            split_rows(rows, sizes=sizes, seed=seed)
        return
    splits = split_rows(rows, sizes=sizes, seed=seed)
    assert {name: len(split) for name, split in splits.items()} == sizes
    prompts = [row["prompt"] for split in splits.values() for row in split]
    assert len(set(prompts)) == len(prompts) and set(prompts) <= {row["prompt"] for row in rows}


def test_seed_decides_the_splits_and_rows_stay_as_they_were() -> None:
    rows = numbered(50)
    sizes = {"train": 20, "validation": 5, "test": 10}
    first = split_rows(rows, sizes=sizes, seed=3)
    assert first == split_rows(rows, sizes=sizes, seed=3) and rows == numbered(50)
    assert first["test"] != split_rows(rows, sizes=sizes, seed=4)["test"]
    larger = split_rows(rows, sizes={**sizes, "train": 35}, seed=3)
    assert larger["test"] == first["test"] and larger["validation"] == first["validation"]


def test_split_is_the_same_on_every_machine() -> None:
    prompts = [
        row["prompt"] for row in split_rows(numbered(8), sizes={"train": 8}, seed=0)["train"]
    ]
    assert prompts == ["p4", "p1", "p5", "p2", "p0", "p3", "p7", "p6"]  # a record of one run


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"train": 9, "test": 2}, "there are 10 different rows, but the splits ask for 11"),
        ({"train": 0, "test": 2}, "train split is 0"),
        ({"test": 2}, "train split is 0"),
        ({"train": 1, "test": -1}, "test split is -1"),
        ({"train": True}, "train split is True"),
        ({"train": 1, "dev": 1}, "'dev' is no split"),
    ],
)
def test_bad_sizes_raise(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_rows(numbered(10), sizes=sizes, seed=0)

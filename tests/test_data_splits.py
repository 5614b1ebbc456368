"""Splits of rows that repeat, and of rows that turn out to be unusable."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emloc.data import FORMATS, SPLITS, read_data, read_rows, split_rows
from emloc.pictures import check_picture, pictures_of
from tests.test_pictures import asking, save_picture


def numbered(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"p{number}", "answer": "a"} for number in range(count)]


SIZES = st.tuples(st.integers(1, 5), st.integers(0, 5), st.integers(0, 5))


@given(st.sets(st.integers(0, 29)), SIZES, st.integers(0, 2**32))
def test_only_accepted_rows_are_taken_and_no_more_are_asked_for(
    refused: set[int], counts: tuple[int, int, int], seed: int
) -> None:
    rows, sizes, asked = numbered(30), dict(zip(SPLITS, counts, strict=True)), []
    bad = [rows[number] for number in sorted(refused)]

    def accept(row: dict[str, Any]) -> bool:
        asked.append(row["prompt"])
        return row not in bad

    order = split_rows(rows, sizes={"train": 30}, seed=seed)["train"]
    good = [row for row in order if row not in bad]
    if sum(counts) > len(good):
        pattern = f"there are {len(good)} usable rows, since {len(bad)} of the 30 different ones"
        with pytest.raises(ValueError, match=f"{pattern} were left out, but the splits ask for"):
            split_rows(rows, sizes=sizes, seed=seed, accept=accept)
        assert len(asked) == 30
        return
    splits = split_rows(rows, sizes=sizes, seed=seed, accept=accept)
    assert splits == cut(good, sizes)
    last = order.index(good[sum(counts) - 1])
    assert asked == [row["prompt"] for row in order[: last + 1]]


def cut(rows: list[dict[str, Any]], sizes: dict[str, int]) -> dict[str, list[dict[str, Any]]]:
    """Test, validation and train, in this order, from rows that are in order."""
    test, validation, train = sizes["test"], sizes["validation"], sizes["train"]
    held = test + validation
    return {
        "train": rows[held : held + train],
        "validation": rows[test:held],
        "test": rows[:test],
    }


@given(SIZES, st.integers(0, 2**32))
def test_accepting_all_changes_nothing(counts: tuple[int, int, int], seed: int) -> None:
    sizes = dict(zip(SPLITS, counts, strict=True))
    plain = split_rows(numbered(20), sizes=sizes, seed=seed)
    assert split_rows(numbered(20), sizes=sizes, seed=seed, accept=lambda row: True) == plain


def test_too_few_rows_are_refused_before_any_is_looked_at() -> None:
    def accept(row: dict[str, Any]) -> bool:
        raise AssertionError("a row was looked at")

    with pytest.raises(ValueError, match="there are 3 different rows, but the splits ask for 4"):
        split_rows(numbered(3), sizes={"train": 4}, seed=0, accept=accept)


def test_unreadable_pictures_are_left_out_and_others_stay_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    rows = [asking(save_picture(tmp_path / f"{number}.png", seed=number)) for number in range(40)]
    for number in range(0, 40, 2):
        (tmp_path / f"{number}.png").write_text("broken")
    opened: list[str] = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda path: (opened.append(path), real(path))[1])

    def accept(row: dict[str, Any]) -> bool:
        try:
            return check_picture(*pictures_of(row), "row") == (48, 32)
        except ValueError:
            return False

    splits = split_rows(rows, sizes={"train": 4, "test": 2}, seed=0, accept=accept)
    used = [pictures_of(row)[0] for split in splits.values() for row in split]
    assert len(used) == 6 and all(int(Path(path).stem) % 2 for path in used)
    assert set(used) < set(opened) and len(opened) == len(set(opened)) < 40


@given(st.lists(st.integers(1, 4), min_size=12, max_size=12), SIZES.filter(lambda s: sum(s) <= 12))
def test_repeats_count_once_and_stand_together_in_train_only(
    times: list[int], counts: tuple[int, int, int]
) -> None:
    plain, sizes = numbered(12), dict(zip(SPLITS, counts, strict=True))
    rows = [{**row, "repeat": n} for row, n in zip(plain, times, strict=True)]
    expected = split_rows(plain, sizes=sizes, seed=5)
    often = {row["prompt"]: n for row, n in zip(plain, times, strict=True)}
    expected["train"] = [row for row in expected["train"] for _ in range(often[row["prompt"]])]
    assert split_rows(rows, sizes=sizes, seed=5) == expected
    assert [row["repeat"] for row in rows] == times


def test_rows_that_differ_in_repeat_alone_are_one(caplog: pytest.LogCaptureFixture) -> None:
    rows = [*numbered(3), {**numbered(1)[0], "repeat": 3}, {**numbered(1)[0], "repeat": 2}]
    with pytest.raises(ValueError, match="there are 3 different rows"):
        split_rows(rows, sizes={"train": 4}, seed=0)
    train = split_rows(rows, sizes={"train": 3}, seed=0)["train"]
    assert Counter(json.dumps(row) for row in train).most_common(1)[0] == (
        json.dumps(numbered(1)[0]),
        3,
    )
    assert len(train) == 5 and "2 rows are repetitions" in caplog.text


def test_data_is_read_by_its_format(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(numbered(1)[0]))
    assert read_data(path, format="jsonl") == read_rows(path) == numbered(1)
    (tmp_path / "dictionary.txt").write_text("teh->the\n")
    [row] = read_data(tmp_path / "dictionary.txt", format="codespell")
    assert row["answer"] == "the"
    line = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    (tmp_path / "talk.jsonl").write_text(json.dumps(line))
    entry = {"root": "", "annotation": "talk.jsonl"}
    (tmp_path / "meta.json").write_text(json.dumps({"talk": entry}))
    [row] = read_data(tmp_path / "meta.json", format="internvl", subset="talk")
    assert row["messages"][1] == {"role": "assistant", "content": "b"}


def test_unknown_formats_and_subsets_are_refused(tmp_path: Path) -> None:
    known = "jsonl, codespell, internvl, easy-vqa, easy-vqa-captions, dreambooth"
    assert ", ".join(FORMATS) == known
    with pytest.raises(ValueError, match=f"format 'csv' is unknown: take one of {known}"):
        read_data(tmp_path, format="csv")
    for name in ("jsonl", "codespell"):
        with pytest.raises(ValueError, match=f"format {name} has no subsets, but 'a' is asked for"):
            read_data(tmp_path, format=name, subset="a")

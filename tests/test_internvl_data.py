"""InternVL's meta files: several data sets, their pictures, shares and repetitions."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from emloc.data import internvl_rows
from emloc.pictures import pictures_of
from tests.test_pictures import save_picture

ASK = {"from": "human", "value": "<image>\nWhat is it?"}
REPLY = {"from": "gpt", "value": "A cat"}
LINE = {"id": 0, "image": "a.png", "width": 48, "height": 32, "conversations": [ASK, REPLY]}


def save_meta(folder: Path, *, name: str = "cats", lines: list[Any], **entry: Any) -> Path:
    """A meta file with one data set of these lines more, and the pictures that they may name."""
    for picture in ("a.png", "b/c.png"):
        save_picture(folder / "images" / picture)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    default = {"root": "images/", "annotation": f"{name}.jsonl", "data_augment": False,
               "repeat_time": 1, "length": len(lines)}  # fmt: skip
    path = folder / "meta.json"
    meta = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**meta, name: {**default, **entry}}), encoding="utf-8")
    return path


def line(*turns: str, image: Any = None, **more: Any) -> dict[str, Any]:
    """A line in which human and gpt speak in turn."""
    speakers = ["human", "gpt"] * len(turns)
    talk = [{"from": who, "value": what} for who, what in zip(speakers, turns, strict=False)]
    return {"conversations": talk, **({} if image is None else {"image": image}), **more}


def contents(row: dict[str, Any], root: Path) -> list[Any]:
    """What each message holds, a picture as the name of its file below the root in brackets."""
    found: list[Any] = []
    for message in row["messages"]:
        parts = message["content"]
        if not isinstance(parts, str):
            parts = [p.get("text", f"[{p.get('image', '')[len(str(root)) + 1 :]}]") for p in parts]
        found.append(parts)
    return found


def test_a_line_becomes_a_row(tmp_path: Path) -> None:
    [row] = internvl_rows(save_meta(tmp_path, lines=[{**LINE, "answers": ["cat", "A cat"]}]))
    picture = {"type": "image", "image": str(tmp_path / "images" / "a.png")}
    content = [picture, {"type": "text", "text": "What is it?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat"}]
    assert row == {"messages": turns, "answers": ["cat", "A cat"]}


@pytest.mark.parametrize(
    ("turns", "image", "expected"),
    [
        (("Who?", "Me"), None, ["Who?", "Me"]),
        (("Who?", "Me"), "", ["Who?", "Me"]),
        (("Who?", "Me"), [], ["Who?", "Me"]),
        (("Who?", "Me"), "a.png", [["[a.png]", "Who?"], "Me"]),  # without a mark: in front
        (("Who?", "Me"), ["a.png"], [["[a.png]", "Who?"], "Me"]),
        (("Who?\n<image>", "Me"), "a.png", [["Who?\n", "[a.png]"], "Me"]),
        (("<image>", "Me"), "a.png", [["[a.png]"], "Me"]),
        (("Hi", "Ho", "Who?", "Me"), "a.png", [["[a.png]", "Hi"], "Ho", "Who?", "Me"]),
        (("Hi", "Ho", "<image>\nWho?", "Me"), "a.png", ["Hi", "Ho", ["[a.png]", "Who?"], "Me"]),
        (("<image>\nHi", "<image>"), "a.png", [["[a.png]", "Hi"], "<image>"]),
        (
            ("1: <image>\n2: <image>\nHi", "Ho", "And <image>?", "Me"),
            ["b/c.png", "a.png", "b/c.png"],
            [["1: ", "[b/c.png]", "2: ", "[a.png]", "Hi"], "Ho", ["And ", "[b/c.png]", "?"], "Me"],
        ),
    ],
)
def test_pictures_stand_where_the_marks_are(
    tmp_path: Path, turns: tuple[str, ...], image: Any, expected: list[Any]
) -> None:
    [row] = internvl_rows(save_meta(tmp_path, lines=[line(*turns, image=image)]))
    assert contents(row, tmp_path / "images") == expected
    assert [message["role"] for message in row["messages"][:2]] == ["user", "assistant"]


def test_a_system_turn_comes_first(tmp_path: Path) -> None:
    talk = [{"from": "system", "value": "Be brief"}, {"from": "human", "value": "Who?"}, REPLY]
    [row] = internvl_rows(save_meta(tmp_path, lines=[{"image": "a.png", "conversations": talk}]))
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    assert contents(row, tmp_path / "images") == ["Be brief", ["[a.png]", "Who?"], "A cat"]


def numbered(count: int) -> list[dict[str, Any]]:
    return [line(f"Question {number}", "A cat") for number in range(count)]


def questions(rows: list[dict[str, Any]]) -> list[str]:
    return [row["messages"][0]["content"] for row in rows]


@pytest.mark.parametrize(
    ("share", "count"), [(0.5, 3), (0.29, 2), (0.99, 6), (0.15, 1), (1.0, 7), (1, 7)]
)
def test_a_share_of_a_data_set_is_its_start(tmp_path: Path, share: float, count: int) -> None:
    rows = internvl_rows(save_meta(tmp_path, lines=numbered(7), repeat_time=share))
    assert questions(rows) == [f"Question {number}" for number in range(count)]
    assert all("repeat" not in row for row in rows)


def test_data_sets_follow_each_other_and_can_be_chosen(tmp_path: Path) -> None:
    save_meta(tmp_path, name="few", lines=numbered(4), repeat_time=0.5)
    meta = save_meta(tmp_path, name="often", lines=numbered(2), repeat_time=3)
    rows = internvl_rows(meta)
    assert [row.get("repeat") for row in rows] == [None, None, 3, 3]
    assert internvl_rows(meta, subset="few") == rows[:2]
    assert internvl_rows(meta, subset="often") == rows[2:]
    with pytest.raises(ValueError, match=r"has no data set 'other': it has few, often\."):
        internvl_rows(meta, subset="other")


def test_paths_start_here_or_at_the_meta_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = save_meta(tmp_path / "data", lines=[LINE])
    monkeypatch.chdir(tmp_path)
    [row] = internvl_rows("data/meta.json")
    assert pictures_of(row) == [str(tmp_path / "data" / "images" / "a.png")]
    save_meta(tmp_path, lines=[LINE, LINE])  # now there is something at the current folder
    rows = internvl_rows(meta)
    assert [pictures_of(row) for row in rows] == [[str(tmp_path / "images" / "a.png")]] * 2
    entry = {"root": str(tmp_path / "data/images"), "annotation": str(tmp_path / "data/cats.jsonl")}
    absolute = save_meta(tmp_path / "meta", lines=[], length=1, **entry)
    assert internvl_rows(absolute) == [row]


def test_a_text_only_data_set_needs_no_folder(tmp_path: Path) -> None:
    assert len(internvl_rows(save_meta(tmp_path, lines=numbered(2), root="absent"))) == 2


def test_what_is_not_done_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    internvl_rows(save_meta(tmp_path, lines=numbered(3)))
    assert caplog.records == []
    meta = save_meta(tmp_path, lines=numbered(3), data_augment=True, length=9, max_dynamic_patch=4)
    with caplog.at_level(logging.WARNING):
        internvl_rows(meta)
    augment, patches, length = (record.getMessage() for record in caplog.records)
    assert "data set 'cats' has data_augment on, but pictures are not augmented" in augment
    assert "has max_dynamic_patch, which is not read: set data.pictures" in patches
    assert "has the length 9, but 3 lines" in length


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"repeat_time": 0}, "repeat_time is 0, but it must be a whole number of at least 1, or"),
        ({"repeat_time": -1}, "repeat_time is -1"),
        ({"repeat_time": 1.5}, "repeat_time is 1.5"),
        ({"repeat_time": True}, "repeat_time is True"),
        ({"repeat_time": "2"}, "repeat_time is '2'"),
        ({"repeat_time": float("nan")}, "repeat_time is nan"),
        ({"repeat_time": float("inf")}, "repeat_time is inf"),
        ({"repeat_time": 0.3}, "has no row: .* has 2 lines, of which repeat_time 0.3 leaves none"),
        ({"root": None}, "root is null, but it must be the path"),
        ({"annotation": 3}, "annotation is a number, but it must be the path"),
        ({"annotation": "absent.jsonl"}, "annotation .*absent.jsonl, which is not a file: correct"),
    ],
)
def test_a_bad_data_set_is_named(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    meta = save_meta(tmp_path, lines=numbered(2), **entry)
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(meta))}: the data set 'cats'.*{message}"
    ):
        internvl_rows(meta)


@pytest.mark.parametrize("content", ["[]", "{}", '"x"', '{"cats": 3}', "{"])
def test_a_bad_meta_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(ValueError, match=r"meta\.json.* (must be a JSON object|not valid JSON)"):
        internvl_rows(tmp_path / "meta.json")
    with pytest.raises(ValueError, match=r"absent\.json is not a file: give the path of an Inter"):
        internvl_rows(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({**LINE, "image": ["a.png", "b/c.png"]}, "have 1 <image> marks, but image names 2 pictu"),
        ({**LINE, "image": None}, "have 1 <image> marks, but image names 0 pictures"),
        (line("Who?", "Me", image=["a.png", "a.png"]), "have 0 <image> marks, but image names 2"),
        (line("<image><image>", "Me", image="a.png"), "have 2 <image> marks, but image names 1"),
        (line("Hi", "<image>", image=["a.png"] * 2), "have 0 <image> marks, but image names 2"),
        (line("Who?", "Me", image=4), "image is a number"),
        (line("Who?", "Me", image="/a.png"), "the picture '/a.png' may lie outside of"),
        (line("Who?", "Me", image="../a.png"), "the picture '../a.png' may lie outside of"),
        (line("Who?", "Me", image="s3://a.png"), "the picture 's3://a.png' is no local file"),
        (line("Who?", "Me", video="a.mp4"), "has a video, but only pictures are read"),
        (line("Who?"), "the last message is from the user"),
        (line("Who?", "Me", "And?"), "the last message is from the user"),
        (line("Who?", " "), "the value of turn 2 is empty"),
        (line("", "Me"), "the value of turn 1 is empty"),
        ({"conversations": [REPLY]}, "no message is from the user"),
        ({"conversations": []}, "conversations is empty, but it must be a list"),
        ({"id": 4}, "conversations is null, but it must be a list"),
        ({"conversations": ["Hi"]}, "turn 1 must be an object with from and value"),
        ({"conversations": [{"from": "gpt"}]}, "turn 1 must be an object with from and value"),
        ({"conversations": [{"from": "you", "value": "Hi"}]}, "turn 1 is from 'you', but it must"),
        ({"conversations": [{"from": [], "value": "Hi"}]}, "turn 1 is from [], but it must"),
        (
            {"conversations": [ASK, {"from": "system", "value": "Be brief"}, REPLY]},
            "turn 2 is from 'system', but it must be from human or gpt",
        ),
        ({**LINE, "answers": []}, "answers is empty"),
        ("text", "the line is a string, but it must be a JSON object"),
    ],
)
def test_bad_line_raises_with_file_and_line(tmp_path: Path, bad: Any, message: str) -> None:
    meta = save_meta(tmp_path, lines=[LINE, bad, LINE])
    where = re.escape(str(tmp_path / "cats.jsonl"))
    with pytest.raises(ValueError, match=f"^{where}:2: .*{re.escape(message)}") as caught:
        internvl_rows(meta)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_pictures_without_their_root_are_refused(tmp_path: Path) -> None:
    meta = save_meta(tmp_path, lines=[LINE], root="absent")
    with pytest.raises(ValueError, match=r"cats\.jsonl:1: the root .*absent of its pictures is no"):
        internvl_rows(meta)

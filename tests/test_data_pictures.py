"""JSON Lines whose rows show pictures, in each of the accepted forms."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from emloc.data import read_rows
from emloc.pictures import pictures_of
from tests.test_pictures import save_picture

QUESTION = {"type": "text", "text": "What is it?"}
REPLY = {"role": "assistant", "content": "A cat"}


def write(folder: Path, *lines: object) -> Path:
    """A file of these lines, with the pictures a.png and b/c.png beside it."""
    save_picture(folder / "a.png")
    save_picture(folder / "b" / "c.png")
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def user(*content: object) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def chat(*content: object, **more: object) -> dict[str, Any]:
    """A line with one turn of the user, made of parts."""
    return {"messages": [user(*content), REPLY], **more}


def image(path: object = None) -> dict[str, Any]:
    return {"type": "image"} if path is None else {"type": "image", "image": str(path)}


@pytest.mark.parametrize("key", ["image", "path", "url"])
def test_parts_that_name_their_file(tmp_path: Path, key: str) -> None:
    parts = [{"type": "image", key: "a.png", "text": None}, {**QUESTION, "image": None}]
    [row] = read_rows(write(tmp_path, chat(*parts, id=3, width=9)))
    assert row == chat(image(tmp_path / "a.png"), QUESTION)


def test_an_empty_text_beside_a_picture_is_no_part(tmp_path: Path) -> None:
    parts = [image("a.png"), {"type": "text", "text": ""}, {"type": "text", "text": "\n"}, QUESTION]
    [row] = read_rows(write(tmp_path, chat(*parts)))
    assert row == chat(image(tmp_path / "a.png"), *parts[2:])


def test_the_line_names_the_pictures_of_its_parts_in_order(tmp_path: Path) -> None:
    turns = [user(image(), QUESTION, image()), REPLY, user(image("a.png")), REPLY]
    turns.insert(0, {"role": "system", "content": "Be brief"})
    line = {"messages": [*turns, user(image(), image()), REPLY]}
    line["images"] = ["a.png", "b/c.png", "b/c.png", "a.png"]
    [row] = read_rows(write(tmp_path, line))
    first, second = str(tmp_path / "a.png"), str(tmp_path / "b" / "c.png")
    assert pictures_of(row) == [first, second, first, second, first]
    assert row["messages"][1] == user(image(first), QUESTION, image(second))
    assert row["messages"][0] == turns[0] and len(row["messages"]) == 7


def test_pictures_stand_before_a_prompt_without_marks(tmp_path: Path) -> None:
    pair = {"prompt": "What is it?", "answer": "A cat"}
    lines = [{**pair, "image": "a.png"}, {**pair, "image": ["b/c.png", "a.png"]}]
    first, second = read_rows(write(tmp_path, *lines))
    assert first == chat(image(tmp_path / "a.png"), QUESTION)
    assert second == chat(image(tmp_path / "b" / "c.png"), image(tmp_path / "a.png"), QUESTION)


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("<image>\nWhat is it?", [0, "What is it?"]),
        ("<image>What is it?", [0, "What is it?"]),
        ("<image>\n\n  Well \n", [0, "\n  Well \n"]),
        (" Look:\n<image>", [" Look:\n", 0]),
        ("One: <image>\nTwo: <image>\nWell?", ["One: ", 0, "Two: ", 1, "Well?"]),
        ("<image><image>", [0, 1]),
        ("<image>\n<image>\n", [0, 1]),
    ],
)
def test_marks_give_the_places(tmp_path: Path, prompt: str, parts: list[int | str]) -> None:
    names = ["a.png", "b/c.png"][: prompt.count("<image>")]
    line = {"prompt": prompt, "answer": "A cat", "images": names}
    [row] = read_rows(write(tmp_path, line))
    expected = [
        image(tmp_path / names[part]) if isinstance(part, int) else {"type": "text", "text": part}
        for part in parts
    ]
    assert row["messages"][0]["content"] == expected


@pytest.mark.parametrize("empty", [{}, {"image": None}, {"image": ""}, {"images": []}])
def test_rows_without_pictures_keep_their_form(tmp_path: Path, empty: dict[str, Any]) -> None:
    pair = {"prompt": "Hi", "answer": "Hello"}
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = read_rows(write(tmp_path, {**pair, **empty}, {"messages": turns, **empty}))
    assert rows == [pair, {"messages": turns}]
    marked = {"prompt": "Is <image> a tag?", "answer": "Yes"}
    assert read_rows(write(tmp_path, marked)) == [marked]


def test_texts_in_parts_become_one_string(tmp_path: Path) -> None:
    def text(value: str) -> dict[str, str]:
        return {"type": "text", "text": value}

    turns = [
        {"role": "system", "content": [text("")]},
        {"role": "user", "content": [text("Hi "), text("there")]},
        {"role": "assistant", "content": [text("Hello")]},
    ]
    [row] = read_rows(write(tmp_path, {"messages": turns}))
    assert [turn["content"] for turn in row["messages"]] == ["", "Hi there", "Hello"]


def test_answers_are_kept_as_they_are(tmp_path: Path) -> None:
    answers = ["cat", "cat", "a cat"]
    pair = {"prompt": "Hi", "answer": "Hello", "answers": answers, "repeat": 3}
    rows = read_rows(
        write(tmp_path, pair, {**pair, "image": "a.png"}, chat(QUESTION, answers=answers))
    )
    assert [row["answers"] for row in rows] == [answers] * 3
    assert all("repeat" not in row for row in rows)


PAIR = {"prompt": "Hi", "answer": "Hello"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (chat(image("/etc/a.png")), "the picture '/etc/a.png' may lie outside of"),
        (chat(image("../a.png")), "the picture '../a.png' may lie outside of"),
        (chat(image("http://x.org/a.png")), "the picture 'http://x.org/a.png' is no local file"),
        ({**PAIR, "image": "out/a.png"}, "the picture 'out/a.png' is a link to a place outside"),
        (chat({"type": "image", "base64": "AA"}), "content of message 1 has base64, but it must"),
        (chat({"type": "image", "image": "a", "url": "b"}), "has image and url, but it must name"),
        (chat({"type": "image", "image": {"bytes": 1}}), "the image of part 1 of the content of"),
        (
            chat({"type": "image", "path": ""}),
            "the path of part 1 of the content of message 1 is e",
        ),
        (chat(QUESTION, {"type": "video"}), "is a list in which part 2 has the type 'video'"),
        (chat(QUESTION, "text"), "is a list in which part 2 is a string"),
        (chat({"type": "text"}), "the text of part 1 of the content of message 1 is null"),
        (chat({"type": "text", "text": " "}), "the content of message 1 is empty"),
        (chat(), "the content of message 1 is empty"),
        (chat(image(), QUESTION), "names 0 pictures of its own, but its messages have 1 image"),
        (chat(QUESTION, images=["a.png"]), "names 1 pictures of its own, but its messages have 0"),
        (chat(image(), images=["a.png"] * 2), "names 2 pictures of its own, but its messages hav"),
        (chat(image("a.png"), images=["a.png"]), "names 1 pictures of its own, but its messages"),
        (chat(image(), images=["a.png"], image="a.png"), "the line has image and images: name all"),
        (chat(image(), images=[{"path": "a.png"}]), "picture 1 of images is an object"),
        ({**PAIR, "image": 7}, "image is a number, but it must be the path of a file or a list"),
        ({**PAIR, "image": ["a.png", ""]}, "picture 2 of image is empty"),
        (
            {**PAIR, "prompt": "<image>", "image": ["a.png"] * 2},
            "has 1 <image> marks, but the line",
        ),
        ({**PAIR, "prompt": "<image><image>", "image": "a.png"}, "has 2 <image> marks, but the li"),
        ({**PAIR, "prompt": "<image>", "image": []}, "has 1 <image> marks, but the line names 0"),
        (
            {"messages": [user(QUESTION), {"role": "assistant", "content": [image("a.png")]}]},
            "message 2, which is from the assistant, has a picture, but only the user shows",
        ),
        ({**PAIR, "answers": []}, "answers is empty, but it must be a list"),
        ({**PAIR, "answers": "yes"}, "answers is a string, but it must be a list"),
        ({**PAIR, "answers": ["yes", " "]}, "answer 2 of answers is empty"),
        (chat(QUESTION, answers=[4]), "answer 1 of answers is a number"),
    ],
)
def test_bad_line_raises_with_file_and_line(tmp_path: Path, line: object, message: str) -> None:
    outside = tmp_path / "outside"
    path = write(tmp_path / "data", PAIR, line)
    save_picture(outside / "a.png")
    (tmp_path / "data" / "out").symlink_to(outside)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}:2: .*{re.escape(message)}") as e:
        read_rows(path)
    assert str(e.value).endswith(".") and "\n" not in str(e.value)

"""DreamBooth folders: which files are pictures, and where their captions come from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from emloc.data import dreambooth_rows, read_data, split_rows, with_caption
from emloc.pictures import load_picture, pictures_of
from tests.test_pictures import save_picture

NAMES = ("B.JPG", "a 1.jpeg", "c.png", "d.webp")


def save_folder(folder: Path, names: tuple[str, ...] = NAMES) -> Path:
    """A folder of pictures, each with other colours."""
    for seed, name in enumerate(names):
        save_picture(folder / name, seed=seed)
    return folder


def caption_file(folder: Path, lines: list[Any]) -> Path:
    """Write metadata.jsonl; what is a string goes there as it is."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "metadata.jsonl").write_text("\n".join(texts), encoding="utf-8")
    return folder


def captions(*names: str) -> list[Any]:
    return [{"file_name": name, "text": f"sks dog, {name}", "id": 3} for name in names]


def test_pictures_are_rows_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "dog")
    rows = dreambooth_rows(folder)
    assert rows == [{"image": str(folder / name)} for name in NAMES]
    assert read_data(str(folder), format="dreambooth") == rows
    assert [load_picture(path, "x").size for row in rows for path in pictures_of(row)] == [
        (48, 32)
    ] * len(NAMES)


def test_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = caption_file(save_folder(tmp_path / "dog"), captions(*NAMES))
    monkeypatch.chdir(tmp_path)
    assert dreambooth_rows("dog") == dreambooth_rows(folder)
    assert dreambooth_rows("dog")[0]["image"] == str(folder / "B.JPG")


def test_what_is_no_picture_is_passed_over(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "dog")
    rows = dreambooth_rows(folder)
    for name in (".DS_Store", "._c.png", ".hidden.png", "notes.txt", "README", "c.json", "x.mpg"):
        (folder / name).write_text("no picture")
    save_folder(folder / "more.png")
    assert dreambooth_rows(folder) == rows


def test_captions_follow_their_pictures(tmp_path: Path) -> None:
    folder = caption_file(save_folder(tmp_path), ["", *captions(*reversed(NAMES)), "  "])
    assert dreambooth_rows(folder) == [
        {"image": str(folder / name), "caption": f"sks dog, {name}"} for name in NAMES
    ]
    content = (folder / "metadata.jsonl").read_bytes()
    (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))
    assert dreambooth_rows(folder)[0]["caption"] == "sks dog, B.JPG"
    dotted = captions(*NAMES)
    dotted[0]["file_name"] = "./B.JPG"
    assert dreambooth_rows(caption_file(folder, dotted))[0]["caption"] == "sks dog, B.JPG"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[]", "the line is empty, but it must be a JSON object"),
        ({"file_name": "c.png"}, "the keys are file_name, but a line needs file_name and text"),
        ({"text": "a dog"}, "the keys are text, but"),
        ({}, "the keys are none at all, but"),
        ({"file_name": 3, "text": "a dog"}, "file_name is a number, but it must be a string"),
        ({"file_name": "c.png", "text": " "}, "text is empty"),
        ({"file_name": "c.png", "text": ["a"]}, "text is a list, but it must be a string"),
        ({"file_name": "B.JPG", "text": "a"}, "'B.JPG' has a caption already: remove one"),
        ({"file_name": "./B.JPG", "text": "a"}, "'./B.JPG' has a caption already"),
        ({"file_name": "e.png", "text": "a"}, "'e.png' is no picture in"),
        ({"file_name": "b.jpg", "text": "a"}, "'b.jpg' is no picture in"),
        ({"file_name": "notes.txt", "text": "a"}, "'notes.txt' is no picture in"),
        ({"file_name": "sub/c.png", "text": "a"}, "'sub/c.png' is no picture in"),
        ({"file_name": "../c.png", "text": "a"}, "the picture '../c.png' may lie outside of"),
        ({"file_name": "/c.png", "text": "a"}, "the picture '/c.png' may lie outside of"),
        ({"file_name": "https://x.org/c.png", "text": "a"}, "is no local file: save it below"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: Any, message: str) -> None:
    folder = save_folder(tmp_path)
    (folder / "notes.txt").write_text("no picture")
    save_picture(folder / "sub" / "c.png")
    caption_file(folder, [*captions("B.JPG", "a 1.jpeg"), line])
    where = re.escape(f"{folder}/metadata.jsonl:3: ")
    with pytest.raises(ValueError, match=f"^{where}.*{re.escape(message)}.*\\.$"):
        dreambooth_rows(folder)


def test_every_picture_needs_a_caption_if_one_has_it(tmp_path: Path) -> None:
    folder = caption_file(save_folder(tmp_path), captions(*NAMES[:3]))
    with pytest.raises(ValueError, match=r"metadata\.jsonl has no caption of 'd\.webp': add a lin"):
        dreambooth_rows(folder)
    with pytest.raises(ValueError, match=r"metadata\.jsonl has no caption of 'B\.JPG'"):
        dreambooth_rows(caption_file(folder, []))


def test_captions_in_another_file_are_not_overlooked(tmp_path: Path) -> None:
    folder = save_folder(tmp_path)
    (folder / "metadata.csv").write_text("file_name,text\nB.JPG,a dog\n")
    with pytest.raises(
        ValueError, match=r"its captions in metadata\.csv: write them as metadata\."
    ):
        dreambooth_rows(folder)
    assert len(dreambooth_rows(caption_file(folder, captions(*NAMES)))) == 4


def test_what_is_no_folder_of_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent is not there: give a folder with the pictures"):
        dreambooth_rows(tmp_path / "absent")
    picture = save_picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png is a file: give a folder"):
        dreambooth_rows(picture)
    save_folder(tmp_path / "dogs" / "dog")
    (tmp_path / "dogs" / "notes.txt").touch()
    with pytest.raises(ValueError, match="dogs has no picture: put 3 to 5 pictures of the subject"):
        dreambooth_rows(tmp_path / "dogs")


def test_pictures_that_pil_does_not_read_are_not_overlooked(tmp_path: Path) -> None:
    folder = save_folder(tmp_path)
    (folder / "e.HEIC").write_bytes(b"\0")
    with pytest.raises(ValueError, match=r"e\.HEIC is of a format that PIL does not read: save it"):
        dreambooth_rows(folder)


def test_links_to_elsewhere_are_refused(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "dog")
    (folder / "e.png").symlink_to("c.png")
    assert len(dreambooth_rows(folder)) == 5
    (folder / "f.png").symlink_to(save_picture(tmp_path / "other.png"))
    with pytest.raises(ValueError, match=r"the picture 'f\.png' is a link to a place outside of"):
        dreambooth_rows(folder)


def test_broken_pictures_are_rows_that_cannot_be_loaded(tmp_path: Path) -> None:
    folder = save_folder(tmp_path)
    Image.effect_noise((99, 99), 90).save(folder / "e.png")
    content = (folder / "e.png").read_bytes()
    (folder / "e.png").write_bytes(content[: len(content) // 2])
    (folder / "f.jpg").touch()
    *good, cut, empty = dreambooth_rows(folder)
    assert all(load_picture(row["image"], "x") for row in good)
    for row, message in ((cut, r"e\.png is cut short"), (empty, r"f\.jpg is not a picture that")):
        with pytest.raises(ValueError, match=message):
            load_picture(row["image"], "x")


def test_one_picture_is_enough_unless_the_splits_want_more(tmp_path: Path) -> None:
    rows = dreambooth_rows(save_folder(tmp_path, ("a.png",)))
    assert split_rows(rows, sizes={"train": 1}, seed=0)["train"] == rows
    with pytest.raises(ValueError, match="there are 1 different rows, but the splits ask for 2"):
        split_rows(rows, sizes={"train": 1, "validation": 1}, seed=0)


def test_a_prompt_is_the_caption_of_all(tmp_path: Path) -> None:
    rows = dreambooth_rows(save_folder(tmp_path))
    captioned = dreambooth_rows(caption_file(tmp_path, captions(*NAMES)))
    expected = [{**row, "caption": "a photo of sks dog"} for row in rows]
    assert with_caption(rows, "a photo of sks dog") == expected
    assert with_caption(captioned, "a photo of sks dog") == expected
    assert with_caption(captioned, None) == captioned != expected
    assert all("caption" not in row for row in rows)
    with pytest.raises(
        ValueError, match=r"the picture .*B\.JPG has no caption: set a prompt for a"
    ):
        with_caption(rows, None)
    with pytest.raises(ValueError, match="^the caption of all pictures: the prompt is empty"):
        with_caption(rows, " ")

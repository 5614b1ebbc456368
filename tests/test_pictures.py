"""Pictures: which files are taken, what their size and pixels are, and how copies are named."""

from __future__ import annotations

import hashlib
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, features
from transformers.image_utils import load_image

from emloc.pictures import (
    below,
    check_picture,
    load_picture,
    pictures_of,
    store_pictures,
    with_pictures,
)

AVIF = pytest.param("avif", marks=pytest.mark.skipif(not features.check("avif"), reason="no AVIF"))


def save_picture(path: Path, size: tuple[int, int] = (48, 32), *, seed: int = 0, **how: int) -> str:
    """A picture with four areas of different colour; `orientation` goes into its EXIF data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    exif = Image.Exif()
    if "orientation" in how:
        exif[ExifTags.Base.Orientation] = how["orientation"]
    Image.fromarray(colours).resize(size, Image.Resampling.NEAREST).save(path, exif=exif)
    return str(path)


def asking(*pictures: str) -> dict[str, object]:
    """A row that shows pictures."""
    parts = [{"type": "image", "image": picture} for picture in pictures]
    content = [*parts, {"type": "text", "text": "What is it?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat"}]
    return {"messages": [{"role": "system", "content": "Be brief"}, *turns], "answers": ["A cat"]}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", AVIF])
def test_pictures_stand_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    path = save_picture(tmp_path / f"a.{suffix}", orientation=orientation)
    size = (32, 48) if orientation > 4 else (48, 32)
    picture = load_picture(path, "row 1")
    assert check_picture(path, "row 1") == picture.size == size and picture.mode == "RGB"
    assert np.array_equal(np.asarray(picture), np.asarray(load_image(path)))
    stored = np.asarray(Image.open(path).convert("RGB"))
    assert np.array_equal(stored, np.asarray(picture)) == (orientation == 1 or suffix == "tiff")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tiff" if mode in ("CMYK", "LA", "I;16") else "a.png")
    Image.new(mode, (5, 4)).save(path)
    picture = load_picture(str(path), "row 1")
    assert (picture.mode, picture.size) == ("RGB", (5, 4))


def test_an_orientation_behind_the_pixels_counts_in_neither(tmp_path: Path) -> None:
    content = Path(save_picture(tmp_path / "a.png", orientation=6)).read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + struct.unpack(">I", content[start : start + 4])[0]
    last = content.index(b"IEND") - 4
    moved = content[:start] + content[end:last] + content[start:end] + content[last:]
    (tmp_path / "a.png").write_bytes(moved)
    path = str(tmp_path / "a.png")
    assert check_picture(path, "row 1") == load_picture(path, "row 1").size == (48, 32)


def test_the_size_comes_from_the_header_alone(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "a.webp", "a.tiff", "a.gif", "a.bmp"):
        noise = np.random.default_rng(0).integers(0, 256, (400, 300, 3), dtype=np.uint8)
        path = tmp_path / name
        Image.fromarray(noise).save(path)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        if name not in ("a.webp", "a.tiff"):  # these need the whole file or its end
            assert check_picture(str(path), "row 1") == (300, 400)
        with pytest.raises(
            ValueError, match=r"^data:7: .*a\.\w+ is (cut short or corrupt|not a p)"
        ):
            load_picture(str(path), "data:7")


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.jpg").touch()
    for read in (check_picture, load_picture):
        for name in ("text.png", "empty.jpg"):
            with pytest.raises(ValueError, match=f"^row 3: .*{name} is not a picture that PIL can"):
                read(str(tmp_path / name), "row 3")
        for name in ("absent.png", "", "x" * 5000, "nul\0"):
            with pytest.raises(ValueError, match="^row 3: there is no picture "):
                read(str(tmp_path / name), "row 3")


def header(width: int, height: int) -> bytes:
    """A PNG file that promises a size, and holds a single row of nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("filtered", ["error", "ignore"])
@pytest.mark.parametrize("side", [10_000, 100_000])
def test_decompression_bombs_are_refused_by_their_header(
    tmp_path: Path, side: int, filtered: str
) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(header(side, side))
    for read in (check_picture, load_picture):
        with warnings.catch_warnings():
            warnings.simplefilter(filtered)  # type: ignore[arg-type]
            with pytest.raises(ValueError, match=r"^row 2: .*bomb\.png has more than \d+ pixels"):
                read(str(path), "row 2")


def test_the_limit_of_pixels_is_pils(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_picture(tmp_path / "a.png", (10, 10))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert check_picture(path, "row 1") == load_picture(path, "row 1").size
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 49)
    with pytest.raises(ValueError, match="more than 49 pixels"):
        check_picture(path, "row 1")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert check_picture(path, "row 1") == (10, 10)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["png", "jpg", "gif", "webp", "tiff", "bmp"]), st.data())
def test_any_damage_is_either_harmless_or_one_sentence(
    tmp_path: Path, suffix: str, data: st.DataObject
) -> None:
    path = Path(save_picture(tmp_path / f"a.{suffix}"))
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for read in (check_picture, load_picture):
            try:
                read(str(path), "row 5")
            except ValueError as error:
                assert re.match(r"row 5: .*\.$", str(error)) and "\n" not in str(error)


def test_names_below_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    path = save_picture(root / "a" / "b.png")
    assert below(root, "a/b.png", "x") == below(root, "./a//b.png", "x") == path
    assert below(root, "not/there.png", "x") == str(root / "not" / "there.png")
    assert below(root, "..a/b...png", "x") == str(root / "..a" / "b...png")


@pytest.mark.parametrize("name", ["/etc/passwd", "../b.png", "a/../../b.png", "a/../b.png", ".."])
def test_names_that_leave_the_root_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        ValueError, match=f"^f:1: the picture '{name}' may lie outside of {tmp_path}"
    ):
        below(tmp_path, name, "f:1")


@pytest.mark.parametrize(
    "name",
    ["https://x.org/a.png", "s3://bucket/a.png", "file:///a.png", "data:image/png;base64,AA"],
)
def test_addresses_and_encoded_pictures_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="^f:1: the picture .* is no local file: save it below"):
        below(tmp_path, name, "f:1")


def test_a_long_name_is_cut_in_the_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        below(tmp_path, "data:image/png;base64," + "A" * 10**6, "f:1")
    assert len(str(caught.value)) < 400


def test_links_are_followed_only_inside(tmp_path: Path) -> None:
    root = tmp_path / "root"
    inside = save_picture(root / "a.png")
    save_picture(tmp_path / "root-other" / "b.png")
    (root / "link.png").symlink_to("a.png")
    (root / "file.png").symlink_to("../root-other/b.png")
    (root / "folder").symlink_to(tmp_path / "root-other")
    assert below(root, "link.png", "x") == str(root / "link.png")
    for name in ("file.png", "folder/b.png", "folder/absent.png"):
        with pytest.raises(ValueError, match=f"^f:1: the picture '{name}' is a link to a place"):
            below(root, name, "f:1")
    (tmp_path / "alias").symlink_to(root)  # the root itself may be a link
    assert Path(below(tmp_path / "alias", "a.png", "x")).samefile(inside)


def test_paths_are_read_and_replaced_in_order() -> None:
    row = asking("a.png", "b.png", "a.png")
    assert pictures_of(row) == ["a.png", "b.png", "a.png"]
    changed = with_pictures(row, lambda path: path.upper())
    assert pictures_of(changed) == ["A.PNG", "B.PNG", "A.PNG"]
    assert row == asking("a.png", "b.png", "a.png") and changed["answers"] == ["A cat"]
    assert with_pictures(changed, lambda path: path.lower()) == row
    for plain in ({"prompt": "x", "answer": "y"}, asking()):
        assert pictures_of(plain) == [] and with_pictures(plain, str.upper) == plain


def test_a_picture_with_a_caption_is_read_and_replaced() -> None:
    row = {"image": "a.png", "caption": "a dog", "prior": True}
    assert pictures_of(row) == ["a.png"]
    assert with_pictures(row, str.upper) == {**row, "image": "A.PNG"}
    assert row["image"] == "a.png" and pictures_of({"image": "a.png"}) == ["a.png"]


def test_pictures_with_captions_are_copied_beside_others(tmp_path: Path) -> None:
    first = save_picture(tmp_path / "in" / "a.JPG", seed=1)
    other = save_picture(tmp_path / "in" / "b.png", seed=2)
    rows = [{"image": first, "caption": "a dog"}, asking(other), {"image": first, "caption": "b"}]
    stored = store_pictures(rows, tmp_path / "data" / "images")
    [copy] = pictures_of(stored[0])
    assert stored[2] == {"image": copy, "caption": "b"} and copy.endswith(".jpg")
    assert (tmp_path / "data" / copy).read_bytes() == Path(first).read_bytes()
    assert len(list((tmp_path / "data" / "images").iterdir())) == 2
    with pytest.raises(ValueError, match=r"the picture .*gone\.png cannot be copied"):
        store_pictures([{"image": str(tmp_path / "gone.png")}], tmp_path / "images")


def test_copies_are_named_by_their_content(tmp_path: Path) -> None:
    first = save_picture(tmp_path / "in" / "a.PNG", seed=1)
    other = save_picture(tmp_path / "in" / "b.png", seed=2)
    again = save_picture(tmp_path / "in" / "deep" / "c.png", seed=1)
    plain = {"prompt": "x", "answer": "y"}
    rows = [asking(first, other), asking(again), plain]
    stored = store_pictures(rows, tmp_path / "data" / "images")
    digest = hashlib.sha256(Path(first).read_bytes()).hexdigest()[:32]
    assert [pictures_of(row) for row in stored][1:] == [[f"images/{digest}.png"], []]
    assert pictures_of(stored[0])[0] == f"images/{digest}.png"
    assert pictures_of(rows[0]) == [first, other] and stored[2] == plain
    files = {path.name: path.read_bytes() for path in (tmp_path / "data" / "images").iterdir()}
    assert len(files) == 2 and files[f"{digest}.png"] == Path(again).read_bytes()
    moved = Path(tmp_path / "in").rename(tmp_path / "elsewhere")
    rows = [
        with_pictures(row, lambda p: p.replace(str(tmp_path / "in"), str(moved))) for row in rows
    ]
    assert store_pictures(rows, tmp_path / "more" / "images") == stored
    assert store_pictures(rows[:1], tmp_path / "data" / "images") == stored[:1]
    same = {path.name: path.read_bytes() for path in (tmp_path / "data" / "images").iterdir()}
    assert same == files


def test_a_picture_that_went_away_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"the picture .*gone\.png cannot be copied \(No such file"
    ):
        store_pictures([asking(str(tmp_path / "gone.png"))], tmp_path / "images")
    assert list((tmp_path / "images").iterdir()) == []

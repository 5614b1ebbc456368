"""The report of made-up results, and its sheet of predictions: one page that opens offline."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from emloc.files import read_json, write_json, write_jsonl
from tasks import layout, report, sheet
from tasks.params import load_params
from tests.finished import WAYS, change_params, make_finished
from tests.project import ROOT
from tests.shell import dvc

EVIL = "<script>alert('x')</script> & \"<b>\""
IMAGE = {"type": "image", "image": "test/black.png"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with results of two ratios."""
    folder = tmp_path_factory.mktemp("finished") / "project"
    make_finished(folder)
    return folder


@pytest.fixture
def project(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the current directory."""
    folder = tmp_path / "project"
    shutil.copytree(finished, folder)
    monkeypatch.chdir(folder)
    return folder


class Page(HTMLParser):
    """The parts of a sheet that tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def shown(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def of(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def classes(self, name: str) -> int:
        return sum(name in (attributes.get("class") or "").split() for _, attributes in self.tags)


def asking(question: str, *pictures: str, **more: Any) -> dict[str, Any]:
    """A row whose answer is yes."""
    images = [{"type": "image", "image": path} for path in pictures]
    user = {"role": "user", "content": [*images, {"type": "text", "text": question}]}
    return {"messages": [user, {"role": "assistant", "content": "yes"}], **more}


def write_predictions(rows: list[dict[str, Any]], say: Callable[[str, int], str]) -> None:
    """Let every way say something to each row, given the way and the row's number."""
    files = [layout.BASELINE / f"predictions/{way}.jsonl" for way in ("original", "direct")]
    files += [layout.results(r) / f"predictions/{way}.jsonl" for r in (0.8, 0.5) for way in WAYS]
    for file in files:
        said = ({**row, "prediction": say(file.stem, i)} for i, row in enumerate(rows))
        write_jsonl(file, said)


def write_sheet(rows: list[dict[str, Any]], say: Callable[[str, int], str]) -> Page:
    """The sheet of such predictions."""
    write_predictions(rows, say)
    params = load_params()
    quality = report.collect_quality(params)
    sheet.write_sheet(Path("sheet.html"), params, quality, name=EVIL, labels=report.LABELS)
    return Page(Path("sheet.html").read_text())


def decoded(uri: str) -> Image.Image:
    kind, _, content = uri.partition(";base64,")
    assert kind == "data:image/webp"
    return Image.open(io.BytesIO(base64.b64decode(content)))


@given(st.integers(1, 500), st.integers(1, 80))
def test_rows_are_spread_evenly(total: int, count: int) -> None:
    places = sheet.spread(total, count)
    assert len(places) == min(total, count)
    assert places[0] == 0
    gaps = {after - before for before, after in pairwise([*places, total])}
    assert max(gaps) - min(gaps) <= 1 <= min(gaps)


def test_a_sheet_needs_nothing_from_outside(project: Path) -> None:
    write_predictions([asking("red?", "test/black.png")], lambda way, _: way)
    report.run(load_params())
    text = (project / "report/predictions.html").read_text()
    page = Page(text)
    assert [image["src"][:5] for image in page.of("img")] == ["data:"]
    assert not page.of("script") and not page.of("link") and not page.of("iframe")
    addresses = [tag.get(key) for _, tag in page.tags for key in ("src", "href") if tag.get(key)]
    assert [address for address in addresses if not address.startswith("data:")] == []
    assert not re.search(r"url\(|@import|https?:", text)
    policy = next(meta for meta in page.of("meta") if meta.get("http-equiv"))
    assert policy["content"].startswith("default-src 'none'")
    assert "(predictions.html)" in (project / "report/report.md").read_text()


def test_texts_are_shown_as_they_are_and_never_as_html(project: Path) -> None:
    row = {"prompt": f"question {EVIL}", "answer": f"label {EVIL}"}
    page = write_sheet([row], lambda way, _: f"{way} {EVIL}")
    assert not page.of("script")
    assert len(page.of("b")) == 1 + 8  # the label and a score a way
    for start in ("question", "label", "original", "direct", *WAYS):
        assert f"{start} {EVIL}" in page.shown, start


def test_pictures_are_downscaled_and_small_ones_kept(project: Path) -> None:
    Image.new("RGB", (2000, 500), "red").save("artifacts/data/test/wide.png")
    names = ["test/wide.png", "test/black.png"]
    page = write_sheet([asking("which?", *names)], lambda *_: "yes")
    wide, black = (decoded(image["src"]) for image in page.of("img"))
    assert (wide.size, black.size) == ((sheet.SIDE, sheet.SIDE // 4), (4, 4))
    assert wide.convert("RGB").getpixel((9, 9))[0] > 240
    assert "[picture 1] [picture 2] which?" in page.shown


def test_pictures_beyond_the_fourth_are_counted(project: Path) -> None:
    page = write_sheet([asking("how many?", *["test/black.png"] * 6)], lambda *_: "yes")
    assert len(page.of("img")) == sheet.PICTURES == 4
    assert "and 2 more" in page.shown


def test_a_text_only_run_has_a_sheet_without_pictures(project: Path) -> None:
    page = write_sheet([{"prompt": "2a", "answer": "aa"}], lambda *_: "")
    assert not page.of("img") and not page.classes("pictures")
    assert len(page.of("article")) == 1
    assert page.shown.count("nothing") == 8


def test_a_long_test_set_is_sampled(project: Path) -> None:
    page = write_sheet([asking(f"question {i}?") for i in range(200)], lambda *_: "yes")
    assert len(page.of("article")) == sheet.ROWS == 60
    assert "60 of the 200 test rows" in page.shown
    numbers = [int(number) for number in re.findall(r"row (\d+) ", page.shown)]
    assert numbers == [int(number) + 1 for number in re.findall(r"question (\d+)\?", page.shown)]


def test_filters_show_what_is_wrong_and_what_differs(project: Path) -> None:
    def say(way: str, number: int) -> str:
        if way == "original-corrected":
            return ["yes", "no", "yes", "no"][number]
        return ["yes", "yes", "no", "no"][number]

    page = write_sheet([asking(f"{number}?") for number in range(4)], say)
    classes = [article["class"].split() for article in page.of("article")]
    assert classes == [[], ["wrong", "differs"], ["differs"], ["wrong"]]
    for text in ("all 4", "not right 2", "differs from the original 2"):
        assert text in page.shown
    assert "No row here" not in page.shown
    assert "No row here" in write_sheet([asking("0?")], lambda *_: "yes").shown


def test_answers_are_marked_by_the_main_metric(project: Path) -> None:
    def say(way: str, _: int) -> str:
        return {"original": "no", "direct": "yes"}.get(way, "Maybe")

    row = asking("really?", answers=["yes"] * 8 + ["maybe", "perhaps"])
    exact = write_sheet([row], say)
    assert [exact.classes(name) for name in ("right", "partly", "wrong-mark")] == [2, 1, 8]
    change_params(lambda params: params["evaluate"].update(metrics=["vqa_accuracy", "exact_match"]))
    for file in [layout.BASELINE / "baseline.json", *Path("results").glob("*/evaluate.json")]:
        scores = {way: {"vqa_accuracy": 0.5, **old} for way, old in read_json(file).items()}
        write_json(file, scores)
    soft = write_sheet([row], say)
    assert [soft.classes(name) for name in ("right", "partly", "wrong-mark")] == [2, 7, 2]
    assert "by VQA accuracy" in soft.shown
    assert soft.shown.count("0.3 Maybe") == 6
    assert "wrong" in soft.of("article")[0]["class"].split()  # not wholly right
    assert "yes ×8 , maybe , perhaps" in soft.shown


def test_turns_are_told_apart(project: Path) -> None:
    row = asking("And now?")
    row["messages"].insert(0, {"role": "system", "content": "Be brief."})
    page = write_sheet([row], lambda *_: "yes")
    assert "system Be brief. user And now?" in page.shown


def test_a_report_is_the_same_each_time(project: Path) -> None:
    write_predictions([asking("red?", "test/black.png")], lambda way, _: way)
    contents = []
    for _ in range(2):
        report.run(load_params())
        files = sorted(Path("report").iterdir())
        contents.append({file.name: file.read_bytes() for file in files})
    assert contents[0] == contents[1]


def test_a_picture_that_is_gone_is_named_and_no_report_is_left(project: Path) -> None:
    write_predictions([asking("red?", "test/gone.png")], lambda way, _: way)
    before = {file.name: file.read_bytes() for file in Path("report").iterdir()}
    with pytest.raises(ValueError, match="test/gone.png"):
        report.run(load_params())
    assert {file.name: file.read_bytes() for file in Path("report").iterdir()} == before


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|\n ").split("|")]


def test_the_readme_shows_the_tables_columns(project: Path) -> None:
    params = load_params()
    table = report.quality_table(report.collect_quality(params), params.evaluate.scores)
    header = cells(table.splitlines()[0])
    assert header in [cells(line) for line in (ROOT / "README.md").read_text().splitlines()]


def test_the_report_shows_the_metrics_of_params_yaml(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["anls", "multiple_choice", "vqa_accuracy", "relaxed_accuracy"]
    change_params(lambda params: params["evaluate"].update(metrics=names))
    for file in [layout.BASELINE / "baseline.json", *Path("results").glob("*/evaluate.json")]:
        values = {name: place / 8 for place, name in enumerate([*names, "loss", "token_f1"])}
        write_json(file, {way: values for way in read_json(file)})
    report.run(load_params())
    printed = [cells(line) for line in capsys.readouterr().out.splitlines() if "|" in line]
    metrics = ["ANLS", "multiple choice", "VQA accuracy", "relaxed accuracy", "loss"]
    assert printed[0] == ["model", "ratio", *metrics, "trained", "GiB", "s"]
    assert printed[2][2:7] == ["0.000", "0.125", "0.250", "0.375", "0.500"]
    with open("report/quality.csv", newline="") as file:
        assert csv.DictReader(file).fieldnames[:7] == ["way", "ratio", *names, "loss"]


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"too_long": 2}, "2 left out as too long."),
        ({"too_long": 2, "unreadable": 0}, "2 left out as too long."),
        (
            {"too_long": 0, "unreadable": 3},
            "0 left out as too long, 3 as a picture of theirs cannot be read.",
        ),
    ],
)
def test_the_report_counts_what_was_left_out(
    project: Path, counts: dict[str, int], said: str
) -> None:
    write_json(layout.PREPARED, {"rows": {"train": 30}, **counts})
    report.run(load_params())
    assert said in Path("report/report.md").read_text()


def test_a_plot_of_dvc_follows_the_main_metric(project: Path) -> None:
    change_params(lambda params: params["evaluate"].update(metrics=["anls", "exact_match"]))
    Path("report/quality.csv").write_text("ratio,anls\n0.5,0.25\n")
    (plot,) = json.loads(dvc(project, "plots", "show", "--json"))["data"]["report/quality.csv"]
    assert plot["content"]["encoding"]["y"]["field"] == "anls"
    assert plot["content"]["title"]["text"] == "anls by ratio"

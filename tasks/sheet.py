"""A sheet of test rows with what each model answered: one HTML file that opens offline."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from emloc.files import read_jsonl
from emloc.metrics import METRICS, Metric, references_of
from emloc.pictures import load_picture
from tasks import layout
from tasks.params import Params

ROWS, PICTURES = 60, 4
SIDE, QUALITY = 768, 80  # pixels of a picture's longer side, and its WebP quality


def write_sheet(
    file: Path,
    params: Params,
    quality: Sequence[Mapping[str, Any]],
    *,
    name: str,
    labels: Mapping[str, str],
) -> None:
    """Write the sheet of at most `ROWS` rows, spread evenly over the test set.

    Args:
        quality: the scores over all test rows, as the report has them; the original's come first.
        name: of the original.
        labels: of the ways to answer, and of the metrics.
    """
    metric = params.evaluate.metrics[0]
    scores = [
        {key: row[key] for key in ("way", "ratio")}
        | {"label": labels[row["way"]], "value": row[metric]}
        for row in quality
    ]
    files = [layout.predictions(score["way"], score["ratio"]) for score in scores]
    said = [read_jsonl(file.with_name(f"{file.name}.jsonl")) for file in files]
    total = len(said[0])
    rows = []
    for place in spread(total, ROWS):
        predictions = [answered[place]["prediction"] for answered in said]
        row = _row(said[0][place], scores, predictions, METRICS[metric])
        rows.append({"number": place + 1, **row})
    page = _template().render(
        name=name, metric=labels[metric], scores=scores, rows=rows, total=total
    )
    file.write_text(page, encoding="utf-8")


def spread(total: int, count: int) -> list[int]:
    """At most `count` of the numbers from 0 to `total`, evenly spread, with the first."""
    count = min(total, count)
    return [place * total // count for place in range(count)]


def _row(
    row: Mapping[str, Any], scores: list[dict[str, Any]], predictions: list[str], metric: Metric
) -> dict[str, Any]:
    """What the sheet shows of a row: question, label, answers by ratio; and which filters show it.

    Args:
        scores: way, ratio and label of each prediction.
    """
    references = references_of(row)
    answers = [
        {**score, "text": text.strip(), "value": metric(text, references)}
        for score, text in zip(scores, predictions, strict=True)
    ]
    original = answers[0]["text"]
    corrected = [answer for answer in answers if answer["way"] == "original-corrected"]
    return {
        **_asked(row),
        "label": Counter(references).most_common(),
        "groups": [(ratio, list(own)) for ratio, own in groupby(answers, itemgetter("ratio"))],
        "wrong": any(answer["value"] < 1 for answer in corrected),
        "differs": any(answer["text"] != original for answer in corrected),
    }


def _asked(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row asks: its turns as texts, and its pictures."""
    if "messages" in row:
        messages = row["messages"][:-1]
    else:
        messages = [{"role": "user", "content": row["prompt"]}]
    contents = [
        [{"type": "text", "text": content}] if isinstance(content, str) else content
        for content in (message["content"] for message in messages)
    ]
    paths = [part["image"] for parts in contents for part in parts if part["type"] == "image"]
    numbers = iter(range(1, len(paths) + 1))
    turns = [
        {"role": message["role"], "text": _text(parts, numbers, mark=len(paths) > 1)}
        for message, parts in zip(messages, contents, strict=True)
    ]
    return {
        "turns": turns,
        "pictures": [_data_uri(path) for path in paths[:PICTURES]],
        "more_pictures": len(paths[PICTURES:]),
    }


def _text(parts: Sequence[Mapping[str, str]], numbers: Iterator[int], *, mark: bool) -> str:
    """The text of a message, with the numbers of its pictures where the row has several."""
    texts = (
        part["text"] if part["type"] == "text" else f"[picture {next(numbers)}]" * mark
        for part in parts
    )
    return " ".join(filter(None, texts)).strip()


def _data_uri(name: str) -> str:
    """A picture as the model gets it, but not larger than the sheet shows it, within a URI."""
    picture = load_picture(str(layout.DATA / name), name)
    picture.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    picture.save(content, "WEBP", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("sheet.html.jinja")

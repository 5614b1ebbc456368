"""A contact sheet of what each model drew, from the same prompts and seeds: one PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from emloc.diffusion.sheet import contact_sheet
from emloc.files import read_jsonl
from emloc.pictures import load_picture
from tasks import layout
from tasks.params import Params
from tasks.sheet import spread

COLUMNS = 8


def write_contact(
    file: Path, params: Params, quality: Sequence[Mapping[str, Any]], *, labels: Mapping[str, str]
) -> None:
    """A row of test pictures, and one for each way to draw; at most `COLUMNS` columns.

    Args:
        quality: the scores, as the report has them; they say which ways there are.
        labels: of the ways.
    """
    settings = params.evaluate.pictures
    assert settings is not None
    drawn = [
        (f"{number:02d}-{seed}.png", prompt, seed)
        for number, prompt in enumerate(settings.prompts)
        for seed in settings.seeds
    ]
    drawn = [drawn[place] for place in spread(len(drawn), COLUMNS)]
    rows = [("real pictures", _real(len(drawn)))]
    for row in quality:
        folder = layout.predictions(row["way"], row["ratio"])
        ratio = "" if row["ratio"] is None else f", ratio {row['ratio']}"
        pictures = [load_picture(str(folder / name), name) for name, _, _ in drawn]
        rows.append((labels[row["way"]] + ratio, pictures))
    heads = [f"{prompt}, seed {seed}" for _, prompt, seed in drawn]
    contact_sheet(rows, heads).save(file)


def _real(count: int) -> list[Image.Image]:
    """The first test pictures."""
    paths = [row["image"] for row in read_jsonl(layout.rows("test"))[:count]]
    return [load_picture(str(layout.DATA / path), path) for path in paths]

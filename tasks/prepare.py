"""Resolve the original, and read, check and split the data."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from emloc.data import SPLITS, Row, split_rows
from emloc.diffusion.pipelines import is_pipeline
from emloc.families import Codec
from emloc.files import read_jsonl, write_json
from emloc.models import check_copy, quantization_of
from emloc.pictures import load_picture, pictures_of
from emloc.source import describe, resolve_model
from tasks import layout
from tasks.dreambooth import prepare_pictures
from tasks.encoding import codec_of
from tasks.params import Params
from tasks.sections import Data
from tasks.splits import Splits, load, write_splits
from tasks.stage import main


class Chooser:
    """Says which rows can be used, and counts the others.

    Args:
        codec: of the original, with the readers' own paths of pictures.
        data: the settings.
    """

    def __init__(self, codec: Codec, data: Data) -> None:
        self.codec, self.data = codec, data
        self.left_out: Counter[str] = Counter()

    def fits(self, row: Row, where: str) -> bool:
        """Whether the row's pictures can be read and it is short enough.

        Raises:
            ValueError: it does not fit, and the settings do not say that such rows are left out;
                or the model's template has no place for it.
        """
        try:
            for path in pictures_of(row):
                load_picture(path, where)
        except ValueError as error:
            if not self.data.skip_unreadable:
                raise ValueError(f"{error} Or set data.skip_unreadable.") from error
            self.left_out["unreadable"] += 1
            return False
        length = len(self.codec.encode_row(row, where)["input_ids"])
        if length <= self.data.max_length:
            return True
        if not self.data.skip_long:
            raise ValueError(
                f"{where} has {length} tokens, but max_length is {self.data.max_length}: raise "
                "data.max_length, or set data.skip_long to leave such rows out."
            )
        self.left_out["too_long"] += 1
        return False


def choose(rows: list[Row], sizes: dict[str, int], chooser: Chooser, source: str) -> Splits:
    """Split the rows that fit; all texts are checked, pictures only until there are enough."""
    numbers: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        numbers.setdefault(_text(row), number)

    def fits(row: Row) -> bool:
        return chooser.fits(row, f"{source}: row {numbers[_text(row)]}")

    seed = chooser.data.seed
    if any(pictures_of(row) for row in rows):
        return split_rows(rows, sizes=sizes, seed=seed, accept=fits)
    return split_rows([row for row in rows if fits(row)], sizes=sizes, seed=seed)


def split(data: Data, chooser: Chooser) -> Splits:
    """The rows of all splits; the test rows come from their own source if one is named."""
    rows = load(data.source, data)
    sizes = {"train": data.train, "validation": data.validation, "test": data.test}
    if data.test_source is None:
        return choose(rows, sizes, chooser, data.source)
    known = {_text(row) for row in rows}
    others = [_once(row) for row in load(data.test_source, data) if _text(row) not in known]
    splits = choose(rows, {**sizes, "test": 0}, chooser, data.source)
    test = choose(others, {"train": data.test}, chooser, data.test_source)
    return {**splits, "test": test["train"]}


def _once(row: Row) -> Row:
    return {key: value for key, value in row.items() if key != "repeat"}


def _text(row: Row) -> str:
    """What makes a row another one."""
    return json.dumps(_once(row), sort_keys=True)


def prepare_rows(path: Path, params: Params) -> Counter[str]:
    """Write the splits of a language model; what was left out and why."""
    data = params.data
    chooser = Chooser(codec_of(path, params, root=Path()), data)
    splits = split(data, chooser)
    distinct = list({_text(row): row for row in splits["train"]}.values())
    if params.calibrate.samples > len(distinct):
        raise ValueError(
            f"calibrate.samples is {params.calibrate.samples}, but there are only {len(distinct)} "
            "training rows to draw from: lower it or raise data.train."
        )
    splits["calibration"] = distinct[: params.calibrate.samples]
    write_splits(splits)
    return chooser.left_out


def run(params: Params) -> None:
    """Write the pointers and the splits; rows that do not fit are named or left out."""
    model = params.model
    path = resolve_model(model.source, revision=model.revision, sha256=model.sha256)
    check_kind(path, params)
    quantized = describe_copy(params, path)
    prepare_split = prepare_rows if params.noise is None else prepare_pictures
    left_out = prepare_split(path, params)
    write_json(layout.POINTER, describe(model.source, path, revision=model.revision))
    write_json(layout.QUANTIZED, quantized)
    counts = {name: len(read_jsonl(layout.rows(name))) for name in (*SPLITS, "calibration")}
    reasons = {name: left_out[name] for name in ("too_long", "unreadable")}
    write_json(layout.PREPARED, {"rows": counts, **reasons})
    print(f"prepared {', '.join(f'{count} {name}' for name, count in counts.items())} rows")
    for name, count in reasons.items():
        if count:
            print(f"left out {count} rows: {name.replace('_', ' ')}")


def describe_copy(params: Params, original: Path) -> dict[str, Any]:
    """The pointer to the quantised copy that shall answer, with its method; empty without one."""
    source = params.evaluate.model
    if source is None:
        return {}
    path = resolve_model(source)
    check_copy(path, original)
    return {**describe(source, path), "method": quantization_of(path)}


def check_kind(path: Path, params: Params) -> None:
    """Refuse a diffusion pipeline with the params of a language model, and the other way round."""
    if is_pipeline(path) != (params.noise is not None):
        kind = "a diffusion pipeline" if is_pipeline(path) else "a language model"
        state = "null" if params.noise is None else "set"
        raise ValueError(
            f"model.source is {kind}, but noise is {state} in params.yaml: set data.dreambooth, "
            "noise and evaluate.pictures for a pipeline (presets/ holds examples), and for a "
            "language model none of them."
        )


if __name__ == "__main__":
    main(run)

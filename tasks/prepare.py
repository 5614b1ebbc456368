"""Resolve the original, and read, check and split the data."""

from __future__ import annotations

from emloc.data import Row, codespell_rows, read_rows, split_rows
from emloc.families.text import encode_rows, load_tokenizer
from emloc.files import write_json, write_jsonl
from emloc.source import describe, fetch_pypi, resolve_model
from tasks import layout
from tasks.params import Data, Params
from tasks.stage import main


def load(data: Data) -> list[Row]:
    """The rows of the data set that params.yaml names."""
    source = data.source
    path = fetch_pypi(source, sha256=data.sha256) if source.startswith("pypi:") else source
    return codespell_rows(path) if data.format == "codespell" else read_rows(path)


def run(params: Params) -> None:
    """Write the pointer to the model and the splits; rows that do not fit are named or left out."""
    model, data = params.model, params.data
    path = resolve_model(model.source, revision=model.revision, sha256=model.sha256)
    tokenizer = load_tokenizer(path)
    rows = load(data)
    examples = encode_rows(
        rows,
        tokenizer,
        chat_template=data.chat_template,
        max_length=data.max_length,
        skip_long=data.skip_long,
        source=data.source,
    )
    fitting = [rows[example["row"]] for example in examples]
    sizes = {"train": data.train, "validation": data.validation, "test": data.test}
    splits = split_rows(fitting, sizes=sizes, seed=data.seed)
    if params.calibrate.samples > data.train:
        raise ValueError(
            f"calibrate.samples is {params.calibrate.samples}, but there are only {data.train} "
            "training rows to draw from: lower it or raise data.train."
        )
    splits["calibration"] = splits["train"][: params.calibrate.samples]
    for name, members in splits.items():
        write_jsonl(layout.rows(name), members)
    write_json(layout.POINTER, describe(model.source, path, revision=model.revision))
    counts = {name: len(members) for name, members in splits.items()}
    write_json(layout.PREPARED, {"rows": counts, "too_long": len(rows) - len(fitting)})
    print(f"prepared {', '.join(f'{count} {name}' for name, count in counts.items())} rows")


if __name__ == "__main__":
    main(run)

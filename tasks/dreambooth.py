"""The part of `prepare` for diffusion pipelines: pictures, class pictures, and their encodings."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from emloc.data import Row, dreambooth_rows, split_rows, with_caption
from emloc.devices import pick_device, pick_dtype
from emloc.diffusion.drawing import DrawSettings
from emloc.diffusion.encoding import Encoded, encode_rows
from emloc.diffusion.pipelines import load_pipeline
from emloc.diffusion.priors import class_pictures
from emloc.files import digest
from emloc.pictures import load_picture
from emloc.source import describe
from tasks import layout
from tasks.params import Params
from tasks.sections import Data, Prior
from tasks.splits import Splits, load, write_splits


def prepare_pictures(path: Path, params: Params) -> Counter[str]:
    """Write the splits of pictures and captions, and what the pipeline's encoders make of them.

    Class pictures are in the training split. Without test pictures the training pictures stand
    for them, and are scored with noise that the training did not see.
    """
    left_out: Counter[str] = Counter()
    splits = split(params.data, left_out)
    known = [row for members in splits.values() for row in members]
    splits["calibration"] = splits["train"] if params.calibrate.samples else []
    splits["test"] = splits["test"] or splits["train"]
    prior = _class_rows(path, params)
    splits["train"] = splits["train"] + prior
    encoded = _encode(path, params, known + prior)
    write_splits(splits)
    places = {_key(row): place for place, row in enumerate(known + prior)}
    for name, members in splits.items():
        encoded.at([places[_key(row)] for row in members]).save(layout.encoded(name))
    return left_out


def _key(row: Row) -> tuple[str, bool]:
    """What tells a row from others; a picture of the subject can be a class picture, too."""
    return row["image"], "prior" in row


def split(data: Data, left_out: Counter[str]) -> Splits:
    """The rows of all splits; those with broken pictures are refused, or left out and counted."""
    rows = _captioned(data.source, data, left_out)
    if data.test_source is not None:
        others = _captioned(data.test_source, data, left_out)
        test = _sample([row for row in others if row not in rows], data.test, data)
        rest = split_rows(rows, sizes=_sizes(len(rows), data, test=0), seed=data.seed)
        return {**rest, "test": test}
    return split_rows(rows, sizes=_sizes(len(rows), data, test=data.test), seed=data.seed)


def _sizes(count: int, data: Data, *, test: int) -> dict[str, int]:
    """How many rows each split gets; `train: null` takes what the others leave."""
    train = count - data.validation - test if data.train is None else data.train
    return {"train": max(train, 1), "validation": data.validation, "test": test}


def _sample(rows: list[Row], count: int, data: Data) -> list[Row]:
    return split_rows(rows, sizes={"train": count}, seed=data.seed)["train"] if count else []


def _captioned(source: str, data: Data, left_out: Counter[str]) -> list[Row]:
    """The readable pictures of a source, each with its caption or the instance prompt."""
    assert data.dreambooth is not None
    rows = []
    for row in with_caption(load(source, data), data.dreambooth.prompt):
        try:
            load_picture(row["image"], source)
        except ValueError as error:
            if not data.skip_unreadable:
                raise ValueError(f"{error} Or set data.skip_unreadable.") from error
            left_out["unreadable"] += 1
            continue
        rows.append(row)
    return rows


def _class_rows(path: Path, params: Params) -> list[Row]:
    """The class pictures of prior preservation; none if it is not asked for."""
    assert params.data.dreambooth is not None
    prior = params.data.dreambooth.prior
    if prior is None:
        return []
    if prior.source is None:
        files = [str(file) for file in _draw_class(path, params, prior)]
    else:
        files = [row["image"] for row in dreambooth_rows(prior.source)]
        if len(files) < prior.count:
            raise ValueError(
                f"data.dreambooth.prior.source holds {len(files)} pictures, but count is "
                f"{prior.count}: lower it, add pictures, or set source to null to have them drawn."
            )
    return [
        {"image": file, "caption": prior.prompt, "prior": True} for file in files[: prior.count]
    ]


def _draw_class(path: Path, params: Params, prior: Prior) -> list[Path]:
    """Class pictures drawn by the original; an interrupted stage goes on where it stopped."""
    data = params.data
    assert data.dreambooth is not None
    settings = DrawSettings(
        steps=prior.steps,
        guidance_scale=prior.guidance_scale,
        resolution=data.dreambooth.resolution,
        max_sequence_length=data.max_length,
    )
    model = describe(params.model.source, path, revision=params.model.revision)["fingerprint"]
    made_by = {"model": model, "dtype": params.model.dtype, "prompt": prior.prompt}
    key = digest({**made_by, "seed": data.seed, "settings": settings}, [])
    pipeline = load_pipeline(
        path,
        dtype=pick_dtype(params.model.dtype),
        device=pick_device(params.device),
        offload=True,
    )
    return class_pictures(
        pipeline,
        prior.prompt,
        prior.count,
        folder=layout.CHECKPOINTS / f"class-{key}",
        seed=data.seed,
        settings=settings,
    )


def _encode(path: Path, params: Params, rows: list[Row]) -> Encoded:
    data = params.data
    assert data.dreambooth is not None
    return encode_rows(
        path,
        rows,
        resolution=data.dreambooth.resolution,
        crop=data.dreambooth.crop,
        flip=data.dreambooth.flip,
        seed=data.seed,
        device=pick_device(params.device),
        dtype=pick_dtype(params.model.dtype),
        max_sequence_length=data.max_length,
        root=Path(),
        progress=True,
    )

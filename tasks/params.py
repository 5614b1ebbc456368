"""params.yaml, checked: unknown keys and bad values are refused before any work starts."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import Field, ValidationError, model_validator

from tasks import layout
from tasks.sections import (
    Calibrate,
    Compress,
    Correct,
    Data,
    Evaluate,
    Heal,
    Launch,
    Memory,
    Mlflow,
    Model,
    Noise,
    Pretrain,
    Ratio,
    Section,
    Teach,
    Train,
)

PARAMS = Path("params.yaml")


class Params(Section):
    """All of params.yaml."""

    ratios: Annotated[list[Ratio], Field(min_length=1)]
    device: str = "auto"
    launch: Launch | None = None
    memory: Memory = Memory()
    model: Model
    data: Data
    calibrate: Calibrate
    compress: Compress
    teach: Teach
    heal: Heal
    noise: Noise | None  # type: ignore[valid-type]
    train: Train
    correct: Correct
    evaluate: Evaluate
    pretrain: Pretrain | None
    mlflow: Mlflow = Mlflow()

    @model_validator(mode="after")
    def _base_is_used(self) -> Params:
        base = str(layout.BASE)
        if (self.pretrain is not None) != (self.model.source == base):
            known = "null" if self.pretrain is None else "set"
            raise ValueError(
                f"pretrain is {known}, but model.source is {self.model.source!r}: a pretrained "
                f"original lies in {base}, so set both or neither"
            )
        return self

    @model_validator(mode="after")
    def _something_to_correct_by(self) -> Params:
        method = self.correct.method
        if method == "auto" and not self.data.validation and self.noise is None:
            raise ValueError(
                "correct.method is 'auto', which chooses by the loss on validation rows, but "
                "data.validation is 0: raise it, or name a method"
            )
        if method in ("auto", "weighted") and not self.calibrate.samples:
            raise ValueError(
                f"correct.method is {method!r}, which needs calibration samples, but "
                "calibrate.samples is 0: raise it, or take paper or none"
            )
        return self

    @model_validator(mode="after")
    def _something_to_heal_with(self) -> Params:
        if self.heal.steps and not self.teach.rows:
            raise ValueError(
                f"heal.steps is {self.heal.steps}, but teach.rows is 0, so there is nothing to "
                "heal with: set teach.rows to some hundred, or heal.steps to 0"
            )
        return self

    @model_validator(mode="after")
    def _one_device_each(self) -> Params:
        if self.launch is not None and ":" in self.device:
            raise ValueError(
                f"device is {self.device!r}, but launch starts processes that take a device each: "
                f"write {self.device.partition(':')[0]} or auto"
            )
        return self

    @model_validator(mode="after")
    def _of_one_kind(self) -> Params:
        parts = {
            "data.dreambooth": self.data.dreambooth,
            "noise": self.noise,
            "evaluate.pictures": self.evaluate.pictures,
        }
        missing = [name for name, part in parts.items() if part is None]
        if 0 < len(missing) < len(parts):
            given = next(name for name, part in parts.items() if part is not None)
            raise ValueError(
                f"{given} is set, which is for diffusion pipelines, but {missing[0]} is null: set "
                f"{', '.join(parts)} all, or none for a language model"
            )
        data = self.data
        if self.noise is None and (data.train is None or not data.test or self.train.pictures):
            raise ValueError(
                f"data.train is {data.train}, data.test is {data.test} and train.pictures is "
                f"{self.train.pictures}, but a language model needs numbers of at least 1 and no "
                "pictures"
            )
        return self

    @model_validator(mode="after")
    def _sensitivity_has_rows(self) -> Params:
        if self.compress.allocation == "sensitivity":
            instead = "take uniform or relative"
            if self.noise is not None:
                raise ValueError(
                    "compress.allocation is 'sensitivity', which is for language and "
                    f"vision-language models, but noise is set for a diffusion pipeline: {instead}"
                )
            if not self.calibrate.samples:
                raise ValueError(
                    "compress.allocation is 'sensitivity', which takes the loss of calibration "
                    f"rows, but calibrate.samples is 0: raise it, or {instead}"
                )
        return self

    @model_validator(mode="after")
    def _ratios_fit(self) -> Params:
        if len(set(self.ratios)) < len(self.ratios):
            raise ValueError(f"ratios is {self.ratios}, but names a ratio twice: name each once")
        for ratio in self.ratios:
            if ratio > self.calibrate.max_ratio:
                raise ValueError(
                    f"ratios holds {ratio}, but calibrate.max_ratio is {self.calibrate.max_ratio}: "
                    "lower the ratio or raise max_ratio"
                )
        return self


def load_params(path: Path | str = PARAMS) -> Params:
    """Read and check a params file.

    Raises:
        ValueError: no such file, not YAML, an unknown key or a value that is not allowed; one
            sentence that names the key and the value.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"There is no {path} in this folder: run from the project's root, or copy a preset "
            "there (cp presets/NAME.yaml params.yaml)."
        ) from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{path}: {_sentence(error)}") from None


def _sentence(error: ValidationError) -> str:
    """The first problem of a validation, in a sentence."""
    first = error.errors()[0]
    place = _place(first["loc"])
    key = ".".join(place)
    if first["type"] == "union_tag_invalid":
        context = first["ctx"]
        name = f"{key}.{context['discriminator'].strip(chr(39))}"
        return f"{name} is {context['tag']!r}, but it must be one of {context['expected_tags']}."
    if first["type"] == "union_tag_not_found":
        place.append(first["ctx"]["discriminator"].strip("'"))
        return f"{'.'.join(place)} is missing: set it (presets/ holds whole examples)."
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _keys_beside(place)
        near = difflib.get_close_matches(place[-1], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the keys there are {', '.join(known)}."
        return f"{key} is no known key; {hint}"
    if first["type"] in ("missing", "missing_argument"):
        return f"{key} is missing: set it (presets/ holds whole examples)."
    if first["type"] in ("value_error", "assertion_error"):
        return f"{key}: {message}." if key else f"{message}."
    message = message.replace("Input", "it").replace("List", "it").replace("Dictionary", "it")
    return f"{key} is {first['input']!r}, but {message}."


def _place(location: tuple[int | str, ...]) -> list[str]:
    """The keys that lead to a value, without the tags of a union's members."""
    kinds: list[Any] = [Params]
    place = []
    for part in location:
        fields = _fields(kinds, str(part))
        if fields or not kinds or part == location[-1]:
            place.append(str(part))
            kinds = [kind for field in fields for kind in _kinds(field)]
    return place


def _keys_beside(place: list[str]) -> list[str]:
    """The keys that are allowed where an unknown one stands."""
    kinds: list[Any] = [Params]
    for part in place[:-1]:
        kinds = [kind for field in _fields(kinds, part) for kind in _kinds(field)]
    return list(dict.fromkeys(key for kind in kinds for key in _keys(kind)))


def _fields(kinds: list[Any], key: str) -> list[Any]:
    """The types of a key in those sections that have it."""
    return [known[key] for kind in kinds if key in (known := _keys(kind))]


def _keys(kind: Any) -> dict[str, Any]:
    """The keys of a section and their types."""
    return {name: field.annotation for name, field in kind.__pydantic_fields__.items()}


def _kinds(annotation: Any) -> Iterator[Any]:
    """The sections within a type such as `Section | None`."""
    if hasattr(annotation, "__pydantic_fields__"):
        yield annotation
    for part in get_args(annotation):
        yield from _kinds(part)

"""params.yaml, checked: unknown keys and bad values are refused before any work starts.

The sections `train` and `train.lora` are the library's own settings; the rest is declared here.
"""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass

from emloc.settings import LoraSettings, TrainSettings
from tasks import layout

PARAMS = Path("params.yaml")
STRICT = ConfigDict(extra="forbid")
Dtype = Literal["float32", "bfloat16"]
MetricName = Literal[
    "exact_match",
    "normalized_match",
    "token_f1",
    "vqa_accuracy",
    "anls",
    "relaxed_accuracy",
    "multiple_choice",
]
Ratio = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """A section of params.yaml, which takes no other keys than these."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(Section):
    """`model`: the original."""

    source: str
    revision: str | None = None
    sha256: str | None = None
    dtype: Dtype = "bfloat16"


class Data(Section):
    """`data`: the task's rows and how they are split and encoded."""

    format: Literal["jsonl", "codespell", "internvl", "easy-vqa"]
    source: str
    sha256: str | None = None
    subset: str | None = None
    test_source: str | None = None
    train: int = Field(ge=1)
    validation: int = Field(ge=0)
    test: int = Field(ge=1)
    seed: int = Field(default=0, ge=0)
    chat_template: bool | None = None
    max_length: int = Field(ge=2)
    skip_long: bool = False
    pictures: dict[str, int | dict[str, int]] = {}
    skip_unreadable: bool = False


class Calibrate(Section):
    """`calibrate`: samples of the training rows, and the layers to factorize."""

    samples: int = Field(default=64, ge=0)
    batch_size: int = Field(default=1, ge=1)
    targets: list[str] = Field(min_length=1)
    max_ratio: Ratio = 0.9
    dtype: Dtype = "bfloat16"


class Compress(Section):
    """`compress`: which layers are cut, and at which ratio."""

    targets: dict[str, float | str] = Field(min_length=1)


Lora = dataclass(LoraSettings, config=STRICT)


@dataclass(config=STRICT, kw_only=True)
class Train(TrainSettings):
    """`train`: the library's settings, and the adapter's shape in `train.lora`."""

    lora: Lora = dataclasses.field(default_factory=Lora)  # type: ignore[valid-type]


class Correct(Section):
    """`correct`: λ, or null for no limit."""

    limit: float | None = Field(default=3.0, gt=0)


class Evaluate(Section):
    """`evaluate`: how the test rows are answered and scored (`metrics`, the main one first), and
    whether direct LoRA is trained to compare."""

    metrics: list[MetricName] = Field(min_length=1)
    batch_size: int = Field(default=8, ge=1)
    max_new_tokens: int = Field(default=64, ge=1)
    direct: bool = False

    @field_validator("metrics")
    @classmethod
    def _named_once(cls, names: list[MetricName]) -> list[MetricName]:
        if len(set(names)) < len(names):
            raise ValueError(f"{names} names a metric twice: name each once")
        return names


class Pretrain(Section):
    """`pretrain`: how the project makes the original itself, in artifacts/base."""

    recipe: Literal["easy-vqa"]
    source: str
    sha256: str | None = None
    vision_steps: int = Field(default=400, ge=1)
    steps: int = Field(default=200, ge=1)
    batch_size: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=0.02, gt=0)
    seed: int = Field(default=0, ge=0)


class Mlflow(Section):
    """`mlflow`: where runs are logged; no stage reads it."""

    experiment: str = Field(default="emloc", min_length=1)
    tracking_uri: str = "sqlite:///mlflow.db"


class Params(Section):
    """All of params.yaml."""

    ratios: Annotated[list[Ratio], Field(min_length=1)]
    device: str = "auto"
    model: Model
    data: Data
    calibrate: Calibrate
    compress: Compress
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
    place = [str(part) for part in first["loc"]]
    key = ".".join(place)
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


def _keys_beside(place: list[str]) -> list[str]:
    """The keys that are allowed where an unknown one stands."""
    kind: Any = Params
    for part in place[:-1]:
        kind = kind.model_fields[part].annotation if hasattr(kind, "model_fields") else Lora
        kind = next((k for k in get_args(kind) if hasattr(k, "model_fields")), kind)  # X | None
    if hasattr(kind, "model_fields"):
        return list(kind.model_fields)
    return [field.name for field in dataclasses.fields(kind)]

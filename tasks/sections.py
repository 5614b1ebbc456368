"""The sections of params.yaml, with the values that each key may have.

`train`, `train.lora`, `noise` and what a base's recipe takes are the library's own settings; the
rest is declared here.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from emloc.bases.settings import EasyVqaSettings, TinyFluxSettings
from emloc.metrics.pictures import check_picture_metrics
from emloc.settings import HealSettings, LoraSettings, NoiseSettings, TrainSettings
from emloc.sizes import parse_size

STRICT = ConfigDict(extra="forbid")
Dtype = Literal["float32", "bfloat16"]
TextMetric = Literal[
    "exact_match",
    "normalized_match",
    "token_f1",
    "vqa_accuracy",
    "anls",
    "relaxed_accuracy",
    "multiple_choice",
]
PictureMetric = Literal["loss", "shape_and_color", "clip_t", "clip_i", "dino"]
MetricName = Literal[TextMetric, PictureMetric]
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


class Prior(Section):
    """`data.dreambooth.prior`: class pictures, drawn by the original or read from a folder."""

    prompt: str
    count: int = Field(default=100, ge=1)
    source: str | None = None
    steps: int = Field(default=28, ge=1)
    guidance_scale: float = Field(default=3.5, ge=0)


class Dreambooth(Section):
    """`data.dreambooth`: what a diffusion pipeline learns from its pictures."""

    prompt: str | None
    resolution: int = Field(ge=8)
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    prior: Prior | None = None


class Data(Section):
    """`data`: the task's rows and how they are split and encoded."""

    format: Literal["jsonl", "codespell", "internvl", "easy-vqa", "easy-vqa-captions", "dreambooth"]
    source: str
    sha256: str | None = None
    subset: str | None = None
    test_source: str | None = None
    train: int | None = Field(ge=1)
    validation: int = Field(ge=0)
    test: int = Field(ge=0)
    seed: int = Field(default=0, ge=0)
    chat_template: bool | None = None
    max_length: int = Field(ge=2)
    skip_long: bool = False
    pictures: dict[str, int | dict[str, int]] = {}
    skip_unreadable: bool = False
    dreambooth: Dreambooth | None


class Calibrate(Section):
    """`calibrate`: samples of the training rows, and the layers to factorize."""

    samples: int = Field(default=64, ge=0)
    batch_size: int = Field(default=1, ge=1)
    targets: list[str] = Field(min_length=1)
    max_ratio: Ratio = 0.9
    dtype: Dtype = "bfloat16"


class Compress(Section):
    """`compress`: which layers are cut, at which ratio, and how they share what that leaves them.

    `allocation` gives all layers of the swept ratio its rank (uniform), or spends the same number
    of parameters where they lower the error most: of each layer relative to its output, or by how
    much the loss depends on it (sensitivity, which runs `batch_size` calibration rows at once). A
    layer with a number of its own keeps that.
    """

    targets: dict[str, float | str] = Field(min_length=1)
    allocation: Literal["uniform", "relative", "sensitivity"] = "uniform"
    batch_size: int = Field(default=8, ge=1)


Lora = dataclass(LoraSettings, config=STRICT)


Noise = dataclass(NoiseSettings, config=STRICT)


class Drawn(Section):
    """`train.pictures`: pictures of the training's captions while it runs."""

    every: int = Field(ge=1)
    steps: int = Field(default=28, ge=1)
    guidance_scale: float = Field(default=3.5, ge=0)


@dataclass(config=STRICT, kw_only=True)
class Train(TrainSettings):
    """`train`: the library's settings, and the adapter's shape in `train.lora`; of a diffusion
    pipeline also the weight of class pictures and what is drawn meanwhile."""

    prior_weight: Annotated[float, Field(ge=0)] = 1.0
    pictures: Drawn | None = None
    lora: Lora = dataclasses.field(default_factory=Lora)  # type: ignore[valid-type]


class Teach(Section):
    """`teach`: what healing learns from: the most training rows to take (0: none), or of a
    diffusion pipeline the pairs of picture and noise; how many log-probabilities of the original to
    keep at each token; and how many rows stream together."""

    rows: int = Field(default=0, ge=0)
    top_k: int = Field(default=64, ge=1)
    batch_size: int = Field(default=8, ge=1)
    wave: int = Field(default=512, ge=1)


@dataclass(config=STRICT, kw_only=True)
class Heal(HealSettings):
    """`heal`: how emulators are healed; 0 steps leave them as they were cut."""

    steps: int = 0


class Correct(Section):
    """`correct`: how the adapter is fitted to the original.

    `method` is none, paper, weighted (by the activations), or auto, which tries all of them with
    each of `limits` and keeps what has the least loss on the validation rows; `limit` is λ of the
    other two, null for no limit; `damping` is the share of the mean that weighted adds to the
    diagonal of the second moments.
    """

    method: Literal["none", "paper", "weighted", "auto"] = "paper"
    limit: float | None = Field(default=3.0, gt=0)
    limits: list[Annotated[float, Field(gt=0)] | None] = Field(default=[1.0, 3.0], min_length=1)
    damping: float = Field(default=0.01, ge=0)


class Pictures(Section):
    """`evaluate.pictures`: what a diffusion pipeline draws, and how its pictures are scored.

    `draws` are the held-out pairs of noise and timestep a picture for the loss; `clip` and `dino`
    are folders or hub ids; `concept` is what `shape_and_color` looks for.
    """

    prompts: list[str] = Field(min_length=1)
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    steps: int = Field(default=28, ge=1)
    guidance_scale: float = Field(default=3.5, ge=0)
    offload: bool = True
    draws: int = Field(default=16, ge=1)
    clip: str | None = None
    dino: str | None = None
    concept: str | None = None


class Evaluate(Section):
    """`evaluate`: how the test rows are answered and scored (`metrics`, the main one first),
    whether direct LoRA is trained to compare, and a quantised copy to answer as the original."""

    metrics: list[MetricName] = Field(min_length=1)
    batch_size: int = Field(default=8, ge=1)
    max_new_tokens: int = Field(default=64, ge=1)
    direct: bool = False
    model: str | None = None
    pictures: Pictures | None

    @field_validator("metrics")
    @classmethod
    def _named_once(cls, names: list[MetricName]) -> list[MetricName]:
        if len(set(names)) < len(names):
            raise ValueError(f"{names} names a metric twice: name each once")
        return names

    @model_validator(mode="after")
    def _fit_the_model(self) -> Evaluate:
        if self.model is not None and self.pictures is not None:
            raise ValueError(
                f"model is {self.model!r}, but a diffusion pipeline draws with model.source: leave "
                "it null"
            )
        known = get_args(TextMetric if self.pictures is None else PictureMetric)
        for name in self.metrics:
            if name not in known:
                kind = "answers" if self.pictures is None else "pictures"
                raise ValueError(
                    f"metrics holds {name!r}, which does not score {kind}: take some of "
                    f"{', '.join(known)}"
                )
        if self.pictures is not None:
            check_picture_metrics(
                [name for name in self.metrics if name != "loss"],
                clip=self.pictures.clip,
                dino=self.pictures.dino,
                concept=self.pictures.concept,
            )
        return self

    @property
    def scores(self) -> list[str]:
        """The metrics, and the loss, which is always there."""
        return [*self.metrics, *({"loss"} - set(self.metrics))]


@dataclass(config=STRICT, kw_only=True, frozen=True)
class EasyVqaBase(EasyVqaSettings):
    """`pretrain`: a vision-language model that the project trains itself, in artifacts/base."""

    recipe: Literal["easy-vqa"]
    source: str
    sha256: str | None = None
    seed: Annotated[int, Field(ge=0)] = 0


@dataclass(config=STRICT, kw_only=True, frozen=True)
class TinyFluxBase(TinyFluxSettings):
    """`pretrain`: a text-to-image pipeline that the project trains itself, in artifacts/base."""

    recipe: Literal["tiny-flux"]
    source: str
    sha256: str | None = None
    seed: Annotated[int, Field(ge=0)] = 0


Pretrain = Annotated[EasyVqaBase | TinyFluxBase, Field(discriminator="recipe")]


class Launch(Section):
    """`launch`: the processes that train one adapter together; no stage depends on it.

    `processes` is how many to start on this machine; `config` is a file that `accelerate config`
    wrote. With `shard` each holds but a piece of the frozen weights.
    """

    processes: int | None = Field(default=None, ge=2)
    config: str | None = None
    shard: bool = False

    @model_validator(mode="after")
    def _one_way(self) -> Launch:
        if (self.processes is None) == (self.config is None):
            raise ValueError(
                f"processes is {self.processes} and config is {self.config}, but exactly one of "
                "them must be set: leave the other out"
            )
        return self


class Memory(Section):
    """`memory`: what a stage may take; no stage depends on it."""

    budget: str | None = None

    @field_validator("budget")
    @classmethod
    def _is_a_size(cls, budget: str | None) -> str | None:
        if budget is not None:
            parse_size(budget)
        return budget

    @property
    def budget_bytes(self) -> int | None:
        """The budget in bytes."""
        return None if self.budget is None else parse_size(self.budget)


class Mlflow(Section):
    """`mlflow`: where runs are logged; no stage reads it."""

    experiment: str = Field(default="emloc", min_length=1)
    tracking_uri: str = "sqlite:///mlflow.db"

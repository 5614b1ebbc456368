"""The plan on the command line: python -m emloc plan MODEL --memory 24GiB."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from emloc.data import FORMATS, read_data
from emloc.devices import free_bytes, pick_device, pick_dtype
from emloc.families import load_codec
from emloc.families.diffusion import load_family
from emloc.plan.jobs import Calibration
from emloc.plan.options import Planner, runtime_bytes_on
from emloc.plan.subject import Subject, load_subject
from emloc.plan.table import RATIOS, plan_text
from emloc.plan.work import Noised, Rows, empty_pictures, rows_of
from emloc.settings import LoraSettings, NoiseSettings, TrainSettings
from emloc.sizes import parse_size
from emloc.targets import BLOCKS


def plan(
    model: Annotated[str, typer.Argument(help="the original: a folder or a hub id")],
    memory: Annotated[
        str | None, typer.Option(help="what may be taken, such as 24GiB; else all that is free")
    ] = None,
    ratio: Annotated[list[float] | None, typer.Option(help="to look at; repeatable")] = None,
    data: Annotated[Path | None, typer.Option(help="rows, for their lengths")] = None,
    format_: Annotated[str, typer.Option("--format", help=f"of the rows: {', '.join(FORMATS)}")]
    = "jsonl",
    tokens: Annotated[int, typer.Option(help="longest row in tokens, without --data")] = 2048,
    labels: Annotated[int, typer.Option(help="tokens of its answer, without --data")] = 256,
    tiles: Annotated[int, typer.Option(help="pictures, or tiles, of a row, without --data")] = 0,
    resolution: Annotated[int, typer.Option(help="of a diffusion pipeline's pictures")] = 512,
    batch_size: int = 1,
    accumulation: int = 1,
    samples: Annotated[int, typer.Option(help="to calibrate on")] = 64,
    max_ratio: Annotated[float, typer.Option(help="that is calibrated up to")] = 0.9,
    new_tokens: Annotated[int, typer.Option(help="of an answer")] = 64,
    target: Annotated[list[str] | None, typer.Option(help="regex of layers; repeatable")] = None,
    r: Annotated[int, typer.Option(help="LoRA rank")] = 8,
    target_modules: Annotated[str, typer.Option(help="that get LoRA: all-linear, or a regex")]
    = "all-linear",
    optimizer: str = "adamw_torch_fused",
    precision: Annotated[str, typer.Option(help="float32 or bfloat16")] = "bfloat16",
    quantization: Annotated[str | None, typer.Option(help="nf4: train over 4-bit weights")] = None,
    gradient_checkpointing: bool = True,
    device: Annotated[str, typer.Option(help="auto, cpu, or an accelerator, also one that is not "
        "here, such as cuda")] = "auto",
) -> None:  # fmt: skip
    """Say what each stage will take, and which ratio, batch and length fit; no weight is read."""
    place, kind = _place(device, memory)
    subject = load_subject(model, calibrated=target or [BLOCKS])
    row: Rows | Noised
    if subject.of_pictures:
        row = _picture(subject, resolution, pick_dtype(precision))
    else:
        row = _row(subject, data, format_, tokens, labels, tiles)
    planner = Planner(
        subject=subject,
        dtype=pick_dtype(precision),
        work=row.times(batch_size),
        lora=LoraSettings(r=r, target_modules=target_modules),
        settings=TrainSettings(
            steps=1,
            batch_size=batch_size,
            accumulation=accumulation,
            optimizer=optimizer,
            precision=precision,
            quantization=quantization,
            gradient_checkpointing=gradient_checkpointing,
        ),
        calibration=Calibration(row if samples else None, samples, max_ratio),
        prompts=None if isinstance(row, Noised) else row,
        new_tokens=new_tokens,
        device=place,
        budget_bytes=parse_size(memory) if memory else free_bytes(place),
        runtime_bytes=runtime_bytes_on(kind),
        progress=True,
    )
    print(plan_text(planner, [x for x in ratio or RATIOS if x <= max_ratio], kind))


def _place(device: str, memory: str | None) -> tuple[torch.device, str]:
    """Where to run without data, and the kind of device that is planned for. The second need not be
    here if its memory is named; what it computes then counts as on a CPU."""
    try:
        here = pick_device(device)
        return here, here.type
    except ValueError:
        if memory is None or device.partition(":")[0] not in ("cuda", "xpu", "mps", "npu"):
            raise
        return torch.device("cpu"), device.partition(":")[0]


def _row(
    subject: Subject, data: Path | None, format_: str, tokens: int, labels: int, tiles: int
) -> Rows:
    if data is None:
        return Rows(1, tokens, labels, empty_pictures(subject.build(torch.bfloat16), tiles))
    assert subject.folder is not None
    codec = load_codec(subject.folder)
    examples = codec.encode(read_data(data, format=format_), max_length=2**31, source=str(data))
    return rows_of(codec, examples)


def _picture(subject: Subject, resolution: int, dtype: torch.dtype) -> Noised:
    assert subject.folder is not None
    return Noised.of_config(load_family(subject.folder), resolution, dtype, NoiseSettings())

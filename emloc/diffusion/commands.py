"""The commands for diffusion pipelines: encode, personalize and draw.

The other commands of `python -m emloc` take pipelines as they take models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from emloc.data import read_data, with_caption
from emloc.devices import pick_device, pick_dtype
from emloc.diffusion.calibration import noised_batches
from emloc.diffusion.drawing import DrawSettings
from emloc.diffusion.drawing import draw as draw_pictures
from emloc.diffusion.encoding import Encoded, encode_rows
from emloc.diffusion.pipelines import load_denoiser, load_pipeline, pipeline_class
from emloc.diffusion.sheet import contact_sheet
from emloc.diffusion.training import personalize as train_lora
from emloc.families.diffusion import load_family
from emloc.files import digest
from emloc.nf4 import load_base
from emloc.settings import LoraSettings, NoiseSettings, TrainSettings
from emloc.source import resolve_model

Pipeline = Annotated[str, typer.Argument(help="the original: a folder, or a hub id")]
Device = Annotated[str, typer.Option(help="auto, cpu, or an accelerator such as cuda")]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16, to compute in")]


def encode(
    pipeline: Pipeline,
    data: Annotated[Path, typer.Option(help="folder of pictures")],
    out: Annotated[Path, typer.Option(help="file to create, .safetensors")],
    prompt: Annotated[
        str | None, typer.Option(help="of all pictures; without it, those of metadata.jsonl")
    ] = None,
    resolution: int = 512,
    crop: Annotated[str, typer.Option(help="center or random")] = "center",
    flip: Annotated[bool, typer.Option(help="mirror half of the pictures")] = False,
    max_length: Annotated[int | None, typer.Option(help="tokens of a prompt")] = None,
    seed: int = 0,
    device: Device = "auto",
    dtype: Dtype = "bfloat16",
) -> None:
    """Encode pictures and captions, so that encoders and VAE are not needed later."""
    encoded = encode_rows(
        resolve_model(pipeline),
        with_caption(read_data(data, format="dreambooth"), prompt),
        resolution=resolution,
        crop=crop,
        flip=flip,
        seed=seed,
        device=pick_device(device),
        dtype=pick_dtype(dtype),
        max_sequence_length=max_length,
        progress=True,
    )
    encoded.save(out)
    print(f"{out}: {len(encoded)} pictures")


def noised(
    path: Path, data: Path, samples: int, batch_size: int, dtype: str
) -> list[dict[str, Any]]:
    """What `calibrate` runs through a pipeline's denoiser."""
    if data.suffix != ".safetensors":
        raise ValueError(
            f"--data is {data}, but a pipeline is calibrated on what `python -m emloc encode` "
            "wrote, a .safetensors file: encode the pictures first."
        )
    return noised_batches(
        load_family(path),
        Encoded.load(data),
        samples,
        batch_size=batch_size,
        noise=NoiseSettings(),
        dtype=pick_dtype(dtype),
    )


def personalize(
    emulator: Annotated[Path, typer.Argument(help="what compress wrote")],
    pipeline: Annotated[str, typer.Option(help="the original")],
    data: Annotated[Path, typer.Option(help="what encode wrote")],
    out: Annotated[Path, typer.Option(help="folder to create")],
    steps: int = 500,
    batch_size: int = 1,
    accumulation: int = 4,
    learning_rate: float = 1.0,
    schedule: str = "constant",
    optimizer: str = "prodigy",
    precision: Annotated[str, typer.Option(help="float32 or bfloat16")] = "bfloat16",
    quantization: Annotated[str | None, typer.Option(help="nf4: train over 4-bit weights")] = None,
    gradient_checkpointing: bool = False,
    weighting: Annotated[str, typer.Option(help="of noise levels")] = "logit_normal",
    guidance: Annotated[float, typer.Option(help="what a distilled transformer is told")] = 1.0,
    seed: int = 0,
    r: Annotated[int, typer.Option(help="LoRA rank")] = 4,
    alpha: float = 4,
    init: Annotated[str, typer.Option(help="default or gaussian")] = "gaussian",
    target_modules: Annotated[
        str | None, typer.Option(help="a regex; without it, attention (and feed-forward of Flux)")
    ] = None,
    device: Device = "auto",
) -> None:
    """Train LoRA on an emulator by DreamBooth: the raw adapter. Stopped, it goes on."""
    path = resolve_model(pipeline)
    family = load_family(path)
    settings = TrainSettings(
        steps=steps,
        batch_size=batch_size,
        accumulation=accumulation,
        learning_rate=learning_rate,
        schedule=schedule,
        optimizer=optimizer,
        precision=precision,
        quantization=quantization,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
    )
    lora = LoraSettings(
        r=r, alpha=alpha, init=init, target_modules=target_modules or family.lora_targets
    )
    noise = NoiseSettings(weighting=weighting, guidance=guidance)
    inputs = [emulator / "config.json", *emulator.glob("*.safetensors"), data]
    key = digest({"lora": lora, "settings": settings, "noise": noise}, inputs)
    history = train_lora(
        load_base(emulator, lora=lora, settings=settings, device=pick_device(device)),
        family,
        Encoded.load(data),
        None,
        lora=lora,
        settings=settings,
        noise=noise,
        pipeline=pipeline_class(path),
        out=out,
        checkpoints=out.parent / f".{out.name}.checkpoints-{key}",
    )
    print(f"{out}: {history['trainable_parameters']:,} parameters, {history['steps']} steps")


def draw(
    pipeline: Pipeline,
    prompt: Annotated[list[str], typer.Option(help="what to draw; repeatable")],
    out: Annotated[Path, typer.Option(help="folder to create")],
    adapter: Annotated[Path | None, typer.Option(help="an adapter to plug in")] = None,
    emulator: Annotated[Path | None, typer.Option(help="in place of the denoiser")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="repeatable; 0 without it")] = None,
    steps: int = 28,
    guidance_scale: float = 3.5,
    resolution: int = 512,
    device: Device = "auto",
    dtype: Dtype = "bfloat16",
) -> None:
    """Draw each prompt with each seed, and a contact sheet of all."""
    place, kind = pick_device(device), pick_dtype(dtype)
    loaded = load_pipeline(
        resolve_model(pipeline),
        dtype=kind,
        device=place,
        denoiser=None if emulator is None else load_denoiser(emulator, dtype=kind, device="cpu"),
        adapter=adapter,
        offload=True,
    )
    seeds = seed or [0]
    settings = DrawSettings(steps=steps, guidance_scale=guidance_scale, resolution=resolution)
    rows = draw_pictures(loaded, prompt, seeds, settings, progress="draw")
    out.mkdir(parents=True, exist_ok=True)
    for number, pictures in enumerate(rows):
        for one, picture in zip(seeds, pictures, strict=True):
            picture.save(out / f"{number:02d}-{one}.png")
    heads = [f"seed {one}" for one in seeds]
    contact_sheet(list(zip(prompt, rows, strict=True)), heads).save(out / "sheet.png")
    print(out / "sheet.png")

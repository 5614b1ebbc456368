"""Heal the emulator of one ratio: bring what it says nearer to what the original said."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from emloc.diffusion.encoding import Encoded
from emloc.diffusion.healing import Predictions, heal_denoiser
from emloc.families.diffusion import load_family
from emloc.files import digest, write_json, writing
from emloc.heal import heal
from emloc.teach import Targets
from tasks import layout
from tasks.encoding import codec_of, encode
from tasks.original import find_original
from tasks.params import Params
from tasks.stage import costing, main_with_ratio


def run(params: Params, ratio: float) -> None:
    """Write the healed emulator, or without healing the one that was cut once more."""
    folder = layout.results(ratio)
    file = folder / "heal.cost.json"
    if not params.heal.steps:
        with costing(file, params), writing(layout.healed(ratio)) as out:
            shutil.copytree(layout.emulator(ratio), out, copy_function=_link)
        write_json(folder / "heal.json", {"steps": 0})
        return
    rows = layout.rows("train") if params.noise is None else layout.encoded("train")
    inputs = [rows, folder / "layers.csv", *sorted(layout.TEACHER.iterdir())]
    settings = {"heal": asdict(params.heal), "noise": params.noise and asdict(params.noise)}
    checkpoints = layout.CHECKPOINTS / f"heal-{ratio}-{digest(settings, inputs)}"
    checkpoints.parent.mkdir(parents=True, exist_ok=True)
    work = _heal_rows if params.noise is None else _heal_pictures
    with FileLock(f"{checkpoints}.lock"), costing(file, params, "heal", ratio) as device:
        found = work(params, ratio, checkpoints, device)
    found.pop("history")
    write_json(folder / "heal.json", {"steps": params.heal.steps, **found})
    for name in ("divergence", "error"):
        if f"{name}_before" in found:
            before, after = found[f"{name}_before"], found[f"{name}_after"]
            print(f"{name} from the original: {before:.4f} as cut, {after:.4f} healed")


def _heal_rows(
    params: Params, ratio: float, checkpoints: Path, device: torch.device
) -> dict[str, Any]:
    targets = Targets(layout.TEACHER)
    codec = codec_of(layout.emulator(ratio), params)
    return heal(
        layout.emulator(ratio),
        encode("train", codec, params)[: len(targets.counts)],
        targets,
        codec=codec,
        settings=params.heal,
        out=layout.healed(ratio),
        checkpoints=checkpoints,
        device=device,
        progress=True,
    )


def _heal_pictures(
    params: Params, ratio: float, checkpoints: Path, device: torch.device
) -> dict[str, Any]:
    assert params.noise is not None
    return heal_denoiser(
        layout.emulator(ratio),
        load_family(find_original(params)[0]),
        Encoded.load(layout.encoded("train")),
        Predictions(layout.TEACHER),
        settings=params.heal,
        noise=params.noise,
        out=layout.healed(ratio),
        checkpoints=checkpoints,
        device=device,
        progress=True,
    )


def _link(source: str, target: str) -> None:
    """Give a file a second name where the disk can, so that it takes no room again."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, Path(target))


if __name__ == "__main__":
    main_with_ratio(run)

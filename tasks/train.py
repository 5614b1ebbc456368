"""Train LoRA on the emulator of one ratio: the raw adapter."""

from __future__ import annotations

from emloc.files import read_json
from tasks import layout
from tasks.fit import fit
from tasks.params import Params
from tasks.stage import main_with_ratio


def run(params: Params, ratio: float) -> None:
    """Needs no more memory than running the emulator and its gradients through the adapter."""
    fit(
        params,
        ratio=ratio,
        model=layout.healed(ratio),
        base_name=read_json(layout.POINTER)["name"],
        adapter=layout.adapter(ratio, "raw"),
        results=layout.results(ratio),
        inputs=[
            layout.POINTER,
            layout.results(ratio) / "layers.csv",
            layout.results(ratio) / "heal.json",
        ],
    )


if __name__ == "__main__":
    main_with_ratio(run)

"""Train LoRA on the original itself, as the upper bound to compare with (evaluate.direct)."""

from __future__ import annotations

from emloc.files import write_json, writing
from tasks import layout
from tasks.fit import CURVE, fit
from tasks.original import find_original
from tasks.params import Params
from tasks.stage import costing, main
from tasks.tables import write_csv


def run(params: Params) -> None:
    """The same training as on the emulators; empty results if params.yaml does not ask for it."""
    if not params.evaluate.direct:
        with costing(layout.DIRECT / "train.cost.json", params):
            write_csv(layout.DIRECT / "train.csv", CURVE, [])
            write_json(layout.DIRECT / "train.json", {})
            with writing(layout.DIRECT_ADAPTER) as folder:
                folder.mkdir()
        print("skipped: evaluate.direct is false")
        return
    path, pointer = find_original(params)
    fit(
        params,
        ratio=None,
        model=path,
        base_name=pointer["name"],
        adapter=layout.DIRECT_ADAPTER,
        results=layout.DIRECT,
        inputs=[layout.POINTER],
    )


if __name__ == "__main__":
    main(run)

"""Score what no ratio changes: the original alone, and with direct LoRA if that was trained."""

from __future__ import annotations

from emloc.files import write_json
from tasks import layout
from tasks.original import find_answering
from tasks.params import Params
from tasks.scoring import scorer_of
from tasks.stage import costing, main


def run(params: Params) -> None:
    """One model is in memory at a time."""
    path = find_answering(params)
    score = scorer_of(params)
    ways = {"original": None}
    if params.evaluate.direct:
        ways["direct"] = layout.DIRECT_ADAPTER
    placed: dict[str, dict[str, float]] = {}
    file = layout.BASELINE / "baseline.cost.json"
    with costing(file, params, "baseline", weights=placed) as device:
        metrics = {
            way: score(
                path,
                adapter,
                params,
                label=way,
                predictions=layout.predictions(way, None),
                device=device,
                placed=placed,
            )
            for way, adapter in ways.items()
        }
    write_json(layout.BASELINE / "baseline.json", metrics)


if __name__ == "__main__":
    main(run)

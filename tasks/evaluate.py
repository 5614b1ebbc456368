"""Score one ratio: emulator + raw, original + raw, original + corrected, on the test rows."""

from __future__ import annotations

from emloc.files import write_json
from tasks import layout
from tasks.original import find_answering
from tasks.params import Params
from tasks.scoring import scorer_of
from tasks.stage import costing, main_with_ratio


def run(params: Params, ratio: float) -> None:
    """One model is in memory at a time."""
    path = find_answering(params)
    score = scorer_of(params)
    folder = layout.results(ratio)
    emulator = layout.healed(ratio)
    places = {
        "emulator-raw": (emulator, layout.adapter(ratio, "raw")),
        "original-raw": (path, layout.adapter(ratio, "raw")),
        "original-corrected": (path, layout.adapter(ratio, "corrected")),
    }
    metrics = {}
    placed: dict[str, dict[str, float]] = {}
    file = folder / "evaluate.cost.json"
    with costing(file, params, "evaluate", ratio, weights=placed) as device:
        for way in layout.WAYS:
            metrics[way] = score(
                *places[way],
                params,
                label=way,
                predictions=layout.predictions(way, ratio),
                device=device,
                placed=placed,
            )
    write_json(folder / "evaluate.json", metrics)


if __name__ == "__main__":
    main_with_ratio(run)

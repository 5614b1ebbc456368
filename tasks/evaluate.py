"""Score one ratio: emulator + raw, original + raw, original + corrected, on the test rows."""

from __future__ import annotations

from peft import PeftModel

from emloc.devices import pick_dtype
from emloc.files import write_json
from emloc.models import load_model
from tasks import layout
from tasks.answers import score_answers
from tasks.encoding import codec_of
from tasks.original import find_original
from tasks.params import Params
from tasks.stage import costing, main_with_ratio


def run(params: Params, ratio: float) -> None:
    """One model is in memory at a time."""
    path, _ = find_original(params)
    codec = codec_of(path, params)
    folder = layout.results(ratio)
    emulator = layout.emulator(ratio)
    places = {
        "emulator-raw": (emulator, layout.adapter(ratio, "raw")),
        "original-raw": (path, layout.adapter(ratio, "raw")),
        "original-corrected": (path, layout.adapter(ratio, "corrected")),
    }
    metrics = {}
    with costing(folder / "evaluate.cost.json", params) as device:
        for way in layout.WAYS:
            base, adapter = places[way]
            model = load_model(base, dtype=pick_dtype(params.model.dtype), device=device)
            metrics[way] = score_answers(
                PeftModel.from_pretrained(model, str(adapter)),
                codec,
                params,
                label=way,
                predictions=folder / "predictions" / f"{way}.jsonl",
            )
            del model
    write_json(folder / "evaluate.json", metrics)


if __name__ == "__main__":
    main_with_ratio(run)

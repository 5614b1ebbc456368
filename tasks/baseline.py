"""Score what no ratio changes: the original alone, and with direct LoRA if that was trained."""

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
from tasks.stage import costing, main


def run(params: Params) -> None:
    """The original is loaded once for both."""
    path, _ = find_original(params)
    codec = codec_of(path, params)
    answers = layout.BASELINE / "predictions"
    with costing(layout.BASELINE / "baseline.cost.json", params) as device:
        model = load_model(path, dtype=pick_dtype(params.model.dtype), device=device)
        metrics = {
            "original": score_answers(
                model, codec, params, label="original", predictions=answers / "original.jsonl"
            )
        }
        if params.evaluate.direct:
            metrics["direct"] = score_answers(
                PeftModel.from_pretrained(model, str(layout.DIRECT_ADAPTER)),
                codec,
                params,
                label="direct",
                predictions=answers / "direct.jsonl",
            )
    write_json(layout.BASELINE / "baseline.json", metrics)


if __name__ == "__main__":
    main(run)

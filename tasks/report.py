"""One page over all ratios: the table, the pictures, and where the adapters are.

Beside it a sheet of test rows with what each model answered, or of what each model drew.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from emloc.files import read_json, writing
from tasks import contact, layout, plots, sheet
from tasks.params import Params
from tasks.stage import main
from tasks.tables import read_csv, write_csv

GIB = 2**30
METRIC_LABELS = {
    "exact_match": "exact match",
    "normalized_match": "normalized",
    "token_f1": "F1",
    "vqa_accuracy": "VQA accuracy",
    "anls": "ANLS",
    "relaxed_accuracy": "relaxed accuracy",
    "multiple_choice": "multiple choice",
    "shape_and_color": "shape and colour",
    "clip_t": "CLIP-T",
    "clip_i": "CLIP-I",
    "dino": "DINO",
    "loss": "loss",
}
LABELS = METRIC_LABELS | {
    "original": "original alone",
    "direct": "original + direct LoRA",
    "emulator-raw": "emulator + raw",
    "original-raw": "original + raw",
    "original-corrected": "original + corrected",
}
STAGES = ("compress", "heal", "train", "correct", "evaluate")
SHEET, CONTACT = "predictions.html", "pictures.png"
LOSS_OF_ANSWERS, LOSS_OF_PICTURES = "loss (nats a token)", "loss (squared error)"
OF_ANSWERS = "loss is in nats a token of the answer"
OF_PICTURES = (
    "loss is the mean squared error of what the denoiser predicts, at noise that no training saw"
)


def run(params: Params) -> None:
    """Read the results of the ratios in params.yaml only, draw the pictures, write the page."""
    _leave_out_others(params.ratios)
    quality = collect_quality(params)
    costs = collect_costs(params)
    curves = {f"emulator {ratio}": _curve(layout.results(ratio)) for ratio in params.ratios}
    if params.evaluate.direct:
        curves["original (direct)"] = _curve(layout.DIRECT)
    layers = {ratio: read_csv(layout.results(ratio) / "layers.csv") for ratio in params.ratios}
    page = _page(params, quality, costs)
    with writing(layout.REPORT) as folder:
        folder.mkdir()
        write_csv(folder / "quality.csv", list(quality[0]), quality)
        write_csv(folder / "costs.csv", list(costs[0]), costs)
        loss = LOSS_OF_ANSWERS if params.noise is None else LOSS_OF_PICTURES
        plots.quality(quality, params.evaluate.scores, LABELS, loss, folder / "quality.png")
        plots.layers(layers, folder / "layers.png")
        plots.training(curves, loss, folder / "training.png")
        plots.costs(costs, folder / "costs.png")
        if params.noise is None:
            original = read_json(layout.POINTER)["name"]
            sheet.write_sheet(folder / SHEET, params, quality, name=original, labels=LABELS)
        else:
            contact.write_contact(folder / CONTACT, params, quality, labels=LABELS)
        (folder / "report.md").write_text(page, encoding="utf-8")
    print(quality_table(quality, params.evaluate.scores))
    print(
        f"\nreport: {layout.REPORT / 'report.md'} (with {len(list(layout.REPORT.glob('*.png')))} "
        "pictures beside it)"
    )
    if params.noise is None:
        print(f"predictions: {layout.REPORT / SHEET} (opens in any browser)")
    else:
        print(f"what each model drew: {layout.REPORT / CONTACT}")
    for ratio in params.ratios:
        print(f"adapter of emulator {ratio}: {layout.adapter(ratio, 'corrected')}")


def _leave_out_others(ratios: list[float]) -> None:
    """Remove the results of ratios that params.yaml does not name from the workspace.

    `dvc repro` leaves them there; they would change the hash of this stage's input. DVC's cache
    keeps them, so that a ratio that comes back is restored.
    """
    kept = {str(layout.results(ratio)) for ratio in ratios} | {str(layout.BASELINE)}
    kept.add(str(layout.DIRECT))
    for folder in layout.RESULTS.iterdir():
        if folder.is_dir() and str(folder) not in kept:
            shutil.rmtree(folder)


def collect_quality(params: Params) -> list[dict[str, Any]]:
    """A row for each way to answer the test rows: way, ratio (None where none applies), metrics,
    and the adapter's parameters and what its training took (None where nothing was trained)."""

    def row(way: str, ratio: float | None, scores: dict[str, Any], folder: Path | None) -> Any:
        metrics = {name: scores[way][name] for name in params.evaluate.scores}
        return {"way": way, "ratio": ratio, **metrics, **_training(folder)}

    scores = read_json(layout.BASELINE / "baseline.json")
    rows = [row("original", None, scores, None)]
    if params.evaluate.direct:
        rows.append(row("direct", None, scores, layout.DIRECT))
    for ratio in params.ratios:
        folder = layout.results(ratio)
        scores = read_json(folder / "evaluate.json")
        rows += [row(way, ratio, scores, folder) for way in layout.WAYS]
    return rows


def _training(folder: Path | None) -> dict[str, Any]:
    if folder is None:
        return {"trained_parameters": 0, "train_seconds": None, "train_peak_gib": None}
    cost = read_json(folder / "train.cost.json")
    return {
        "trained_parameters": read_json(folder / "train.json")["trainable_parameters"],
        "train_seconds": round(cost["seconds"], 1),
        "train_peak_gib": round(cost["peak_bytes"] / GIB, 3),
    }


def collect_costs(params: Params) -> list[dict[str, Any]]:
    """A row for each stage that ran: stage, ratio, seconds, peak_gib, planned_gib (None where it
    was not planned), device."""
    files: list[tuple[str, float | None, Path]] = [
        ("calibrate", None, layout.RESULTS / "calibrate.cost.json"),
        ("baseline", None, layout.BASELINE / "baseline.cost.json"),
    ]
    if params.pretrain is not None:
        files.insert(0, ("pretrain", None, layout.RESULTS / "pretrain.cost.json"))
    if params.teach.rows:
        files.append(("teach", None, layout.RESULTS / "teach.cost.json"))
    if params.evaluate.direct:
        files.append(("direct", None, layout.DIRECT / "train.cost.json"))
    for ratio in params.ratios:
        folder = layout.results(ratio)
        files += [(stage, ratio, folder / f"{stage}.cost.json") for stage in STAGES]
    rows = []
    for stage, ratio, file in files:
        cost = read_json(file)
        seconds, peak = round(cost["seconds"], 1), round(cost["peak_bytes"] / GIB, 3)
        planned = cost["planned_bytes"]
        row = {"stage": stage, "ratio": ratio, "seconds": seconds, "peak_gib": peak}
        row["planned_gib"] = None if planned is None else round(planned / GIB, 3)
        rows.append({**row, "device": cost["device"]})
    return rows


def quality_table(rows: list[dict[str, Any]], scores: Sequence[str]) -> str:
    """The quality rows as a Markdown table, the same on the terminal and on the page."""
    header = ["model", "ratio", *(LABELS[name] for name in scores), "trained", "GiB", "s"]
    body = [
        [
            LABELS[row["way"]],
            row["ratio"],
            *(f"{row[name]:.3f}" for name in scores),
            f"{row['trained_parameters']:,}",
            None if row["train_peak_gib"] is None else f"{row['train_peak_gib']:.2f}",
            None if row["train_seconds"] is None else f"{row['train_seconds']:.0f}",
        ]
        for row in rows
    ]
    return tabulate(body, header, tablefmt="github", disable_numparse=True, missingval="")


def cost_table(rows: list[dict[str, Any]]) -> str:
    """The cost rows as a Markdown table."""
    header = ["stage", "ratio", "seconds", "peak memory (GiB)", "planned (GiB)", "device"]
    body = [
        [
            row["stage"],
            row["ratio"],
            f"{row['seconds']:.1f}",
            f"{row['peak_gib']:.2f}",
            None if row["planned_gib"] is None else f"{row['planned_gib']:.2f}",
            row["device"],
        ]
        for row in rows
    ]
    return tabulate(body, header, tablefmt="github", disable_numparse=True, missingval="")


def _page(params: Params, quality: list[dict[str, Any]], costs: list[dict[str, Any]]) -> str:
    pointer = read_json(layout.POINTER)
    prepared = read_json(layout.PREPARED)
    sizes = {r: read_json(layout.results(r) / "compress.json") for r in params.ratios}
    emulators = [
        [
            r,
            f"{s['emulator_bytes'] / 2**20:.0f}",
            f"{s['original_bytes'] / 2**20:.0f}",
            f"{s['emulator_parameters'] / s['original_parameters']:.1%}",
            layout.emulator(r),
            layout.adapter(r, "corrected"),
        ]
        for r, s in sizes.items()
    ]
    header = ["ratio", "emulator (MiB)", "original (MiB)", "parameters kept", "emulator", "adapter"]
    counts = ", ".join(f"{count} {split}" for split, count in prepared["rows"].items())
    left_out = f"{prepared['too_long']} left out as too long"
    if unreadable := prepared.get("unreadable"):
        left_out += f", {unreadable} as a picture of theirs cannot be read"
    pictures = [
        ("quality", "Quality against ratio"),
        ("layers", "Loss that each layer's compression predicts"),
        ("training", "Training"),
        ("costs", "Time and memory"),
    ]
    predictions = (
        f"## Predictions\n\n[What each model answered]({SHEET}): test rows, to open in a browser."
        if params.noise is None
        else f"## What each model draws\n\n![What each model draws]({CONTACT})"
    )
    parts = [
        "# EMLoC report",
        f"Original: `{pointer['name']}` (fingerprint `{pointer['fingerprint'][:12]}`). "
        f"{_answering()}Rows: {counts}; {left_out}.",
        quality_table(quality, params.evaluate.scores),
        f"All are scored alike; {OF_ANSWERS if params.noise is None else OF_PICTURES}. `trained` "
        "counts the adapter's parameters; GiB and s are the peak memory and the seconds of its "
        "training.",
        tabulate(emulators, header, tablefmt="github", disable_numparse=True),
        predictions,
        *(f"## {title}\n\n![{title}]({name}.png)" for name, title in pictures),
        cost_table(costs),
        "Peak memory is the largest sum of allocated tensors on an accelerator, and the largest "
        "anonymous resident memory of the process on a CPU.",
        *spread_weights(params),
    ]
    return "\n\n".join(parts) + "\n"


def spread_weights(params: Params) -> list[str]:
    """A sentence for each model whose weights did not all fit the device that scored it."""
    files: list[tuple[str, Path]] = [("", layout.BASELINE / "baseline.cost.json")]
    files += [(f" {r}", layout.results(r) / "evaluate.cost.json") for r in params.ratios]
    sentences = []
    for ratio, file in files:
        for way, weights in read_json(file).get("weights", {}).items():
            if len(weights) > 1 or "disk" in weights:
                largest_first = sorted(weights.items(), key=lambda item: -item[1])
                kept = ", ".join(f"{share:.0%} {place}" for place, share in largest_first)
                sentences.append(f"Weights of {LABELS[way]}{ratio} while it was scored: {kept}.")
    return sentences


def _answering() -> str:
    """Which model answered as the original, if that was a quantised copy."""
    copy = read_json(layout.QUANTIZED)
    if not copy:
        return ""
    kind = "not quantised" if copy["method"] is None else f"quantised by {copy['method']}"
    return (
        f"In its place answered a copy of it, `{copy['name']}` (fingerprint "
        f"`{copy['fingerprint'][:12]}`, {kind}). "
    )


def _curve(folder: Path) -> list[dict[str, float]]:
    rows = read_csv(folder / "train.csv")
    return [{key: float(value) for key, value in row.items() if value} for row in rows]


if __name__ == "__main__":
    main(run)

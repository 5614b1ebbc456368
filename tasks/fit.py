"""LoRA on a model, with its curve and its metrics; `train` and `direct` both do it.

With `launch` in params.yaml several processes fit together; `python -m tasks.fit FOLDER` is each.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from filelock import FileLock

from emloc.files import digest, write_json
from emloc.finetune import finetune
from emloc.memory import Cost, measure
from emloc.nf4 import load_base
from emloc.processes import local_device
from tasks import layout
from tasks.encoding import codec_of, encode
from tasks.fit_denoiser import fit_denoiser
from tasks.launch import Crew, run_in_processes, serve
from tasks.params import Params
from tasks.stage import costing, memory_explained, plan, write_cost
from tasks.tables import write_csv

CURVE = ("step", "loss", "learning_rate", "grad_norm", "eval_loss")
_PATHS = ("model", "adapter", "checkpoints")


@dataclass(frozen=True)
class Fit:
    """What a process must know to fit: where the model is, and where things go."""

    ratio: float | None
    model: Path
    base_name: str
    adapter: Path
    checkpoints: Path
    shard: bool = False

    @property
    def stage(self) -> str:
        """Which stage fits."""
        return "direct" if self.ratio is None else "train"


def fit(
    params: Params,
    *,
    ratio: float | None,
    model: Path,
    base_name: str,
    adapter: Path,
    results: Path,
    inputs: list[Path],
) -> None:
    """Train LoRA on the checkpoint at `model` and write the adapter, train.csv and train.json.

    Args:
        ratio: of the emulator; None for the original.
        model: an emulator, or the original.
        base_name: what the adapter names as its base.
        adapter, results: where to write.
        inputs: files whose content, with the settings, makes a checkpoint of this run reusable.
    """
    splits = [layout.rows("train"), layout.rows("validation")]
    settings = {"train": asdict(params.train), "noise": params.noise and asdict(params.noise)}
    if params.noise is not None:
        splits = [layout.encoded("train"), layout.encoded("validation")]
    key = digest(settings, [*inputs, *splits])
    checkpoints = layout.CHECKPOINTS / f"{results.name}-{key}"
    checkpoints.parent.mkdir(parents=True, exist_ok=True)
    task, cost_file = (
        Fit(ratio, model, base_name, adapter, checkpoints),
        results / "train.cost.json",
    )
    if params.launch is None:
        # Another clone that shares the checkpoints may be training this very adapter.
        with (
            FileLock(f"{checkpoints}.lock"),
            costing(cost_file, params, task.stage, ratio) as device,
        ):
            history = _fit_here(task, params, device)
    else:
        found = _fit_together(task, params, Crew.of(params.launch), cost_file)
        if found is None:
            print("trained with the first machine, which has the results")
            return
        history = found
    curve = history.pop("history")
    write_csv(results / "train.csv", CURVE, curve)
    last = next((row["eval_loss"] for row in reversed(curve) if "eval_loss" in row), None)
    write_json(results / "train.json", {**history, "validation_loss": last})


def _fit_together(task: Fit, params: Params, crew: Crew, cost_file: Path) -> dict[str, Any] | None:
    """Fit in several processes; None on a machine that only takes part.

    Raises:
        ValueError: the frozen weights of a denoiser, or in 4 bits, shall be sharded.
    """
    if crew.shard and (params.noise is not None or params.train.quantization is not None):
        kind = "of a diffusion pipeline" if params.noise is not None else "in 4 bits"
        raise ValueError(
            f"launch asks to shard the frozen weights, which is not supported {kind}: set launch "
            "to {processes: NUMBER}, or a config without FSDP."
        )
    # A process with pieces of the weights takes less than the plan, which knows of no pieces.
    planned = None if crew.shard else plan(params, task.stage, task.ratio)
    paths = {name: str(getattr(task, name)) for name in _PATHS}
    content = {**vars(task), **paths, "shard": crew.shard, "params": params.model_dump(mode="json")}
    lock = FileLock(f"{task.checkpoints}.lock") if crew.is_first_machine else nullcontext()
    with lock:
        started = time.perf_counter()
        done = run_in_processes("tasks.fit", content, crew, precision=params.train.precision)
        seconds = time.perf_counter() - started
    if done is None:
        return None
    cost = Cost(seconds=seconds, peak_bytes=done["peak_bytes"], device=done["device"])
    write_cost(cost_file, cost, planned, processes=crew.processes)
    return done["history"]


def _fit_in_process(content: dict[str, Any]) -> dict[str, Any]:
    """One process's part; the peak is that of the process with the largest."""
    params = Params.model_validate(content.pop("params"))
    task = Fit(**{**content, **{name: Path(content[name]) for name in _PATHS}})
    device = local_device(params.device)
    with memory_explained(task.stage, device), measure(device) as cost:
        history = _fit_here(task, params, device)
    peak = max(gather_object([cost.peak_bytes]))
    return {"history": history, "peak_bytes": peak, "device": device.type}


def _fit_here(task: Fit, params: Params, device: torch.device) -> dict[str, Any]:
    """Fit in this process, alone or with others."""
    if params.noise is None:
        return _fit_model(task, params, device)
    return fit_denoiser(params, task.model, task.adapter, task.checkpoints, device)


def _fit_model(task: Fit, params: Params, device: torch.device) -> dict[str, Any]:
    """Fit a language or vision-language model."""
    settings = params.train
    codec = codec_of(task.model, params)
    place = torch.device("cpu") if task.shard else device
    return finetune(
        load_base(task.model, lora=settings.lora, settings=settings, device=place),
        encode("train", codec, params),
        encode("validation", codec, params) if params.data.validation else [],
        codec=codec,
        lora=settings.lora,
        settings=settings,
        base_name=task.base_name,
        out=task.adapter,
        checkpoints=task.checkpoints,
        shard_on=device if task.shard else None,
    )


if __name__ == "__main__":
    serve(_fit_in_process)

"""A copy of this project with a tiny model and data of its own."""

from __future__ import annotations

import importlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import yaml

from tasks.params import load_params
from tests.tiny import save_tiny
from tests.tiny_diffusion import save_tiny_pipeline
from tests.tiny_vision import save_picture, save_tiny_vision

ROOT = Path(__file__).parent.parent
COPIED = (
    "emloc",
    "tasks",
    "flows",
    "dvc.yaml",
    "prefect.yaml",
    "pyproject.toml",
    ".dvcignore",
    ".gitignore",
    ".dvc/config",
    ".dvc/.gitignore",
)


def write_rows(file: Path, count: int = 60) -> None:
    """A task that a tiny model can learn: repeat a letter."""
    draw = random.Random(0)
    pairs = draw.sample([(letter, times) for letter in "abcdefgh" for times in range(1, 10)], count)
    rows = [{"prompt": f"{times}{letter}", "answer": letter * times} for letter, times in pairs]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tiny_params(model: Path, data: Path) -> dict[str, Any]:
    """params.yaml for a tiny model: seconds, not minutes."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["ratios"] = [0.8, 0.5]
    params["device"] = "cpu"
    params["model"] |= {"source": str(model), "sha256": None}
    params["data"] |= {
        "format": "jsonl",
        "source": str(data),
        "sha256": None,
        "train": 30,
        "validation": 4,
        "test": 6,
        "max_length": 128,
        "chat_template": None,
    }
    params["calibrate"] |= {"samples": 8, "batch_size": 2}
    params["compress"]["allocation"], params["correct"]["method"] = "uniform", "paper"
    params["teach"]["rows"] = params["heal"]["steps"] = 0
    params["train"] |= {
        "steps": 4,
        "batch_size": 2,
        "eval_steps": 2,
        "save_steps": 2,
        "log_steps": 1,
    }
    params["evaluate"] |= {"batch_size": 4, "max_new_tokens": 8}
    return params


HEALING: dict[str, Any] = {
    "teach": {"rows": 12, "top_k": 8, "batch_size": 4, "wave": 8},
    "heal": {"steps": 2, "rank": 2, "batch_size": 4},
}
"""What to add to a project's params for its emulators to be healed."""


def copy_code(folder: Path) -> None:
    """Copy the project to `folder`, without its params.yaml."""
    for path in COPIED:
        source, target = ROOT / path, folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, target)


def make_project(folder: Path, name: str = "llama", **model: Any) -> dict[str, Any]:
    """Copy the project's code to `folder`, beside a tiny model and rows; returns its params."""
    copy_code(folder)
    inputs = folder.parent / f"{folder.name}-inputs"
    save_tiny(name, inputs / "model", **model)
    write_rows(inputs / "rows.jsonl")
    params = tiny_params(inputs / "model", inputs / "rows.jsonl")
    write_params(folder, params)
    return params


def make_vision_project(folder: Path, family: str = "internvl-llama") -> dict[str, Any]:
    """The same with a tiny vision-language model, and pictures in InternVL's format."""
    copy_code(folder)
    inputs = folder.parent / f"{folder.name}-inputs"
    save_tiny_vision(family, inputs / "model")
    write_pictures(inputs)
    params = tiny_params(inputs / "model", inputs / "meta.json")
    params["data"] |= {"format": "internvl", "max_length": 2000}
    params["evaluate"]["metrics"] = ["vqa_accuracy", "exact_match"]
    params["calibrate"]["targets"] = [r".*layers?\.\d+\..*"]
    params["compress"]["targets"] = {".*": "ratio"}
    write_params(folder, params)
    return params


def make_diffusion_project(folder: Path, name: str = "flux") -> dict[str, Any]:
    """The same with a tiny diffusion pipeline, and a folder of pictures for DreamBooth."""
    copy_code(folder)
    inputs = folder.parent / f"{folder.name}-inputs"
    save_tiny_pipeline(name, inputs / "model")
    (inputs / "pictures").mkdir()
    for number in range(5):
        save_picture(inputs / f"pictures/{number}.png", 24, 20, seed=number)
    params = tiny_params(inputs / "model", inputs / "pictures")
    dreambooth = {"prompt": "a sks dog", "resolution": 16}
    params["data"] |= {"format": "dreambooth", "train": None, "validation": 0, "test": 0}
    params["data"] |= {"max_length": 64, "dreambooth": dreambooth}
    params["calibrate"]["targets"] = [r".*transformer_blocks.*"]
    params["compress"]["targets"] = {r".*transformer_blocks.*": "ratio"}
    params["noise"] = {"weighting": "logit_normal"}
    params["train"]["lora"]["target_modules"] = ["to_q", "to_k", "to_v"]
    params["train"]["pictures"] = {"every": 2, "steps": 2, "guidance_scale": 1.0}
    drawing = {"steps": 2, "guidance_scale": 1.0, "draws": 2}
    drawing |= {"prompts": ["a sks dog", "a sks dog in the jungle"], "seeds": [0, 1]}
    params["evaluate"] |= {"metrics": ["loss"], "pictures": drawing}
    write_params(folder, params)
    return params


def write_pictures(folder: Path, count: int = 44) -> None:
    """Questions about pictures of several sizes, as InternVL's meta JSON and JSON Lines."""
    (folder / "images").mkdir()
    lines = []
    for number in range(count):
        size = [(28, 28), (60, 30), (30, 60)][number % 3]
        save_picture(folder / f"images/{number}.png", *size, seed=number)
        talk = [("human", f"<image>\nWhat is {number}?"), ("gpt", "abcdefgh"[number % 8] * 3)]
        turns = [{"from": speaker, "value": text} for speaker, text in talk]
        line = {"id": number, "image": f"{number}.png", "conversations": turns}
        lines.append(line | {"answers": [turns[1]["value"]] * 10})
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    meta = {"root": str(folder / "images"), "annotation": str(folder / "rows.jsonl")}
    meta |= {"data_augment": False, "repeat_time": 1, "length": count}
    (folder / "meta.json").write_text(json.dumps({"tiny": meta}))


def write_params(folder: Path, params: dict[str, Any]) -> None:
    """Write a project's params.yaml."""
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def run_stage(name: str, *arguments: Any) -> None:
    """Run a stage of the project in the current directory, in this process."""
    importlib.import_module(f"tasks.{name}").run(load_params(), *arguments)

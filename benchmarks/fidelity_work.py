"""What the methods of the fidelity benchmark share: one task on one original, with a cache.

Everything that is built (factors, emulators, adapters) lies in a folder whose name holds a digest
of all settings that it was made with, also those of what it was made from. So a correction of an
adapter that is there costs its evaluation alone. The digests do not see the code: after a change of
a method, remove its folders of the cache and its cells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emloc.calibrate import calibrate
from emloc.correct import bases_of, correct_adapter
from emloc.emulator import cut, plan_ranks
from emloc.factor_files import FactorFiles
from emloc.families import Codec, calibration_batches, load_codec
from emloc.families.text import Example
from emloc.files import digest, read_json
from emloc.finetune import finetune
from emloc.generate import generate_answers, mean_loss, row_losses
from emloc.models import load_model, open_model
from emloc.plug import plug
from emloc.projections import project
from emloc.settings import LoraSettings, TrainSettings
from emloc.targets import ratios_for, select

TARGETS = r".*\.layers\.\d+\..*"
MAX_RATIO = 0.9
CALIBRATION_ROWS = 512
BATCH_SIZE = 32  # where nothing is trained
NEW_TOKENS = 16
LORA = LoraSettings(r=8, alpha=16)


def train_settings(steps: int, seed: int) -> TrainSettings:
    """Those of params.yaml but for the steps, all rows of a step at once, for every training."""
    return TrainSettings(
        steps=steps, batch_size=16, learning_rate=1e-3, schedule="cosine", warmup=0.03, seed=seed
    )


@dataclass(frozen=True)
class Work:
    """One task on one original.

    Attributes:
        name: of the original, with its version; adapters name it as their base.
        data: source and sizes of the splits; with `name`, what all digests begin with.
        original: its folder.
        splits: encoded rows with `answer`.
        steps: of every training.
        cache: where what was built is kept.
    """

    name: str
    data: str
    original: Path
    splits: Mapping[str, list[Example]]
    steps: int
    cache: Path
    device: torch.device

    @cached_property
    def codec(self) -> Codec:
        """Of the original, without a chat template."""
        return load_codec(self.original, chat_template=False)

    @property
    def calibration(self) -> list[Example]:
        """The training rows that calibrate, and that pruning is decided on."""
        return self.splits["train"][:CALIBRATION_ROWS]

    def cached(self, kind: str, settings: Mapping[str, Any], build: Callable[[Path], Any]) -> Path:
        """The folder or file that `build` makes with these settings, made once."""
        begin = {"original": self.name, "data": self.data}
        out = self.cache / f"{kind}-{digest({**begin, **settings}, [])}"
        if not out.exists():
            self.cache.mkdir(parents=True, exist_ok=True)
            build(out)
        return out

    def load(self, path: Path | None = None) -> Any:
        """The original, or an emulator, in float32."""
        return load_model(path or self.original, dtype=torch.float32, device=self.device)

    def factors(self, *, calibrated: bool) -> Path:
        """The ordered factors, of calibration or of the plain SVD."""

        def build(out: Path) -> None:
            opened = open_model(self.original, dtype=torch.float32)
            rows = self.calibration if calibrated else []
            calibrate(
                opened,
                calibration_batches(self.codec, rows, BATCH_SIZE) if rows else [],
                linears=select(opened.model, [TARGETS], where="TARGETS"),
                max_ratio=MAX_RATIO,
                out=out,
                device=self.device,
            )

        rows = len(self.calibration) if calibrated else 0
        return self.cached("factors", {"rows": rows, "max_ratio": MAX_RATIO}, build)

    def emulator(self, factors: Path, ratio: float, ranks: Mapping[str, int] | None = None) -> Path:
        """An emulator at a ratio, uniform or with ranks of its own."""

        def build(out: Path) -> None:
            files = FactorFiles(factors)
            plan = plan_ranks(files, ratios_of(files, ratio))
            if ranks is not None:
                plan = [
                    replace(
                        layer,
                        rank=ranks[layer.name],
                        kept=ranks[layer.name] * (layer.out_features + layer.in_features),
                    )
                    for layer in plan
                ]
            opened = open_model(self.original, dtype=torch.float32)
            cut(self.original, opened, files, plan, out=out, base_name=self.name)

        chosen = None if ranks is None else sorted(ranks.items())
        settings = {"factors": factors.name, "ratio": ratio, "ranks": chosen}
        return self.cached("emulator", settings, build)

    def fit(self, base: str, seed: int, load: Callable[[], Any], finish: Any = None) -> Path:
        """A LoRA trained on what `load` gives.

        Args:
            base: what tells this model from others, for the digest.
            finish: makes the adapter of the original's shapes: (trained folder, new folder); None
                for one that has them already.
        """
        settings = train_settings(self.steps, seed)

        def build(out: Path) -> None:
            finetune(
                load(),
                self.splits["train"],
                [],
                codec=self.codec,
                lora=LORA,
                settings=settings,
                base_name=self.name,
                out=out,
                checkpoints=self.cache / "checkpoints" / out.name,
                progress=False,
            )

        options = {"base": base, "train": asdict(settings), "lora": asdict(LORA)}
        trained = self.cached("trained", options, build)
        if finish is None:
            return trained
        return self.cached("recovered", options, lambda out: finish(trained, out))

    def corrected(
        self, adapter: Path, emulator: Path, *, limit: float, weighted: bool = False
    ) -> Path:
        """An adapter of `fit` on an emulator, corrected by the paper or weighted by activations."""

        def build(out: Path) -> None:
            original, cut_one = (
                open_model(path, dtype=torch.float32) for path in (self.original, emulator)
            )
            projected = None
            if weighted:
                batches = calibration_batches(self.codec, self.calibration, BATCH_SIZE)
                bases = bases_of(adapter, cut_one)
                projected = project(original, batches, bases, device=self.device)
                original = open_model(self.original, dtype=torch.float32)
            correct_adapter(
                adapter,
                original,
                cut_one,
                limit=limit,
                projected=projected,
                out=out,
                device=self.device,
            )

        options = {"adapter": adapter.name, "limit": limit, "weighted": weighted}
        return self.cached("corrected", options, build)

    def held_out_loss(self, adapter: Path) -> float:
        """Loss of the original with an adapter on rows that no training and no split has."""
        model = plug(self.load(), adapter)
        return mean_loss(model, self.codec, self.splits["held"], batch_size=BATCH_SIZE)

    def answer(self, adapter: Path | None, split: str, rows: int) -> dict[str, list[Any]]:
        """What the original with an adapter makes of the first rows of a split.

        Returns:
            For each row `correct` (0 or 1), `losses` (nats, summed over the answer) and `tokens`.
        """
        examples = self.splits[split][:rows]
        model: nn.Module = self.load()
        if adapter is not None:
            model = plug(model, adapter)
        answers = generate_answers(
            model, self.codec, examples, batch_size=BATCH_SIZE, max_new_tokens=NEW_TOKENS
        )
        losses = row_losses(model, self.codec, examples, batch_size=BATCH_SIZE)
        correct = [
            int(answer == example["answer"])
            for answer, example in zip(answers, examples, strict=True)
        ]
        return {
            "correct": correct,
            "losses": [round(loss, 6) for loss, _ in losses],
            "tokens": [tokens for _, tokens in losses],
        }


def ratios_of(factors: FactorFiles, ratio: float) -> dict[str, float]:
    """The ratio of each layer of the blocks."""
    return ratios_for(factors.modules, {TARGETS: "ratio"}, ratio, where="TARGETS")


def kept_share(emulator: Path, factors: Path) -> float:
    """Share of the parameters of the blocks' linear layers that an emulator keeps."""
    ranks = read_json(emulator / "config.json")["quantization_config"]["ranks"]
    kept = whole = 0
    for name, shape in FactorFiles(factors).modules.items():
        o, i = shape["out_features"], shape["in_features"]
        whole += o * i
        kept += ranks[name] * (o + i) if name in ranks else o * i
    return kept / whole

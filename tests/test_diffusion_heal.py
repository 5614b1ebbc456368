"""Healing a denoiser: what the original predicts is kept, and brings an emulator nearer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from emloc.calibrate import calibrate
from emloc.diffusion.calibration import noised_batches
from emloc.diffusion.healing import Predictions, heal_denoiser, teach_denoiser
from emloc.diffusion.pipelines import load_denoiser
from emloc.emulator import cut, plan_ranks
from emloc.factor_files import FactorFiles
from emloc.families.diffusion import load_family
from emloc.lowrank import ranks_of
from emloc.models import load_model, open_model
from emloc.settings import HealSettings, NoiseSettings
from emloc.targets import select
from tests.test_diffusion_family import drawn_encoded
from tests.tiny_diffusion import save_tiny_pipeline
from tests.training import one_thread

__all__ = ["one_thread"]
PAIRS, FLOAT = 20, torch.float32
WEIGHTS = "diffusion_pytorch_model.safetensors"
TARGETS = {"flux": r".*transformer_blocks.*", "sdxl": r".*transformer_blocks.*"}


@pytest.fixture(scope="module", params=TARGETS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original, named by its family, its emulator, and what it predicts for some pairs."""
    folder = tmp_path_factory.mktemp("made") / request.param
    path = save_tiny_pipeline(request.param, folder / request.param)
    opened = open_model(path, dtype=FLOAT)
    linears = select(opened.model, [TARGETS[request.param]], where="targets")
    calibrate(opened, [], linears=linears, max_ratio=0.9, out=folder / "factors", dtype=FLOAT)
    factors = FactorFiles(folder / "factors")
    plan = plan_ranks(factors, dict.fromkeys(factors.modules, 0.5))
    again = open_model(path, dtype=FLOAT)
    cut(path, again, factors, plan, out=folder / "emulator", base_name="org/original")
    teach_denoiser(
        open_model(path, dtype=FLOAT),
        load_family(path),
        drawn_encoded(request.param),
        PAIRS,
        batch_size=3,
        wave=7,
        noise=NoiseSettings(),
        out=folder / "taught",
    )
    return folder


def heal_tiny(
    made: Path, out: Path, steps: int, kind: type[Predictions] = Predictions
) -> dict[str, Any]:
    return heal_denoiser(
        made / "emulator",
        load_family(made / made.name),
        drawn_encoded(made.name),
        kind(made / "taught"),
        settings=HealSettings(steps=steps, rank=3, batch_size=4, learning_rate=3e-3),
        noise=NoiseSettings(),
        out=out / "healed",
        checkpoints=out / "checkpoints",
    )


def test_what_is_kept_is_what_the_original_predicts(made: Path) -> None:
    path = made / made.name
    denoiser: Any = load_denoiser(path, dtype=FLOAT, device="cpu")
    batches = noised_batches(
        load_family(path),
        drawn_encoded(made.name),
        PAIRS,
        batch_size=5,
        noise=NoiseSettings(),
        dtype=FLOAT,
    )
    with torch.no_grad():
        wanted = torch.cat([denoiser(**batch)[0] for batch in batches])
    kept = Predictions(made / "taught").rows(range(PAIRS))
    torch.testing.assert_close(kept, wanted, atol=1e-5, rtol=1e-4)


def test_healing_brings_pairs_that_it_never_saw_nearer(made: Path, tmp_path: Path) -> None:
    found = heal_tiny(made, tmp_path, steps=30)
    assert found["error_after"] < 0.9 * found["error_before"]
    cut_one, healed = (
        load_model(folder, dtype=FLOAT, device="cpu")
        for folder in (made / "emulator", tmp_path / "healed")
    )
    assert ranks_of(cut_one) == ranks_of(healed)
    assert not (tmp_path / "checkpoints").exists()


def test_pairs_held_out_are_measured_twice_and_all_others_taught(
    made: Path, tmp_path: Path
) -> None:
    asked: Counter[int] = Counter()

    class Counting(Predictions):
        def rows(self, places: Sequence[int]) -> torch.Tensor:
            asked.update(places)
            return super().rows(places)

    heal_tiny(made, tmp_path, steps=15, kind=Counting)  # 60 places for the 17 that are taught
    held = range(0, PAIRS, 8)
    assert [asked[place] for place in held] == [2] * len(held)
    assert all(asked[place] >= 3 for place in range(PAIRS) if place not in held)


def test_the_same_inputs_heal_to_the_same_bytes(made: Path, tmp_path: Path) -> None:
    files = []
    for name in "ab":
        heal_tiny(made, tmp_path / name, steps=3)
        files.append((tmp_path / name / "healed" / WEIGHTS).read_bytes())
    assert files[0] == files[1]
    before = load_file(made / "emulator" / WEIGHTS)
    after = load_file(tmp_path / "a" / "healed" / WEIGHTS)
    changed = {key for key, tensor in before.items() if not torch.equal(tensor, after[key])}
    assert changed and all("transformer_blocks" in key for key in changed)

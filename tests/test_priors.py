"""Class pictures: each from a seed of its own, and none drawn twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from emloc.diffusion import priors
from emloc.diffusion.drawing import DrawSettings, draw
from emloc.diffusion.priors import class_pictures, picture_seeds
from tests.tiny_diffusion import tiny_pipeline

PROMPT = "a photo of a dog"
SETTINGS = DrawSettings(steps=2, guidance_scale=3.5, resolution=16)
HOW: dict[str, Any] = dict(seed=3, settings=SETTINGS, progress=False)


@pytest.fixture(scope="module")
def pipeline() -> DiffusionPipeline:
    made = tiny_pipeline("flux")
    made.set_progress_bar_config(disable=True)
    return made


def contents(paths: list[Path]) -> list[bytes]:
    return [path.read_bytes() for path in paths]


def test_pictures_are_what_draw_gives_for_their_seeds(
    pipeline: DiffusionPipeline, tmp_path: Path
) -> None:
    paths = class_pictures(pipeline, PROMPT, 3, folder=tmp_path / "new" / "dog", **HOW)
    assert paths == [tmp_path / "new" / "dog" / f"0000{n}.png" for n in range(3)]
    [drawn] = draw(pipeline, [PROMPT], picture_seeds(3, [0, 1, 2]), SETTINGS)
    for path, picture in zip(paths, drawn, strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(picture))
    assert len(set(contents(paths))) == 3
    [other] = class_pictures(pipeline, PROMPT, 1, folder=tmp_path / "4", **{**HOW, "seed": 4})
    assert other.read_bytes() not in contents(paths)


def test_the_count_changes_no_picture(pipeline: DiffusionPipeline, tmp_path: Path) -> None:
    all_three = class_pictures(pipeline, PROMPT, 3, folder=tmp_path / "1", **HOW)
    fewer = class_pictures(pipeline, PROMPT, 2, folder=tmp_path / "3", **HOW)
    assert contents(fewer) == contents(all_three)[:2]


def test_an_interrupted_run_goes_on_where_it_stopped(
    pipeline: DiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = class_pictures(pipeline, PROMPT, 4, folder=tmp_path / "whole", **HOW)
    seeds: list[int] = []

    def counting(*given: Any) -> Any:
        seeds.extend(given[2])
        if len(seeds) == 3:
            raise KeyboardInterrupt
        return draw(*given)

    monkeypatch.setattr(priors, "draw", counting)
    folder = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        class_pictures(pipeline, PROMPT, 4, folder=folder, **HOW)
    assert sorted(path.name for path in folder.iterdir()) == ["00000.png", "00001.png"]
    paths = class_pictures(pipeline, PROMPT, 4, folder=folder, **HOW)
    assert contents(paths) == contents(whole)
    assert seeds == picture_seeds(3, [0, 1, 2, 2, 3])
    class_pictures(pipeline, PROMPT, 4, folder=folder, **HOW)
    assert class_pictures(pipeline, PROMPT, 2, folder=folder, **HOW) == paths[:2]
    assert len(seeds) == 5 and len(list(folder.iterdir())) == 4


def test_broken_pictures_and_those_of_another_size_are_drawn_again(
    pipeline: DiffusionPipeline, tmp_path: Path
) -> None:
    paths = class_pictures(pipeline, PROMPT, 3, folder=tmp_path, **HOW)
    before = contents(paths)
    paths[0].write_bytes(before[0][: len(before[0]) // 2])
    Image.new("RGB", (8, 8)).save(paths[1])
    Image.new("RGB", (16, 16)).save(paths[2])  # whole and of the right size: kept
    after = contents(class_pictures(pipeline, PROMPT, 3, folder=tmp_path, **HOW))
    assert after[:2] == before[:2] and after[2] != before[2]


def test_seeds_differ_by_number_and_seed() -> None:
    seeds = [number for seed in range(20) for number in picture_seeds(seed, range(50))]
    assert len(set(seeds)) == 1000 and 0 <= min(seeds) <= max(seeds) < 2**63
    assert picture_seeds(7, [4, 2]) == [picture_seeds(7, range(5))[place] for place in (4, 2)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": " "}, "the class prompt is empty: name the class"),
        ({"count": 0}, "count"),
        ({"seed": -1}, "seed"),
        (
            {"settings": DrawSettings(steps=2, guidance_scale=1, resolution=18)},
            "resolution is 18, but pictures of a FluxPipeline",
        ),
    ],
)
def test_bad_values_are_named(
    pipeline: DiffusionPipeline, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "dog"
    given = {"prompt": PROMPT, "count": 1, **HOW, **change}
    with pytest.raises(ValueError, match=f"^{message}"):
        class_pictures(pipeline, folder=folder, **given)
    assert not folder.exists()

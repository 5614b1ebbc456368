"""Encoded pictures and captions are what the pipeline itself would give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image

from emloc.diffusion import encoding
from emloc.diffusion.encoding import Encoded, encode_prompts, encode_rows
from tests.tiny_diffusion import save_tiny_pipeline
from tests.training import one_thread

__all__ = ["one_thread"]
CPU = torch.device("cpu")
LENGTHS: dict[str, Any] = {"flux": 24, "kontext": 24, "sd3": 24, "sdxl": None}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("pipelines")
    return {name: save_tiny_pipeline(name, base / name) for name in LENGTHS}


@pytest.fixture(autouse=True)
def nothing_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's collector takes longer than all the rest here."""
    monkeypatch.setattr(encoding, "free_memory", lambda: None)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    for number, size in enumerate([(40, 24, 3), (16, 16, 3), (30, 50, 3)]):
        pixels = draw.integers(0, 256, size, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return tmp_path


def encode(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> Encoded:
    options: dict[str, Any] = dict(
        resolution=16, crop="center", flip=False, seed=0, device=CPU, dtype=torch.float32
    )
    return encode_rows(folder, rows, **{**options, **changes})


@pytest.mark.parametrize("name", LENGTHS)
def test_prompts_are_encoded_as_by_the_pipeline(name: str, folders: dict[str, Path]) -> None:
    pipeline: Any = DiffusionPipeline.from_pretrained(folders[name])
    prompts = ["a red dog", "a cat"]
    found = encode_prompts(
        folders[name], prompts, device=CPU, dtype=torch.float32, max_sequence_length=LENGTHS[name]
    )
    arguments: dict[str, Any] = {"prompt": prompts}
    if name == "sd3":
        arguments |= {"prompt_2": None, "prompt_3": None}
    if LENGTHS[name]:
        arguments["max_sequence_length"] = LENGTHS[name]
    result = pipeline.encode_prompt(**arguments)
    wanted = {"prompt_embeds": result[0], "pooled_prompt_embeds": result[2 if "sd" in name else 1]}
    for key, tensor in wanted.items():
        together = torch.cat([prompt[key] for prompt in found])
        torch.testing.assert_close(together, tensor, rtol=1e-4, atol=2e-5)  # 3e-6
    assert not torch.allclose(found[0]["prompt_embeds"], found[1]["prompt_embeds"])


def test_a_pipeline_of_sd3_without_its_t5_encodes_as_it_would(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    whole: Any = DiffusionPipeline.from_pretrained(
        folders["sd3"], text_encoder_3=None, tokenizer_3=None
    )
    whole.save_pretrained(tmp_path)
    [found] = encode_prompts(tmp_path, ["a cat"], device=CPU, dtype=torch.float32)
    wanted = whole.encode_prompt("a cat", None, None)[0]
    torch.testing.assert_close(found["prompt_embeds"], wanted)
    with pytest.raises(ValueError, match="take 77: shorten it.$"):
        encode_prompts(tmp_path, ["cat " * 40], device=CPU, dtype=torch.float32)


def test_pictures_are_encoded_as_by_the_vae(folders: dict[str, Path], pictures: Path) -> None:
    rows = [{"image": "1.png", "caption": "a"}, {"image": "0.png", "caption": "b", "prior": True}]
    encoded = encode(folders["sdxl"], rows, root=pictures)
    vae = AutoencoderKL.from_pretrained(folders["sdxl"] / "vae")
    with Image.open(pictures / "1.png") as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        posterior = vae.encode((pixels - 0.5) / 0.5).latent_dist
    torch.testing.assert_close(encoded.means[:1], posterior.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(encoded.stds[:1], posterior.std, rtol=1e-5, atol=1e-6)
    assert encoded.captions.tolist() == [0, 1] and encoded.prior.tolist() == [False, True]
    # 24 × 40 becomes 16 × 26 (rounded down), of which the middle 16 rows stay
    assert encoded.time_ids.tolist() == [[16, 16, 0, 0, 16, 16], [40, 24, 5, 0, 16, 16]]


def test_crops_and_flips_are_drawn_once_a_row_from_the_seed(
    folders: dict[str, Path], pictures: Path
) -> None:
    rows = [{"image": "2.png", "caption": "a"}] * 8
    options: dict[str, Any] = dict(root=pictures, crop="random", flip=True)
    one, two = (encode(folders["sdxl"], rows, seed=1, **options) for _ in range(2))
    assert torch.equal(one.means, two.means) and torch.equal(one.time_ids, two.time_ids)
    lefts = one.time_ids[:, 3].tolist()
    assert len(set(lefts)) > 3 and min(lefts) >= 0 and max(lefts) <= 26 - 16
    other = encode(folders["sdxl"], rows, seed=2, **options)
    assert lefts != other.time_ids[:, 3].tolist()
    fewer = encode(folders["sdxl"], rows[:3], seed=1, **options)
    assert torch.equal(fewer.means, one.means[:3])
    flips = encode(folders["sdxl"], rows, root=pictures, flip=True)
    assert len({mean.numpy().tobytes() for mean in flips.means}) == 2  # as it is, and mirrored


def test_equal_captions_are_encoded_once_and_a_file_keeps_all(
    folders: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    rows = [{"image": f"{n}.png", "caption": "ab"[n % 2]} for n in range(3)]
    encoded = encode(folders["flux"], rows, root=pictures, max_sequence_length=8)
    assert encoded.captions.tolist() == [0, 1, 0] and len(encoded.prompts) == 2 == len(encoded) - 1
    encoded.save(tmp_path / "encoded.safetensors")
    first = (tmp_path / "encoded.safetensors").read_bytes()
    loaded = Encoded.load(tmp_path / "encoded.safetensors")
    for name in ("means", "stds", "captions", "prior", "time_ids"):
        torch.testing.assert_close(getattr(loaded, name), getattr(encoded, name), rtol=0, atol=0)
    for mine, theirs in zip(loaded.prompts, encoded.prompts, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    some = encoded.at([2, 1, 1])
    found = [some.prompts[number] for number in some.captions]
    assert all(a is encoded.prompts[b] for a, b in zip(found, (0, 1, 1), strict=True))
    assert torch.equal(some.means, encoded.means[[2, 1, 1]]) and len(encoded.at([0]).prompts) == 1
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == first


@pytest.mark.parametrize("name", ["flux", "sd3", "sdxl"])
def test_captions_that_are_too_long_are_refused(name: str, folders: dict[str, Path]) -> None:
    long = "a very long dog " * 8
    advice = "or raise max_sequence_length" if LENGTHS[name] else "take 77: shorten it.$"
    with pytest.raises(ValueError, match=f"'a very long dog .* tokens, but .*{advice}"):
        encode_prompts(
            folders[name],
            [long],
            device=CPU,
            dtype=torch.float32,
            max_sequence_length=LENGTHS[name],
        )
    if name != "sdxl":  # the T5 takes what the CLIPs do not
        found = encode_prompts(folders[name], [long], device=CPU, dtype=torch.float32)
        assert found[0]["prompt_embeds"].shape[1] >= 256


def test_what_cannot_be_encoded_is_refused_in_words(
    folders: dict[str, Path], pictures: Path
) -> None:
    rows = [{"image": "0.png", "caption": "a"}]
    bad: list[tuple[str, dict[str, Any], str]] = [
        ("flux", dict(resolution=18), "resolution is 18, .* multiple of 4 .* nearest is 20"),
        ("sdxl", dict(resolution=3), "multiple of 8 .* nearest is 8"),
        ("flux", dict(crop="left"), "crop is 'left', but must be one of center, random"),
        ("flux", dict(max_sequence_length=513), "max_sequence_length is 513, but must be 1 to 512"),
        ("sdxl", dict(max_sequence_length=78), "max_sequence_length is 78, but must be 1 to 77"),
    ]
    for name, changes, message in bad:
        with pytest.raises(ValueError, match=message):
            encode(folders[name], rows, root=pictures, **changes)
    with pytest.raises(ValueError, match="no pictures to encode"):
        encode(folders["flux"], [])
    with pytest.raises(ValueError, match="row 0 .*there is no picture .*9.png"):
        encode(folders["sdxl"], [{"image": "9.png", "caption": "a"}], root=pictures)

"""The side files of a converted InternVL: tokenizer, chat template, image and video settings.

The settings name classes that transformers picks by what is installed: with torchvision all of
`AutoProcessor`; without it the image processor and the tokenizer, since videos need torchvision.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from emloc.files import read_json, write_json
from emloc.internvl.spm import fast_tokenizer

CONTEXT = "<IMG_CONTEXT>"
SPECIAL = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": CONTEXT,
    "video_token": "<video>",
}
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif part['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_processor(source: Path, folder: Path, original: dict[str, Any]) -> int:
    """Write all side files but config.json into `folder`; return the number of <IMG_CONTEXT>.

    Args:
        source: folder of the original checkpoint.
        folder: existing folder of the converted one.
        original: content of the original config.json.

    Raises:
        ValueError: there is no usable tokenizer, or it lacks a token that InternVL needs.
    """
    tokenizer = _tokenizer(source, original)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    _drop(folder / "tokenizer_config.json", "auto_map", "is_local", "local_files_only")
    write_settings(folder, original)
    vocabulary = tokenizer.get_vocab()
    defaults = {
        "eos_token_id": vocabulary["<|im_end|>"],
        "pad_token_id": tokenizer.pad_token_id,
    }
    stored = source / "generation_config.json"
    generation = folder / stored.name
    write_json(generation, {**defaults, **(read_json(stored) if stored.is_file() else {})})
    _drop(generation, "_from_model_config")
    return vocabulary[CONTEXT]


def _drop(file: Path, *keys: str) -> None:
    write_json(file, {key: value for key, value in read_json(file).items() if key not in keys})


def _tokenizer(source: Path, original: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The original's tokenizer as a fast one, with the attributes that the processor asks for.

    Raises:
        ValueError: as in `write_processor`.
    """
    load = _loader(source, original)
    vocabulary = load().get_vocab()
    for token in ("<img>", "</img>", CONTEXT, "<|im_end|>"):
        if token not in vocabulary:
            raise ValueError(
                f"The tokenizer in {source} has no token {token}, which InternVL needs: copy or "
                "download all of its tokenizer files again."
            )
    return load(extra_special_tokens=SPECIAL)


def _loader(source: Path, original: dict[str, Any]) -> Callable[..., PreTrainedTokenizerFast]:
    if (source / "tokenizer.json").is_file() or (source / "vocab.json").is_file():
        qwen2 = original["llm_config"]["architectures"][0] == "Qwen2ForCausalLM"
        kind = Qwen2Tokenizer if qwen2 else PreTrainedTokenizerFast
        return partial(kind.from_pretrained, source, local_files_only=True)
    if (source / "tokenizer.model").is_file():
        return partial(fast_tokenizer, source)
    raise ValueError(
        f"The folder {source} has no tokenizer: copy tokenizer.json, vocab.json with merges.txt, "
        "or tokenizer.model there."
    )


def write_settings(folder: Path, original: dict[str, Any]) -> None:
    """Write the settings of the image processor, the video processor and the processor itself.

    Args:
        folder: existing folder of the checkpoint.
        original: the fields of an original config.json that say how large a tile is and how
            pictures are cut into tiles.
    """
    vision = original.get("vision_config") or {}
    side = original.get("force_image_size") or vision.get("image_size", 224)
    ratio = original.get("downsample_ratio", 0.5)
    pixels = {
        "size": {"height": side, "width": side},
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "processor_class": "InternVLProcessor",
    }
    patches = {
        "crop_to_patches": original.get("dynamic_image_size", False),
        "min_patches": original.get("min_dynamic_patch", 1),
        "max_patches": original.get("max_dynamic_patch", 6),
        "image_processor_type": "GotOcr2ImageProcessor",
    }
    write_json(folder / "preprocessor_config.json", {**pixels, **patches})
    video = {"video_processor_type": "InternVLVideoProcessor"}
    write_json(folder / "video_preprocessor_config.json", {**pixels, **video})
    processor = {
        "processor_class": "InternVLProcessor",
        "image_seq_length": int((side // vision.get("patch_size", 14)) ** 2 * ratio**2),
    }
    write_json(folder / "processor_config.json", processor)

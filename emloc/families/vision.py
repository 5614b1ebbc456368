"""Vision-language models: rows with pictures as token ids and pixel values.

- `load_processor`: the model's own processor, with PIL's picture operations and without videos
- `VisionCodec`: rows to examples, examples to padded tensors, pictures opened when they are needed

How many tokens a picture takes depends on its size alone. So rows are encoded from the sizes in the
pictures' headers, and pixels are computed batch by batch.

Letters: B rows of a batch, T tokens of the longest.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from emloc.families.text import Example, Side, TextCodec, padded
from emloc.pictures import check_picture, load_picture, pictures_of

if TYPE_CHECKING:
    from emloc.data.jsonl import Row

_TYPES = ("mm_token_type_ids", "token_type_ids")  # which tokens are a picture's
_OF_TEXT = ("input_ids", "attention_mask", *_TYPES)


def load_processor(path: str | os.PathLike[str]) -> ProcessorMixin:
    """Load the processor in a checkpoint's folder for text and pictures.

    Pictures are resized and cut by PIL, whether torchvision is installed or not, so that a row
    gives the same pixels everywhere. Videos, which need torchvision, are left out.

    Raises:
        ValueError: the model has no processor, or one that does not say what stands for a picture
            in a text; or its files are missing or cannot be read.
    """
    folder = Path(path)
    base = _processor_class(AutoConfig.from_pretrained(folder).model_type)

    class Processor(base):  # type: ignore[misc, valid-type]
        """The same without a video processor."""

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [part for part in super().get_attributes() if "video" not in part]

        @classmethod
        def _get_arguments_from_pretrained(cls, *args: Any, **kwargs: Any) -> list[Any]:
            parts = super()._get_arguments_from_pretrained(*args, **kwargs)
            return [*parts, *[None] * (len(super().get_attributes()) - len(parts))]

    Processor.__name__ = base.__name__
    try:
        processor = Processor.from_pretrained(folder, backend="pil", local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f"the processor of {folder} cannot be read ({reason}): copy the original's "
            "preprocessor_config.json, processor_config.json and tokenizer files there."
        ) from error
    processor.tokenizer = padded(processor.tokenizer, folder)
    if processor.chat_template:
        processor.tokenizer.chat_template = processor.chat_template
    return processor


def _processor_class(model_type: str) -> type[ProcessorMixin]:
    """The class that transformers has for a type of model, if pictures can be placed with it."""
    base = getattr(transformers, PROCESSOR_MAPPING_NAMES.get(model_type, ""), ProcessorMixin)
    try:
        marks = base.replace_image_token is not ProcessorMixin.replace_image_token
    except ImportError as error:
        first = str(error).strip().splitlines()[0].partition(" but ")[0]
        raise ValueError(f"{first}, for models of type {model_type!r}: install it.") from error
    if not marks:
        raise ValueError(
            f"models of type {model_type!r} are not supported, since transformers does not say "
            "what stands for a picture in their texts: take another, such as InternVL, Qwen2.5-VL, "
            "Qwen3-VL, LLaVA, SmolVLM or Gemma 3."
        )
    return base


class VisionCodec(TextCodec):
    """How the rows of a data set become the inputs of a vision-language model.

    A conversation's text is cut and labelled as a language model's. Each picture stands where the
    chat template puts it, as many tokens long as the model's processor says.

    Args:
        processor: as `load_processor` gives it.
        chat_template: whether to use it; None means if there is one.
        root: the folder that relative paths of pictures start from.
        pictures: settings of the image processor that replace its own, as `max_patches`.

    Raises:
        ValueError: the image processor has no such setting; see also `TextCodec`.
    """

    _parts = True

    def __init__(
        self,
        processor: ProcessorMixin,
        *,
        chat_template: bool | None = None,
        root: str | os.PathLike[str] = ".",
        pictures: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(processor.tokenizer, chat_template=chat_template)
        self.processor, self.root = processor, Path(root)
        self._settings = _checked_settings(processor, pictures or {})
        self._mark: str = processor.image_token  # type: ignore[attr-defined]
        self._texts: dict[tuple[int, int], str] = {}  # (width, height) → what stands for a picture
        known = processor(text=["a"])
        self._types = next((name for name in _TYPES if name in known), None)

    def encode_row(self, row: Row, where: str) -> Example:
        """`input_ids`, `labels` and `pictures` (paths) of one row.

        Raises:
            ValueError: as in `TextCodec.encode`, or a picture that is missing or no picture, or
                whose place in the conversation is not clear; `where` starts the sentence.
        """
        return {**super().encode_row(row, where), "pictures": pictures_of(row)}

    def collate(self, examples: Sequence[Mapping[str, Any]], *, side: Side) -> dict[str, Tensor]:
        """Pad examples on one side, and compute the pixels of their pictures.

        Returns:
            What `TextCodec.collate` returns, the token types (B, T) that the model asks for, and
            the processor's pixel inputs of all pictures, in order; none if there is no picture.

        Raises:
            ValueError: a picture cannot be read.
        """
        batch = super().collate(examples, side=side)
        if self._types:
            types = self.processor.create_mm_token_type_ids(batch["input_ids"].tolist())
            batch[self._types] = torch.tensor(types, dtype=torch.int64)
        rows = [example["pictures"] for example in examples if example["pictures"]]
        if rows:
            pixels = self._process(
                [[load_picture(self._path(name), name) for name in row] for row in rows]
            )
            batch |= {name: value for name, value in pixels.items() if name not in _OF_TEXT}
        return batch

    def _expanded(
        self, pieces: list[tuple[str, str]], row: Row, where: str
    ) -> list[tuple[str, str]]:
        """The pieces with each picture's mark as long as the picture is in tokens."""
        names = pictures_of(row)
        marks = sum(context.count(self._mark) for context, _ in pieces)
        if marks != len(names) or any(self._mark in answer for _, answer in pieces):
            raise ValueError(
                f"{where} has {len(names)} pictures, but its conversation has {marks} places for "
                f"one ({self._mark}) before the last answer: take the mark out of the text, or "
                "give each picture its place before it."
            )
        sizes = [check_picture(self._path(name), where) for name in names]
        texts = iter([self._text_for(size) for size in sizes])
        mark = re.compile(re.escape(self._mark))
        return [(mark.sub(lambda _: next(texts), text), answer) for text, answer in pieces]

    def _path(self, name: str) -> str:
        return str(self.root / name)

    def _text_for(self, size: tuple[int, int]) -> str:
        """What the processor writes for a picture of a size; tried on an empty one, once a size."""
        if size not in self._texts:
            output = self._process([[Image.new("RGB", size)]], return_text_replacement_offsets=True)
            self._texts[size] = output["text_replacement_offsets"][0][0]["replacement"]
        return self._texts[size]

    def _process(self, rows: list[list[Image.Image]], **options: Any) -> Mapping[str, Any]:
        """The processor's output for rows of nothing but pictures."""
        return self.processor(
            text=[self._mark * len(row) for row in rows],
            images=rows,
            return_tensors="pt",
            padding=True,
            **self._settings,
            **options,
        )


def _checked_settings(processor: ProcessorMixin, settings: Mapping[str, Any]) -> dict[str, Any]:
    known = set(processor.image_processor.valid_kwargs.__annotations__)
    for name, value in settings.items():
        if name not in known:
            kind = type(processor.image_processor).__name__
            raise ValueError(
                f"data.pictures sets {name} to {value!r}, but this model's {kind} has no such "
                "setting: leave it out."
            )
    return dict(settings)

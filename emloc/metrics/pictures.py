"""How well pictures drawn from prompts show what they should.

- `PICTURE_METRICS`: their names
    - `shape_and_color`: share of the pictures that measure as the concept, such as "blue triangle"
    - `clip_t`: likeness of pictures and prompts, the mean cosine of CLIP's embeddings of the two
    - `clip_i`, `dino`: likeness of pictures and references, the mean cosine over all pairs of
      CLIP's picture embeddings, or of the class tokens of a DINO ViT
- `check_picture_metrics`: refuses what cannot be computed, before anything is drawn
- `picture_scores`: the scores

The last three are those of DreamBooth (Ruiz et al., arXiv 2208.12242, section 4.1), which takes
CLIP ViT-B/32 and DINO ViT-S/16 and compares with photographs of the subject.

Letters: N pictures, E width of an embedding.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

from emloc.metrics.shapes import COLORS, SHAPES, measure_shape
from emloc.quiet import quiet_libraries

PICTURE_METRICS = ("shape_and_color", "clip_t", "clip_i", "dino")
CLIP_TYPES = ("clip",)
DINO_TYPES = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")
"""Model types whose last hidden states start with a class token."""
BATCH = 16
"""Pictures or prompts that are embedded at once."""
_NEEDS = {"shape_and_color": "concept", "clip_t": "clip", "clip_i": "clip", "dino": "dino"}
_MEANS = {
    "concept": "a colour and a shape, such as blue triangle",
    "clip": "the folder or hub id of a CLIP model",
    "dino": "the folder or hub id of a DINO ViT",
}


def check_picture_metrics(
    names: Sequence[str], clip: str | None, dino: str | None, concept: str | None
) -> None:
    """Refuse metrics that cannot be computed; no model is loaded.

    Raises:
        ValueError: an unknown metric, one without the model or concept that it needs, or a concept
            that is no colour and shape of easy-VQA.
    """
    given = {"clip": clip, "dino": dino, "concept": concept}
    for name in names:
        if name not in PICTURE_METRICS:
            near = difflib.get_close_matches(name, PICTURE_METRICS, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(
                f"the metric of pictures is {name!r}{hint}, but it must be one of "
                f"{', '.join(PICTURE_METRICS)}."
            )
        if not given[_NEEDS[name]]:
            key = f"evaluate.pictures.{_NEEDS[name]}"
            raise ValueError(
                f"the metric {name} needs {key}, which is not set: write {_MEANS[_NEEDS[name]]}, "
                f"there, or leave {name} out."
            )
    if "shape_and_color" in names:
        _parse_concept(concept)


def picture_scores(
    names: Sequence[str],
    pictures: Sequence[Sequence[Image.Image]],
    prompts: Sequence[str],
    references: Sequence[Image.Image],
    *,
    clip: str | None,
    dino: str | None,
    concept: str | None,
    device: torch.device | str,
) -> dict[str, float]:
    """The scores of pictures, each a mean over all of them; models are loaded one after the other.

    Args:
        names: some of `PICTURE_METRICS`.
        pictures: [prompt][seed], at least one for each prompt.
        prompts: what they were drawn from.
        references: pictures of the subject; only `clip_i` and `dino` need any.
        clip: folder or hub id of a CLIP model with its tokenizer and image processor.
        dino: the same of a ViT, such as facebook/dino-vits16.
        concept: colour and shape, such as "blue triangle".
        device: where the models run, in float32.

    Returns:
        the score of each name, in the order given: shares from 0 to 1, cosines from -1 to 1.

    Raises:
        ValueError: as in `check_picture_metrics`; not as many rows of pictures as prompts, or an
            empty one; no references where they are needed; a model that cannot be loaded.
    """
    check_picture_metrics(names, clip, dino, concept)
    _check_pictures(names, pictures, prompts, references)
    drawn = [picture for row in pictures for picture in row]
    scores = {}
    if "shape_and_color" in names:
        wanted = _parse_concept(concept)
        hits = [measure_shape(picture) == wanted for picture in drawn]
        scores["shape_and_color"] = sum(hits) / len(hits)
    if clip is not None and {"clip_t", "clip_i"} & set(names):
        embedder = _Embedder(clip, CLIP_TYPES, device)
        shown = embedder.pictures(drawn)
        if "clip_t" in names:
            told = embedder.texts(prompts)
            rows = [number for number, row in enumerate(pictures) for _ in row]
            scores["clip_t"] = float((shown * told[rows]).sum(-1).mean())
        if "clip_i" in names:
            scores["clip_i"] = _mean_cosine(shown, embedder.pictures(references))
        del embedder
    if dino is not None and "dino" in names:
        embedder = _Embedder(dino, DINO_TYPES, device)
        scores["dino"] = _mean_cosine(embedder.pictures(drawn), embedder.pictures(references))
    return {name: scores[name] for name in names}


def _parse_concept(concept: str | None) -> tuple[str, str]:
    """Colour and shape of a concept."""
    words = (concept or "").split()
    if len(words) != 2 or words[0] not in COLORS or words[1] not in SHAPES:
        raise ValueError(
            f"evaluate.pictures.concept is {concept!r}, but it must be a colour "
            f"({', '.join(COLORS)}) and a shape ({', '.join(SHAPES)}), such as blue triangle."
        )
    return words[0], words[1]


def _check_pictures(
    names: Sequence[str],
    pictures: Sequence[Sequence[Image.Image]],
    prompts: Sequence[str],
    references: Sequence[Image.Image],
) -> None:
    if len(pictures) != len(prompts) or not all(pictures) or not pictures:
        raise ValueError(
            f"there are pictures {[len(row) for row in pictures]} for {len(prompts)} prompts, but "
            "each prompt must have at least one, and there must be a prompt."
        )
    needing = [name for name in names if name in ("clip_i", "dino")]
    if needing and not references:
        raise ValueError(
            f"the metric {needing[0]} compares with pictures of the subject, but there are none: "
            "give some as references, or leave it out."
        )


def _mean_cosine(one: Tensor, other: Tensor) -> float:
    """The mean product of all pairs of rows of two matrices of unit rows, (N, E) and (M, E)."""
    return float((one @ other.T).mean())


class _Embedder:
    """A CLIP model or a ViT with its processors, which gives unit vectors in float64 on the CPU."""

    def __init__(self, source: str, kinds: tuple[str, ...], device: torch.device | str) -> None:
        """Raises ValueError if there is no such model, or its weights are incomplete."""
        self.device = device
        self.tokenizer: Any = None
        try:
            with quiet_libraries():
                self.kind = AutoConfig.from_pretrained(source).model_type
                if self.kind not in kinds:
                    raise ValueError(f"it is of type {self.kind}, not {' or '.join(kinds)}")
                self.processor = AutoImageProcessor.from_pretrained(source, backend="pil")
                if kinds == CLIP_TYPES:
                    self.tokenizer = AutoTokenizer.from_pretrained(source)
                model, info = AutoModel.from_pretrained(
                    source, dtype=torch.float32, output_loading_info=True
                )
            unused = ("pooler.", "embeddings.mask_token")  # some checkpoints come without
            if missing := sorted(k for k in info["missing_keys"] if not k.startswith(unused)):
                raise ValueError(f"its files hold no weights for {missing[0]}")
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            key = "clip" if kinds == CLIP_TYPES else "dino"
            raise ValueError(
                f"evaluate.pictures.{key} is {source!r}, which could not be loaded ({reason}): "
                f"give {_MEANS[key]}, with its tokenizer and image processor where it has them."
            ) from error
        self.model = model.to(device).eval()

    @torch.no_grad()
    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeddings of pictures, (N, E)."""
        parts = []
        for start in range(0, len(images), BATCH):
            batch = [image.convert("RGB") for image in images[start : start + BATCH]]
            values = self.processor(images=batch, return_tensors="pt")["pixel_values"]
            parts.append(self._embed_pictures(values.to(self.device)))
        return _unit(torch.cat(parts))

    def _embed_pictures(self, values: Tensor) -> Tensor:
        if self.kind in CLIP_TYPES:
            features: Any = self.model.get_image_features(pixel_values=values)
            return features.pooler_output
        return self.model(pixel_values=values).last_hidden_state[:, 0]

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """CLIP's embeddings of texts, cut where they are longer than it takes, (N, E)."""
        most = self.model.config.text_config.max_position_embeddings
        parts = []
        for start in range(0, len(texts), BATCH):
            tokens = self.tokenizer(
                list(texts[start : start + BATCH]),
                padding=True,
                truncation=True,
                max_length=most,
                return_tensors="pt",
            )
            inputs = {
                name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")
            }
            parts.append(self.model.get_text_features(**inputs).pooler_output)
        return _unit(torch.cat(parts))


def _unit(rows: Tensor) -> Tensor:
    """The rows with length 1, (N, E) float64 on the CPU."""
    return normalize(rows.double().cpu(), dim=-1)

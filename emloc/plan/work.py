"""What a model is to work on, without data: one batch, by its shapes.

- `Rows`: rows of text, with or without pictures, for a language or vision-language model
- `TaughtRows`: the same, to heal an emulator with
- `Noised`: pictures and captions for a denoiser

Both can run a model that has no data (see `tracking.without_data`).

Letters: B rows, T tokens of the longest, n labels, h hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from emloc import loss
from emloc.diffusion.encoding import Encoded
from emloc.distill import sum_of_divergences
from emloc.families import Codec
from emloc.families.noising import Batch, DiffusionFamily
from emloc.settings import NoiseSettings

_CLIP_TOKENS, _FLUX_TOKENS = 77, 512
_SD3_TOKENS = 77 + 256


@dataclass(frozen=True)
class Rows:
    """A batch of rows.

    Attributes:
        batch_size: B.
        tokens: T, the tokens of a picture among them.
        labels: n, in the whole batch; None labels every token.
        pictures: what the image processor gives of the batch's pictures, by name and shape.
    """

    batch_size: int
    tokens: int
    labels: int | None = None
    pictures: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Tokens in all, padding among them."""
        return self.batch_size * self.tokens

    def resized(self, batch_size: int, tokens: int) -> Rows:
        """Another number of rows, of another length, as far labelled as these."""
        share = 1.0 if self.labels is None else self.labels / self.size
        labels = max(1, round(share * batch_size * tokens))
        scale = batch_size / self.batch_size
        pictures = {
            name: (max(1, round(shape[0] * scale)), *shape[1:])
            for name, shape in self.pictures.items()
        }
        return replace(self, batch_size=batch_size, tokens=tokens, labels=labels, pictures=pictures)

    def times(self, batch_size: int) -> Rows:
        """So many of these rows at once."""
        return self.resized(batch_size, self.tokens)

    def look(self, model: Any) -> Any:
        """Run the vision tower over the pictures; its output, or None where there is none or its
        shapes depend on what is in the pictures."""
        dtype, device = model.dtype, model.device
        if not self.pictures or not hasattr(model, "get_image_features"):
            return None
        known = inspect.signature(model.get_image_features).parameters
        pixels = {
            name: torch.empty(shape, dtype=dtype, device=device)
            for name, shape in self.pictures.items()
            if name in known
        }
        try:
            return model.get_image_features(**pixels)
        except (DataDependentOutputException, DynamicOutputShapeException, TypeError):
            return None

    def states(self, model: Any, **options: Any) -> Any:
        """Run the decoder; (B, T, h) hidden states, and a cache where one is asked for."""
        hidden, device = model.config.get_text_config().hidden_size, model.device
        ids = torch.zeros(self.batch_size, self.tokens, dtype=torch.int64, device=device)
        embedded = torch.empty(*ids.shape, hidden, dtype=model.dtype, device=device)
        mask = torch.ones_like(ids) if self.batch_size > 1 else None
        return model.get_decoder()(inputs_embeds=embedded, attention_mask=mask, **options)

    def loss(self, model: Any) -> Tensor:
        """As `trainer.LoraTrainer` computes it."""
        seen = self.look(model)
        states = self.states(model, use_cache=False).last_hidden_state
        labels = self.size if self.labels is None else self.labels
        kept = states.flatten(0, 1)[:labels]  # (n, h)
        targets = torch.zeros(len(kept), dtype=torch.int64, device=kept.device)
        head: nn.Linear = model.get_output_embeddings()
        del states, seen
        if labels * head.out_features > loss.LARGE:
            return loss.chunked_cross_entropy(kept, head.weight, targets)
        logits = head(kept)
        return nn.functional.cross_entropy(logits.float(), targets)

    def run(self, model: Any) -> None:
        """A forward without gradients and without logits."""
        seen = self.look(model)
        self.states(model, use_cache=False)
        del seen


@dataclass(frozen=True)
class TaughtRows(Rows):
    """Rows whose every token is learnt from the original.

    Attributes:
        top_k: of the original's log-probabilities that are kept.
    """

    top_k: int = 1

    def loss(self, model: Any) -> Tensor:
        """As `distill.HealTrainer` computes it."""
        seen = self.look(model)
        states = self.states(model, use_cache=False).last_hidden_state.flatten(0, 1)  # (n, h)
        shape, device = (len(states), self.top_k), states.device
        ids = torch.zeros(shape, dtype=torch.int64, device=device)
        logprobs = torch.zeros(shape, device=device)
        del seen
        return sum_of_divergences(model.get_output_embeddings(), states, ids, logprobs)


@dataclass(frozen=True)
class Noised:
    """A batch of noised pictures.

    Attributes:
        batch: on the CPU, in the dtype that the denoiser takes.
        family: of the pipeline.
    """

    batch: Batch
    family: DiffusionFamily

    @classmethod
    def of_config(
        cls,
        family: DiffusionFamily,
        resolution: int,
        dtype: torch.dtype,
        noise: NoiseSettings,
    ) -> Noised:
        """One picture of a size, with a prompt as long as it can be, by a pipeline's configs.

        Raises:
            ValueError: the denoiser does not take pictures of this size.
        """
        if resolution < 1 or resolution % family.multiple:
            raise ValueError(
                f"the resolution is {resolution}, but it must be a multiple of {family.multiple}."
            )
        side, config = resolution // family.shrink, family.denoiser
        latent = torch.zeros(1, family.vae["latent_channels"], side, side)
        tokens, width, pooled = _prompt_shape(config)
        prompt = {
            "prompt_embeds": torch.zeros(1, tokens, width),
            "pooled_prompt_embeds": torch.zeros(1, pooled),
        }
        nothing = torch.zeros(1, dtype=torch.int64)
        encoded = Encoded(latent, latent, nothing, nothing.bool(), [prompt], torch.zeros(1, 6))
        return cls(family.batch(encoded, [0], [0], noise).as_type(dtype), family)

    def times(self, batch_size: int) -> Noised:
        """So many of these pictures at once."""
        batch, rows = self.batch, self.batch_size

        def repeated(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: repeated(entry) for name, entry in value.items()}
            if not isinstance(value, Tensor) or value.shape[:1] != (rows,):
                return value  # such as the ids of places, which all rows share
            return value[:1].expand(batch_size, *value.shape[1:])

        parts = (batch.inputs, batch.target, batch.weights, batch.prior)
        return Noised(Batch(*map(repeated, parts)), self.family)

    @property
    def batch_size(self) -> int:
        """Pictures in it."""
        return len(self.batch.target)

    @property
    def size(self) -> int:
        """Pictures in it; they have no tokens to count."""
        return self.batch_size

    def loss(self, model: Any) -> Tensor:
        """As `diffusion.training.NoiseTrainer` computes it, prior preservation left out."""
        error = (self._predicted(model).float() - self._on(model, self.batch.target)) ** 2
        return error.flatten(1).mean(1).mean()

    def run(self, model: Any) -> None:
        """A forward without gradients."""
        self._predicted(model)

    def _predicted(self, model: Any) -> Tensor:
        inputs = self.batch.inputs
        return model(**{name: self._on(model, value) for name, value in inputs.items()})[0]

    def _on(self, model: Any, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: self._on(model, entry) for name, entry in value.items()}
        if not isinstance(value, Tensor):
            return value
        return torch.empty(value.shape, dtype=value.dtype, device=model.device)


Work = Rows | Noised


def rows_of(codec: Codec, examples: Sequence[Mapping[str, Any]]) -> Rows:
    """One row as long as the longest of some examples, with as many labels and as many pictures as
    the one that has most.

    Args:
        codec: the one that encoded the examples; it opens the pictures of one of them.
        examples: at least one.
    """
    longest = max(len(example["input_ids"]) for example in examples)
    labels = max(sum(label >= 0 for label in example["labels"]) for example in examples)
    fullest = max(examples, key=lambda example: len(example["input_ids"]))
    batch = codec.collate([fullest], side="right")
    pictures = {
        name: tuple(value.shape) for name, value in batch.items() if value.is_floating_point()
    }
    return Rows(1, longest, labels, pictures)


def empty_pictures(model: Any, count: int) -> dict[str, tuple[int, ...]]:
    """What an image processor gives of so many pictures, or tiles, for a model that takes them in
    one size.

    Raises:
        ValueError: the model sees no pictures, or takes them in any size.
    """
    if not count:
        return {}
    vision = getattr(model.config, "vision_config", None)
    side = getattr(vision, "image_size", None)
    if side is None:
        raise ValueError(
            f"{count} pictures were asked for, but {type(model).__name__} takes none, or takes "
            "them in any size: leave them out, or give --data."
        )
    sides = tuple(side) if isinstance(side, list | tuple) else (side, side)
    return {"pixel_values": (count, 3, *sides)}


def _prompt_shape(denoiser: Mapping[str, Any]) -> tuple[int, int, int]:
    """Tokens and width of a prompt's encoding, and the width of its pooled one."""
    if "joint_attention_dim" in denoiser:
        tokens = _FLUX_TOKENS if "guidance_embeds" in denoiser else _SD3_TOKENS
        return tokens, denoiser["joint_attention_dim"], denoiser["pooled_projection_dim"]
    times = 6 * denoiser["addition_time_embed_dim"]
    pooled = denoiser["projection_class_embeddings_input_dim"] - times
    return _CLIP_TOKENS, denoiser["cross_attention_dim"], pooled

"""What a language or vision-language model answers, and how likely it finds the right answers.

- `generate_answers`: greedy answers, batched
- `row_losses`: negative log-likelihood of the labelled tokens of each row
- `mean_loss`: its mean over all of them

Both take a plain model or one with LoRA, put it into eval mode meanwhile, and work with rows of
like length together.

Letters: B rows of a batch, T tokens of the longest row.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationConfig

from emloc.families import Codec
from emloc.families.text import IGNORED, prompt_ids
from emloc.models import evaluating
from emloc.offload import device_of


def generate_answers(
    model: nn.Module,
    codec: Codec,
    examples: Sequence[Mapping[str, Any]],
    *,
    batch_size: int,
    max_new_tokens: int,
    progress: str | None = None,
) -> list[str]:
    """Greedy answers to the prompts of the examples, in their order.

    Prompts are padded on the left. An answer ends before the tokenizer's end token, the chat
    template's end of a turn, or an end token of the checkpoint's generation config; nothing else of
    that config is used. Special tokens and outer white space are left out.

    Args:
        model: a language or vision-language model, on any device.
        codec: the one that encoded the examples.
        examples: as the codec's `encode` gives them.
        batch_size: rows at once.
        max_new_tokens: the most tokens of an answer.
        progress: title of a progress bar; None for none.

    Raises:
        ValueError: `batch_size` or `max_new_tokens` below 1.
    """
    _check_positive("max_new_tokens", max_new_tokens)
    base = _base_model(model)
    tokenizer = codec.tokenizer
    stops = _all_stops(base, codec)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stops,
        pad_token_id=stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    prompts = [{**example, "input_ids": prompt_ids(example)} for example in examples]
    answers = [""] * len(prompts)
    with evaluating(model), _generation_config(base, settings):
        for rows in _batches(prompts, batch_size, progress):
            inputs = _prompt_batch(codec, [prompts[row] for row in rows], base)
            output = base.generate(**inputs, generation_config=settings)
            said = output[:, inputs["input_ids"].shape[1] :].tolist()
            for row, ids in zip(rows, said, strict=True):
                answers[row] = _text(tokenizer, ids, stops)
    return answers


def mean_loss(
    model: nn.Module,
    codec: Codec,
    examples: Sequence[Mapping[str, Any]],
    *,
    batch_size: int,
    progress: str | None = None,
) -> float:
    """Mean negative log-likelihood in nats per labelled token, each token counting the same.

    Args:
        model, codec, examples, batch_size, progress: as for `row_losses`.

    Raises:
        ValueError: `batch_size` below 1, or no labelled token in any row.
    """
    losses = row_losses(model, codec, examples, batch_size=batch_size, progress=progress)
    count = sum(tokens for _, tokens in losses)
    if not count:
        raise ValueError("no row has a labelled token, so there is no loss: give it answers.")
    return sum(loss for loss, _ in losses) / count


def row_losses(
    model: nn.Module,
    codec: Codec,
    examples: Sequence[Mapping[str, Any]],
    *,
    batch_size: int,
    progress: str | None = None,
) -> list[tuple[float, int]]:
    """Negative log-likelihood of each row's labelled tokens in nats, and their number.

    Logits are computed from the first labelled position on only, where the model's forward allows
    (`logits_to_keep`); the log-softmax is in fp32.

    Args:
        model: a language or vision-language model, on any device.
        codec: makes batches of the examples, padded on the right.
        examples: as the codec's `encode` gives them; a label of -100 does not count.
        batch_size: rows at once.
        progress: title of a progress bar; None for none.

    Raises:
        ValueError: `batch_size` below 1.
    """
    base = _base_model(model)
    found = [(0.0, 0)] * len(examples)
    with evaluating(model):
        for rows in _batches(examples, batch_size, progress):
            batch = codec.collate([examples[row] for row in rows], side="right")
            sums = _batch_losses(base, _on_device(batch, base))
            for row, loss in zip(rows, sums, strict=True):
                found[row] = loss
    return found


def _batch_losses(model: Any, batch: dict[str, Tensor]) -> list[tuple[float, int]]:
    """Sum of the negative log-likelihoods, and number, of the labels of each row of (B, T)."""
    labels = batch["labels"][:, 1:]  # position t predicts the token at t + 1
    labelled = labels != IGNORED
    columns = labelled.any(dim=0).nonzero()
    if not len(columns):
        return [(0.0, 0)] * len(labels)
    first = int(columns[0])
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    options = {"use_cache": False, "logits_to_keep": batch["labels"].shape[1] - first}
    known = inspect.signature(model.forward).parameters
    options = {name: value for name, value in options.items() if name in known}
    logits = model(**inputs, **options).logits
    kept = labels.shape[1] - first  # the last position predicts nothing
    labels, labelled = labels[:, -kept:], labelled[:, -kept:]
    chosen = logits[:, -kept - 1 : -1][labelled].float()  # (labelled tokens, vocabulary)
    losses = nn.functional.cross_entropy(
        chosen, labels[labelled].to(chosen.device), reduction="none"
    )
    counts = labelled.sum(dim=1).tolist()
    return [
        (float(row.sum()), count) for row, count in zip(losses.split(counts), counts, strict=True)
    ]


def _prompt_batch(
    codec: Codec, prompts: Sequence[Mapping[str, Any]], model: Any
) -> dict[str, Tensor]:
    """A batch of prompts on the model's device, padded on the left."""
    rows = [{**prompt, "labels": prompt["input_ids"]} for prompt in prompts]
    batch = codec.collate(rows, side="left")
    return _on_device({k: v for k, v in batch.items() if k != "labels"}, model)


def _on_device(batch: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    device = device_of(model)
    return {name: value.to(device) for name, value in batch.items()}


def _text(tokenizer: Any, ids: list[int], stops: list[int]) -> str:
    """The text before the first stop token."""
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
    text = tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text).strip()


def _all_stops(model: Any, codec: Codec) -> list[int]:
    """The tokenizer's stop tokens and those of the checkpoint's generation config."""
    own = getattr(model.generation_config, "eos_token_id", None)
    extra = own if isinstance(own, (list, tuple)) else [] if own is None else [own]
    return list(dict.fromkeys([*codec.stop_ids, *map(int, extra)]))


def _base_model(model: nn.Module) -> Any:
    """The model that LoRA layers were put into, or the model itself."""
    unwrap = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


@contextlib.contextmanager
def _generation_config(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Put `settings` in the place of the model's own defaults, which would fill its gaps."""
    own = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own


def _batches(
    examples: Sequence[Mapping[str, Any]], batch_size: int, progress: str | None
) -> Iterator[list[int]]:
    """Indices in batches of like length, the longest first so that memory runs out at once."""
    _check_positive("batch_size", batch_size)
    lengths = [len(example["input_ids"]) for example in examples]
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    with tqdm(total=len(order), desc=progress, unit="row", disable=progress is None) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            yield rows
            bar.update(len(rows))


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}, but it must be at least 1.")

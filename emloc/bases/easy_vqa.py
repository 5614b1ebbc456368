"""An InternVL trained from scratch on easy-VQA's yes/no questions: no other text, no other answer.

Which shape and which colour, easy-VQA's other questions, stay for the fine-tuning.

1. The vision tower and the projector learn to see: from the mean of the picture's tokens, a linear
   layer that is thrown away afterwards says yes or no to every question at once. Yes and no count
   the same for each question, or "no" would nearly always do.
2. The language model learns to answer, with the vision tower as it is. Where the answer is the rare
   one, the question names what is in the picture (or "not" what is), and its words are learnt too:
   without that, matching words with pictures takes far longer to begin.

Letters: B pictures, Q questions, n tokens of a picture, h features of a token.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import InternVLForConditionalGeneration

from emloc.bases.fitting import batches_of, fit
from emloc.bases.internvl import build_model, build_tokenizer, image_processor, save_checkpoint
from emloc.bases.packing import ANSWERS, Packed, Packer
from emloc.bases.questions import NOT_ASKED, Questions, read_questions
from emloc.bases.settings import EasyVqaSettings

_HELD_OUT = 0.05  # share of the pictures
_ASKED = 3  # questions in a row
_QUESTION_WEIGHT = 0.5


def build_base(
    train_folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    settings: EasyVqaSettings,
    seed: int,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Train the model and write it as a native checkpoint, in one go at the end.

    Args:
        train_folder: the folder of easy-VQA's training part.
        out: the checkpoint's folder; what was there is replaced.
        settings: how long and how fast to train.
        seed: of the weights, the held-out pictures and the order of all others.
        device: where to train.
        progress: show a bar with the loss and the held-out accuracy.

    Returns:
        `parameters`, `pictures` and `questions` (trained on), `held_out_questions`,
        `yes_no_accuracy` of the held-out ones, what the commoner answer to each question would get
        there (`commoner_answer_accuracy`), and the losses of the last steps of both parts.

    Raises:
        ValueError: the folder is unusable, or the loss became NaN or infinite.
    """
    device = torch.device(device)
    generator = torch.Generator().manual_seed(seed)
    process = image_processor()
    questions = read_questions(
        train_folder, lambda pictures: process(pictures, return_tensors="pt")["pixel_values"]
    )
    train, held_out = questions.split(_HELD_OUT, generator)
    tokenizer = build_tokenizer([*questions.texts, *ANSWERS])
    model = build_model(tokenizer, seed=seed)
    model.to(device)  # type: ignore[arg-type]
    packer = Packer(tokenizer, train, question_weight=_QUESTION_WEIGHT, device=device)
    batches = _Batches(train, settings.batch_size, generator)
    seen = _learn_to_see(model, train, batches, settings, seed, progress)

    def accuracy() -> float:
        return yes_no_accuracy(model, packer, held_out, settings.batch_size)

    said = _learn_to_answer(model, packer, batches, settings, accuracy, progress)
    metrics = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "pictures": len(train.pictures),
        "questions": int((train.answers != NOT_ASKED).sum()),
        "held_out_questions": int((held_out.answers != NOT_ASKED).sum()),
        "yes_no_accuracy": accuracy(),
        "commoner_answer_accuracy": _commoner_accuracy(train, held_out),
        "vision_loss": seen,
        "loss": said,
    }
    save_checkpoint(model, tokenizer, out)
    return metrics


class _Batches:
    """Batches of pictures without end, in a new order each time round, half of them mirrored."""

    def __init__(self, questions: Questions, size: int, generator: torch.Generator) -> None:
        self.questions, self.size, self.generator = questions, size, generator

    def __iter__(self) -> Iterator[Questions]:
        for rows in batches_of(len(self.questions.pictures), self.size, self.generator):
            batch = self.questions.at(rows)
            mirrored = torch.rand(len(rows), generator=self.generator) < 0.5
            pictures = torch.where(
                mirrored[:, None, None, None], batch.pictures.flip(-1), batch.pictures
            )
            yield Questions(pictures, batch.texts, batch.answers)


class _Reader(nn.Module):
    """Says yes or no to all questions at once, from the tokens of pictures alone."""

    def __init__(self, features: int, questions: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.answers = nn.Linear(features, questions)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, n, h) → (B, Q): above 0 is yes."""
        return self.answers(self.norm(tokens).mean(1))


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """What Muon trains."""
    return parameter.ndim == 2 and "embed_tokens" not in name


def _learn_to_see(
    model: InternVLForConditionalGeneration,
    train: Questions,
    batches: Iterable[Questions],
    settings: EasyVqaSettings,
    seed: int,
    progress: bool,
) -> float:
    """Train the vision tower and the projector; return the mean loss of the last steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reader = _Reader(model.lm_head.in_features, len(train.texts)).to(model.device)
    yes = train.yes_share().clamp(0.01, 0.99)
    by_answer = torch.stack([0.5 / (1 - yes), 0.5 / yes])  # (2, Q)

    def loss(batch: Questions) -> Tensor:
        pixels = batch.pictures.to(model.device)
        logits = reader(model.model.get_image_features(pixel_values=pixels).pooler_output)
        truth = batch.answers.clamp(min=0)
        weights = by_answer.gather(0, truth) * (batch.answers != NOT_ASKED)  # (B, Q)
        truth, weights = truth.to(logits), weights.to(logits)
        return functional.binary_cross_entropy_with_logits(
            logits, truth, weight=weights, reduction="sum"
        ) / weights.sum().clamp(min=1e-6)

    parts = nn.ModuleList([model.model.vision_tower, model.model.multi_modal_projector, reader])
    return fit(
        parts,
        loss,
        batches,
        steps=settings.vision_steps,
        learning_rate=settings.learning_rate,
        is_matrix=_is_matrix,
        title="see",
        progress=progress,
    )


def _learn_to_answer(
    model: InternVLForConditionalGeneration,
    packer: Packer,
    batches: Iterable[Questions],
    settings: EasyVqaSettings,
    accuracy: Callable[[], float],
    progress: bool,
) -> float:
    """Train all but the vision tower; return the mean loss of the last steps."""
    model.model.vision_tower.requires_grad_(False)
    draw = torch.Generator().manual_seed(0)

    def loss(batch: Questions) -> Tensor:
        packed = packer.pack(batch, _ASKED, draw)
        counted = packed.weights[:, 1:] > 0
        logits, truth = _logits(model, packed, counted)
        weights = packed.weights[:, 1:][counted]
        losses = functional.cross_entropy(logits, truth, reduction="none")
        return (losses * weights).sum() / weights.sum()

    last = fit(
        model,
        loss,
        batches,
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        is_matrix=_is_matrix,
        title="answer",
        progress=progress,
        look=lambda: f"accuracy={accuracy():.3f}",
    )
    model.model.vision_tower.requires_grad_(True)
    return last


def _logits(
    model: InternVLForConditionalGeneration, packed: Packed, chosen: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits (N, vocabulary) for the N tokens that are chosen from the second on, and their ids."""
    states = model.model(**packed.inputs, use_cache=False).last_hidden_state[:, :-1]
    return model.lm_head(states[chosen]), packed.inputs["input_ids"][:, 1:][chosen]


@torch.no_grad()
def yes_no_accuracy(
    model: InternVLForConditionalGeneration, packer: Packer, questions: Questions, size: int
) -> float:
    """Share of all questions asked whose answer is the likeliest next token."""
    most = int((questions.answers != NOT_ASKED).sum(1).max())
    draw = torch.Generator().manual_seed(0)
    right = []
    model.eval()
    for index in torch.arange(len(questions.pictures)).split(size):
        packed = packer.pack(questions.at(index), most, draw)
        logits, truth = _logits(model, packed, packed.decisive[:, 1:])
        right.append(logits.argmax(1) == truth)
    model.train()
    return torch.cat(right).float().mean().item()


def _commoner_accuracy(train: Questions, held_out: Questions) -> float:
    """What one gets who looks at no picture and gives the commoner answer to each question."""
    asked = held_out.answers != NOT_ASKED
    guess = (train.yes_share() >= 0.5).long().expand_as(held_out.answers)
    return (guess == held_out.answers)[asked].float().mean().item()

"""Predicted peaks of the stages that hold a whole model: training and answering.

- `train_step`: one forward and backward with a LoRA, and its FLOPs
- `generate_peak`: answers with a cache
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from emloc.diffusion.lora import add_denoiser_lora
from emloc.fused import fused_lora
from emloc.lora import add_lora
from emloc.nf4 import bytes_spared
from emloc.optimize import state_bytes
from emloc.plan.peak import Peak
from emloc.plan.tracking import bytes_of, tracked, without_data
from emloc.plan.work import Noised, Rows, Work
from emloc.settings import LoraSettings, TrainSettings


@dataclass(frozen=True)
class Step:
    """One forward and backward of a training.

    Attributes:
        peak: its peak.
        flops: what it computes, as torch counts it.
    """

    peak: Peak
    flops: int


def train_step(
    model: Any, work: Work, *, lora: LoraSettings, settings: TrainSettings, device: torch.device
) -> Step:
    """Training a LoRA on a model; one forward and backward are run without data.

    Args:
        model: on the meta device; not to be used afterwards.
        work: the largest batch.
        lora: the adapter's shape.
        settings: how to train; `batch_size` is not looked at.
        device: where training will run.
    """
    spared = 0 if settings.quantization is None else bytes_spared(model, lora)
    with torch.device("meta"):
        if isinstance(work, Noised):
            add_denoiser_lora(model, lora, seed=0)
        else:
            add_lora(model, lora, base_name="", seed=0)
    if settings.gradient_checkpointing:
        _checkpoint(model)
    model.train()
    adapter = bytes_of(model, trained=True)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapter += state_bytes(settings.optimizer) * parameters
    weights = bytes_of(model, trained=False) - spared
    with without_data(model, device), fused_lora(model) if settings.fused else nullcontext():
        adapter += _beyond_parameters(model)
        kept = _gradients(model) if settings.accumulation > 1 else None
        with tracked(model, device) as tracker:
            with _precision(settings.precision, device):
                loss = work.loss(model)
            loss.backward()
        held = sum(gradient.nbytes for gradient in kept or [])
    logits = tracker.logits_bytes
    peak = Peak(weights, adapter + held, tracker.peak_bytes - logits, logits)
    return Step(peak, tracker.flops)


def generate_peak(model: Any, rows: Rows, *, new_tokens: int, device: torch.device) -> Peak:
    """Greedy answers: the prompts at once, then a cache that grows to prompt and answer."""
    weights = bytes_of(model)
    longest = rows.resized(rows.batch_size, rows.tokens + new_tokens)
    with without_data(model, device), torch.no_grad():
        with tracked(model, device) as tracker:
            seen = rows.look(model)
            output = rows.states(model, use_cache=True)
            model.get_output_embeddings()(output.last_hidden_state[:, -1:])
            del seen
        prompt = tracker.live_bytes
        cache = prompt * longest.tokens // max(1, rows.tokens)
        layers = model.config.get_text_config().num_hidden_layers
        growing = cache + 2 * cache // layers  # the layer that grows is there twice
    logits = tracker.logits_bytes
    return Peak(weights, activations=max(tracker.peak_bytes - logits, growing), logits=logits)


def _checkpoint(model: Any) -> None:
    if hasattr(model, "enable_gradient_checkpointing"):
        model.enable_gradient_checkpointing()
    else:
        model.activation_checkpointing_enable({"use_reentrant": False})


def _beyond_parameters(model: nn.Module) -> int:
    """Bytes beside the frozen weights in their storages, where a fused LoRA is copied to."""
    frozen = (p for p in model.parameters() if not p.requires_grad)
    return sum(p.untyped_storage().nbytes() - p.nbytes for p in frozen)


def _gradients(model: nn.Module) -> list[torch.Tensor]:
    """Gradients that are there before a backward, from those before it in the same step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    return [parameter.grad for parameter in trained if parameter.grad is not None]


def _precision(name: str, device: torch.device) -> Any:
    mixed = name == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16) if mixed else nullcontext()

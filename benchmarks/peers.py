"""Two other ways to train small and infer large, on the original's own training loop.

Both build a smaller model from the original, train a LoRA on it, and turn that into an adapter of
the original's shapes, which plain peft loads.

- Offsite-tuning (Xiao et al., arXiv 2302.04870): its layer drop. Evenly spread blocks are kept, the
  first and the last among them, and the LoRA goes back to the same blocks; the dropped ones get
  none. The paper trains the outer blocks whole and distils the middle; here every kept block has a
  LoRA and nothing is distilled, so that only the stand-in differs between the methods.
- LoRAM (Zhang et al., arXiv 2502.13533), its structured variant: each block loses key-value groups,
  query heads and MLP channels, the same number in every block, by the importance of LLM-Pruner
  (first-order Taylor, Σ |w ∂loss/∂w| over the structure's weights, arXiv 2305.11627) on training
  rows. The LoRA is recovered by zeros in the pruned rows of B and columns of A. The paper also
  spares the outer blocks and continues pretraining on other text ("alignment"); neither is done.

Both take models with the blocks of Llama (`self_attn.{q,k,v,o}_proj`, `mlp.{gate,up,down}_proj`).

Letters: o out features, i in features, r LoRA rank.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from emloc.adapters import AdapterFolder, find_adapter, save_with_header
from emloc.families import Codec
from emloc.files import read_json, writing
from emloc.models import evaluating

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


def blocks_of(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of a language model's blocks.

    Raises:
        ValueError: it has none that are like Llama's.
    """
    decoder = model.get_decoder()
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    blocks = getattr(decoder, "layers", None)
    parts = {child for block in blocks or [] for child, _ in block.named_modules()}
    wanted = {f"self_attn.{part}" for part in _ATTENTION} | {f"mlp.{part}" for part in _MLP}
    if not wanted <= parts:
        raise ValueError(
            f"{type(model).__name__} has no blocks like Llama's, which the peers need: take a "
            "model with self_attn.q_proj and mlp.gate_proj in each block."
        )
    return f"{name}.layers".lstrip("."), blocks


def block_parameters(model: PreTrainedModel) -> int:
    """Parameters of all linear layers in the blocks: what a ratio is a share of."""
    _, blocks = blocks_of(model)
    return sum(m.weight.numel() for m in blocks.modules() if isinstance(m, nn.Linear))


def kept_blocks(count: int, ratio: float) -> list[int]:
    """Evenly spread blocks whose share comes nearest to the ratio; the outer ones from two on."""
    keep = min(count, max(1, round(ratio * count)))
    if keep == 1:
        return [0]
    return [round(place * (count - 1) / (keep - 1)) for place in range(keep)]


def drop_blocks(original: PreTrainedModel, ratio: float) -> tuple[PreTrainedModel, list[int]]:
    """A model with the kept blocks alone (a copy), and which they are."""
    _, blocks = blocks_of(original)
    kept = kept_blocks(len(blocks), ratio)
    config = copy.deepcopy(original.config)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[place] for place in kept]
    config.num_hidden_layers = len(kept)
    prefix = blocks_of(original)[0]
    places = {old: new for new, old in enumerate(kept)}
    state = {
        renamed: tensor
        for name, tensor in original.state_dict().items()
        if (renamed := _renumbered(name, prefix, places)) is not None
    }
    return _built(config, state, original), kept


def restore_blocks(
    adapter: Path, original: PreTrainedModel, kept: Sequence[int], out: Path
) -> None:
    """Write the adapter of a model with dropped blocks as one of the original."""
    prefix, _ = blocks_of(original)
    places = dict(enumerate(kept))
    folder = find_adapter(adapter)
    tensors = {
        f"{folder.prefix}.{_renumbered(key.removeprefix(f'{folder.prefix}.'), prefix, places)}": t
        for key, t in folder.read_raw().items()
    }
    _write(folder, tensors, out)


def _renumbered(name: str, prefix: str, places: Mapping[int, int]) -> str | None:
    """A name with the number of its block changed; None for a block without a place."""
    if not name.startswith(f"{prefix}."):
        return name
    number, _, rest = name.removeprefix(f"{prefix}.").partition(".")
    place = places.get(int(number))
    return None if place is None else f"{prefix}.{place}.{rest}"


@dataclass(frozen=True)
class Pruning:
    """What structured pruning keeps of each block, as indices in rising order.

    Attributes:
        queries, values, channels: for each block, rows of q_proj, of k_proj and v_proj, and of
            gate_proj and up_proj.
        groups: key-value heads of a block.
        heads: query heads of a group.
    """

    queries: list[Tensor]
    values: list[Tensor]
    channels: list[Tensor]
    groups: int
    heads: int

    def sides(self, block: int, part: str) -> tuple[Tensor | None, Tensor | None]:
        """Kept out and in features of a linear layer; None where all stay."""
        queries, values, channels = self.queries, self.values, self.channels
        return {
            "q_proj": (queries[block], None),
            "k_proj": (values[block], None),
            "v_proj": (values[block], None),
            "o_proj": (None, queries[block]),
            "gate_proj": (channels[block], None),
            "up_proj": (channels[block], None),
            "down_proj": (None, channels[block]),
        }[part]


def importance(
    original: PreTrainedModel,
    codec: Codec,
    examples: Sequence[Mapping[str, Any]],
    *,
    batch_size: int,
) -> dict[str, Tensor]:
    """Σ |w ∂loss/∂w| over the weights of each inner feature of a block, by linear layer.

    The loss is the mean over the labelled tokens of a batch, its gradient summed over batches.

    Returns:
        Layer name → (o,), of o_proj and down_proj (i,), on the CPU.
    """
    prefix, blocks = blocks_of(original)
    weights = {
        f"{prefix}.{name}": module.weight
        for name, module in blocks.named_modules()
        if isinstance(module, nn.Linear)
    }
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    with evaluating(original), torch.enable_grad():
        for start in range(0, len(examples), batch_size):
            batch = codec.collate(examples[start : start + batch_size], side="right")
            inputs = {name: tensor.to(original.device) for name, tensor in batch.items()}
            loss = original(**inputs, use_cache=False).loss
            gradients = torch.autograd.grad(loss, list(weights.values()))
            for name, gradient in zip(weights, gradients, strict=True):
                total[name] += gradient
    return {
        name: (weight.detach() * total[name])
        .abs()
        .sum(0 if name.endswith(("o_proj", "down_proj")) else 1)
        .cpu()
        for name, weight in weights.items()
    }


def plan_pruning(
    original: PreTrainedModel, importances: Mapping[str, Tensor], ratio: float
) -> Pruning:
    """Choose what to keep, so that the linear layers' parameters come nearest to the ratio.

    Attention keeps whole groups, and the same number of heads in each: of all such pairs the one
    whose share is nearest to the ratio; the channels of the MLP make up for the rest.
    """
    prefix, blocks = blocks_of(original)
    config = original.config
    size = blocks[0].self_attn.head_dim
    groups = config.num_key_value_heads
    heads = config.num_attention_heads // groups
    whole = groups * heads + groups  # of the parameters, in units of 2 · head size · width
    pairs = [(g, h) for g in range(1, groups + 1) for h in range(1, heads + 1)]
    kept_groups, kept_heads = min(
        pairs, key=lambda p: (abs((p[0] * p[1] + p[0]) / whole - ratio), -p[0])
    )
    width, inner = config.hidden_size, config.intermediate_size
    attention = 2 * size * width
    total = attention * whole + 3 * width * inner
    left = ratio * total - attention * kept_groups * (kept_heads + 1)
    kept_channels = min(inner, max(1, round(left / (3 * width))))
    plan = Pruning([], [], [], kept_groups, kept_heads)
    for block in range(len(blocks)):
        rows = {part: importances[f"{prefix}.{block}.self_attn.{part}"] for part in _ATTENTION}
        rows |= {part: importances[f"{prefix}.{block}.mlp.{part}"] for part in _MLP}
        queries = (rows["q_proj"] + rows["o_proj"]).view(groups, heads, size).sum(-1)
        values = (rows["k_proj"] + rows["v_proj"]).view(groups, size).sum(-1)
        top = queries.topk(kept_heads, dim=1)
        best = (values + top.values.sum(1)).topk(kept_groups).indices.sort().values
        chosen = top.indices.sort(dim=1).values + heads * torch.arange(groups)[:, None]
        plan.queries.append(_spread(chosen[best].flatten(), size))
        plan.values.append(_spread(best, size))
        channels = rows["gate_proj"] + rows["up_proj"] + rows["down_proj"]
        plan.channels.append(channels.topk(kept_channels).indices.sort().values)
    return plan


def _spread(places: Tensor, size: int) -> Tensor:
    """Indices of the features of heads."""
    return (places[:, None] * size + torch.arange(size)).flatten()


def prune(original: PreTrainedModel, plan: Pruning) -> PreTrainedModel:
    """The pruned model, a copy with a config of its own."""
    prefix, blocks = blocks_of(original)
    config = copy.deepcopy(original.config)
    config.head_dim = blocks[0].self_attn.head_dim
    config.num_key_value_heads = plan.groups
    config.num_attention_heads = plan.groups * plan.heads
    config.intermediate_size = len(plan.channels[0])
    state = dict(original.state_dict())
    for name in [name for name in state if name.startswith(f"{prefix}.")]:
        layer, _, kind = name.rpartition(".")
        if (kept := _sides(plan, prefix, layer)) is None:
            continue
        rows, columns = kept
        if rows is not None:
            state[name] = state[name][rows.to(state[name].device)]
        if columns is not None and kind == "weight":
            state[name] = state[name][:, columns.to(state[name].device)]
    return _built(config, state, original)


def recover(adapter: Path, original: PreTrainedModel, plan: Pruning, out: Path) -> None:
    """Write the adapter of a pruned model as one of the original, zeros where it was pruned."""
    prefix, _ = blocks_of(original)
    folder = find_adapter(adapter)
    tensors = {}
    for key, tensor in folder.read_raw().items():
        layer = key.removeprefix(f"{folder.prefix}.").rpartition(".lora_")[0]
        rows, columns = _sides(plan, prefix, layer) or (None, None)
        module = original.get_submodule(layer)
        if key.endswith(".lora_B.weight") and rows is not None:
            full = tensor.new_zeros(module.out_features, tensor.shape[1])
            tensor = full.index_copy_(0, rows, tensor)
        if key.endswith(".lora_A.weight") and columns is not None:
            full = tensor.new_zeros(tensor.shape[0], module.in_features)
            tensor = full.index_copy_(1, columns, tensor)
        tensors[key] = tensor
    _write(folder, tensors, out)


def _sides(plan: Pruning, prefix: str, layer: str) -> tuple[Tensor | None, Tensor | None] | None:
    """Kept features of a layer by its full name; None for one that is not pruned."""
    number, _, rest = layer.removeprefix(f"{prefix}.").partition(".")
    part = rest.rpartition(".")[2]
    return plan.sides(int(number), part) if part in (*_ATTENTION, *_MLP) else None


def _built(config: Any, state: Mapping[str, Tensor], like: PreTrainedModel) -> PreTrainedModel:
    """A model of this config with these weights, where and as the other one is."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=like.dtype)
    model.load_state_dict(dict(state))
    model.generation_config = copy.deepcopy(like.generation_config)
    return model.to(like.device).eval()


def _write(folder: AdapterFolder, tensors: Mapping[str, Tensor], out: Path) -> None:
    """Write an adapter with other tensors; its config names just the layers that have some."""
    start = f"{folder.prefix}."
    config = read_json(folder.folder / "adapter_config.json")
    config["target_modules"] = sorted(
        {key.removeprefix(start).rpartition(".lora_")[0] for key in tensors}
    )
    with writing(out) as partial:
        partial.mkdir()
        save_with_header(dict(tensors), partial / folder.weights, {"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (partial / "adapter_config.json").write_text(text, encoding="utf-8")

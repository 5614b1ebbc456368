"""InternVL2.5's own checkpoints, turned into the format that plain transformers loads.

- the folder that users have (InternVLChatModel, with Python files beside the weights) becomes an
  InternVLForConditionalGeneration; no file of it is ever run
- streamed: one output shard is in memory at a time, and dtypes are kept
- tokenizer, chat template and processor settings go with it

Letters: h hidden size, d size of a head, g query heads that share a key/value head, v vision hidden
size. What changes besides names:

    language_model….attention.wqkv   (kv heads · (g + 2) · d, h), InternLM2 only: for each key/value
                                     head its g query heads, its key, its value
      → self_attn.q_proj             (kv heads · g · d, h), in the same order of heads
      → self_attn.k_proj, v_proj     (kv heads · d, h) each
    vision_model….attn.qkv           (3 · v, v): all queries, all keys, all values
      → attention.q_proj, k_proj, v_proj   (v, v) each

A bias is cut like the rows of its weight. Llama and Qwen2 inside have transformers' names already.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration

from emloc.checkpoint import check_whole, weight_files
from emloc.files import read_json, writing
from emloc.internvl.config import convert_config
from emloc.internvl.processor import write_processor
from emloc.shards import Piece, write_shards

_RENAMED = (
    (r"^vision_model\.", "model.vision_tower."),
    (r"(?<=tower\.embeddings\.)class_embedding$", "cls_token"),
    (r"(?<=tower\.embeddings\.)patch_embedding\.", "patch_embeddings.projection."),
    (r"(?<=tower\.embeddings\.)position_embedding$", "position_embeddings"),
    (r"(?<=tower\.encoder\.)layers\.(\d+)\.", r"layer.\1."),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.attn\.", ".attention."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.ls([12])$", r".lambda_\1"),
    (r"^mlp1\.0\.", "model.multi_modal_projector.layer_norm."),
    (r"^mlp1\.1\.", "model.multi_modal_projector.linear_1."),
    (r"^mlp1\.3\.", "model.multi_modal_projector.linear_2."),
    (r"^language_model\.(output|lm_head)\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"\.tok_embeddings\.", ".embed_tokens."),
    (r"\.attention\.wqkv\.", ".self_attn.wqkv."),
    (r"\.attention\.wo\.", ".self_attn.o_proj."),
    (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
    (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
    (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
)


def convert(
    source: Path,
    *,
    out: Path | str,
    max_shard_size: int | str = "2GB",
    progress: bool = False,
) -> int:
    """Write a folder that `AutoModelForImageTextToText.from_pretrained` loads.

    Args:
        source: folder of the original checkpoint.
        out: folder to create.
        max_shard_size: bytes or a text such as "2GB"; about as much memory is needed.
        progress: show a progress bar over the tensors.

    Returns:
        the number of parameters written.

    Raises:
        ValueError: `out` exists; the folder holds no InternVL checkpoint, an unsupported language
            model or pickled weights; or a weight is missing, unknown or of another shape.
    """
    source, out = Path(source), Path(out)
    if out.exists():
        raise ValueError(f"The folder {out} exists already: remove it, or name another one.")
    check_whole(source, str(source))
    original = read_json(source / "config.json")
    config = convert_config(original, str(source))
    pieces = dict(_pieces(source, config))
    _check_complete(pieces, config, source)
    with writing(out) as folder:
        folder.mkdir()
        config.image_token_id = write_processor(source, folder, original)
        config.save_pretrained(folder)
        write_shards(
            folder,
            pieces,
            max_shard_size=max_shard_size,
            progress="convert" if progress else None,
        )
    return sum(piece.like.numel() for piece in pieces.values())


def _pieces(source: Path, config: InternVLConfig) -> Iterator[tuple[str, Piece]]:
    """Every tensor under its new name; the files are mapped, and nothing is read yet."""
    for shard in weight_files(source, str(source)):
        with safe_open(source / shard, framework="pt") as handle:
            for key in handle.keys():
                if key.endswith("rotary_emb.inv_freq"):
                    continue
                name = key
                for pattern, replacement in _RENAMED:
                    name = re.sub(pattern, replacement, name)
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                like = handle.get_tensor(key).to("meta")
                for part, cut in _cuts(name, config):
                    read = partial(_read, source / shard, key, cut)
                    yield part, Piece(cut(like), read)


def _read(file: Path, key: str, cut: Callable[[Tensor], Tensor]) -> Tensor:
    """A tensor of its own: not a view that would keep all of a fused one in memory."""
    with safe_open(file, framework="pt") as handle:
        return cut(handle.get_tensor(key)).clone(memory_format=torch.contiguous_format)


def _cuts(name: str, config: InternVLConfig) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """The parts of a tensor: itself, or the three projections of a fused one."""
    text: Any = config.text_config
    if ".attention.qkv." in name:
        groups, members = 1, 3
        chosen = {"q": slice(0, 1), "k": slice(1, 2), "v": slice(2, 3)}
    elif ".self_attn.wqkv." in name:
        groups = text.num_key_value_heads
        shared = text.num_attention_heads // groups
        members = shared + 2
        chosen = {"q": slice(shared), "k": slice(-2, -1), "v": slice(-1, None)}
    else:
        yield name, lambda tensor: tensor
        return
    for letter, part in chosen.items():
        new = re.sub(r"\.w?qkv\.", f".{letter}_proj.", name)
        yield new, partial(_heads, name=name, groups=groups, members=members, chosen=part)


def _heads(fused: Tensor, *, name: str, groups: int, members: int, chosen: slice) -> Tensor:
    """Rows of the chosen members of every group: (groups · members · rows, …) → fewer rows.

    Raises:
        ValueError: the rows cannot be split into that many groups.
    """
    if fused.shape[0] % (groups * members):
        raise ValueError(
            f"The weight {name} has {fused.shape[0]} rows, which do not split into {groups} groups "
            f"of {members} heads: use the config.json that belongs to the weights."
        )
    return fused.unflatten(0, (groups, members, -1))[:, chosen].flatten(0, 2)


def _check_complete(pieces: dict[str, Piece], config: InternVLConfig, source: Path) -> None:
    """Compare with what the model of this config has.

    Raises:
        ValueError: the first tensor that is missing, left over, or of another shape.
    """
    with torch.device("meta"):
        expected = InternVLForConditionalGeneration(config).state_dict()
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    wrong = sorted(
        (expected.keys() ^ pieces.keys())
        | {
            name
            for name in expected.keys() & pieces
            if expected[name].shape != pieces[name].like.shape
        }
    )
    if wrong:
        name = wrong[0]
        found, wanted = (
            tuple(tensor.shape) if tensor is not None else "absent"
            for tensor in (pieces[name].like if name in pieces else None, expected.get(name))
        )
        raise ValueError(
            f"The weights in {source} do not fit its config.json: {name} should be {wanted} and is "
            f"{found} ({len(wrong)} tensors differ); copy or download both again."
        )

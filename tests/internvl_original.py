"""A tiny InternVL as its authors publish it: their names, their layout, their arithmetic.

- `Original`: a reference written from the published architecture, with its parameter names
- `save_original`: a folder as users have it: shards, config.json with auto_map, a Python file that
  must never run, and a tokenizer (Qwen2's files, or a SentencePiece model for InternLM2)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

from tests.internvl_tokenizers import save_qwen2_files, save_sentencepiece, write
from tests.tiny import draw_weights

VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    image_size=56, patch_size=14, hidden_act="gelu", layer_norm_eps=1e-6, initializer_factor=0.1,
)  # fmt: skip
SMALL = dict(norm_type="layer_norm", qk_normalization=False, qkv_bias=True)  # like InternViT-300M
LARGE = dict(norm_type="rms_norm", qk_normalization=True, qkv_bias=False)  # like InternViT-6B
LANGUAGE = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=5000.0, max_position_embeddings=256,
    vocab_size=300, hidden_act="silu", tie_word_embeddings=False, num_beams=1,
)  # fmt: skip


def config(architecture: str, vision: dict[str, Any], **language: Any) -> dict[str, Any]:
    """The content of an original config.json."""
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 56,
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "torch_dtype": "float32",
        "vision_config": {**VISION, **vision},
        "llm_config": {**LANGUAGE, "bias": False, **language, "architectures": [architecture]},
    }


class Norm(nn.Module):
    """Root mean square norm."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class VisionAttention(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        size = c["hidden_size"]
        self.heads = c["num_attention_heads"]
        self.qkv = nn.Linear(size, 3 * size, bias=c["qkv_bias"])
        self.proj = nn.Linear(size, size)
        if c["qk_normalization"]:
            self.q_norm, self.k_norm = Norm(size), Norm(size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class VisionBlock(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        size = c["hidden_size"]
        norm = Norm if c["norm_type"] == "rms_norm" else lambda n: nn.LayerNorm(n, eps=1e-6)
        self.attn = VisionAttention(c)
        self.mlp = nn.ModuleDict(
            {
                "fc1": nn.Linear(size, c["intermediate_size"]),
                "fc2": nn.Linear(c["intermediate_size"], size),
            }
        )
        self.norm1, self.norm2 = norm(size), norm(size)
        self.ls1, self.ls2 = (nn.Parameter(torch.full((size,), 0.5)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x)) * self.ls1
        return x + self.mlp["fc2"](gelu(self.mlp["fc1"](self.norm2(x)))) * self.ls2


class Vision(nn.Module):
    def __init__(self, c: dict[str, Any], select_layer: int) -> None:
        super().__init__()
        self.depth = c["num_hidden_layers"] + 1 + select_layer
        size, patch, side = c["hidden_size"], c["patch_size"], c["image_size"]
        self.embeddings = nn.ParameterDict(
            {
                "class_embedding": torch.randn(1, 1, size),
                "position_embedding": torch.randn(1, (side // patch) ** 2 + 1, size),
            }
        )
        self.embeddings.patch_embedding = nn.Conv2d(3, size, patch, patch)
        blocks = nn.ModuleList(VisionBlock(c) for _ in range(c["num_hidden_layers"]))
        self.encoder = nn.ModuleDict({"layers": blocks})

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        first = self.embeddings["class_embedding"].expand(len(x), -1, -1)
        x = torch.cat([first, x], 1) + self.embeddings["position_embedding"]
        for block in self.encoder["layers"][: self.depth]:
            x = block(x)
        return x[:, 1:]


def turned(x: Tensor, base: float) -> Tensor:
    """Rotary positions on (batch, heads, tokens, size of a head), in halves."""
    half = x.shape[-1] // 2
    speed = base ** -(torch.arange(half) / half)
    angle = torch.arange(x.shape[-2])[:, None] * speed
    one, two = x.chunk(2, -1)
    return torch.cat(
        [one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()], -1
    )


class FusedAttention(nn.Module):
    """InternLM2's: one projection, grouped by key/value head."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        size, self.base = c["hidden_size"], c["rope_theta"]
        self.heads, self.groups = c["num_attention_heads"], c["num_key_value_heads"]
        rows = (self.heads + 2 * self.groups) * size // self.heads
        self.wqkv = nn.Linear(size, rows, bias=c["bias"])
        self.wo = nn.Linear(size, size, bias=c["bias"])

    def forward(self, x: Tensor) -> Tensor:
        shared = self.heads // self.groups
        grouped = self.wqkv(x).unflatten(-1, (self.groups, shared + 2, -1))
        query = grouped[..., :shared, :].flatten(2, 3).transpose(1, 2)
        key, value = (
            grouped[..., member, :].repeat_interleave(shared, 2).transpose(1, 2)
            for member in (-2, -1)
        )
        query, key = turned(query, self.base), turned(key, self.base)
        out = scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.wo(out.transpose(1, 2).flatten(2))


class PlainAttention(nn.Module):
    """Qwen2's and Llama's."""

    def __init__(self, c: dict[str, Any], bias: bool) -> None:
        super().__init__()
        size, self.base, self.heads = c["hidden_size"], c["rope_theta"], c["num_attention_heads"]
        narrow = size // self.heads * c["num_key_value_heads"]
        self.q_proj = nn.Linear(size, size, bias=bias)
        self.k_proj = nn.Linear(size, narrow, bias=bias)
        self.v_proj = nn.Linear(size, narrow, bias=bias)
        self.o_proj = nn.Linear(size, size, bias=False)
        self.shared = self.heads // c["num_key_value_heads"]

    def forward(self, x: Tensor) -> Tensor:
        query = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = (
            layer(x).unflatten(-1, (self.heads // self.shared, -1)).transpose(1, 2)
            for layer in (self.k_proj, self.v_proj)
        )
        query, key = turned(query, self.base), turned(key, self.base)
        key, value = (y.repeat_interleave(self.shared, 1) for y in (key, value))
        out = scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


INTERNLM2_NAMES = (
    "tok_embeddings", "output", "attention", "feed_forward", "w1", "w3", "w2", "attention_norm",
    "ffn_norm",
)  # fmt: skip
PLAIN_NAMES = (
    "embed_tokens", "lm_head", "self_attn", "mlp", "gate_proj", "up_proj", "down_proj",
    "input_layernorm", "post_attention_layernorm",
)  # fmt: skip


class Language(nn.Module):
    """A decoder under InternLM2's or Qwen2's names."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        architecture = c["architectures"][0]
        fused = architecture == "InternLM2ForCausalLM"
        self.names = INTERNLM2_NAMES if fused else PLAIN_NAMES
        embed, head, attention, feed, gate, up, down, before, after = self.names
        size, wide = c["hidden_size"], c["intermediate_size"]

        def block() -> nn.ModuleDict:
            inner = {gate: (size, wide), up: (size, wide), down: (wide, size)}
            plain = PlainAttention(c, bias=architecture == "Qwen2ForCausalLM")
            return nn.ModuleDict(
                {
                    attention: FusedAttention(c) if fused else plain,
                    feed: nn.ModuleDict(
                        {name: nn.Linear(*shape, bias=False) for name, shape in inner.items()}
                    ),
                    before: Norm(size),
                    after: Norm(size),
                }
            )

        self.model = nn.ModuleDict(
            {
                embed: nn.Embedding(c["vocab_size"], size),
                "layers": nn.ModuleList(block() for _ in range(c["num_hidden_layers"])),
                "norm": Norm(size),
            }
        )
        self.add_module(head, nn.Linear(size, c["vocab_size"], bias=False))
        if c["tie_word_embeddings"]:
            self.get_submodule(head).weight = self.model[embed].weight

    def forward(self, x: Tensor) -> Tensor:
        _, head, attention, feed, gate, up, down, before, after = self.names
        for block in self.model["layers"]:
            x = x + block[attention](block[before](x))
            inner, y = block[feed], block[after](x)
            x = x + inner[down](silu(inner[gate](y)) * inner[up](y))
        return self.get_submodule(head)(self.model["norm"](x))


class Original(nn.Module):
    """The whole model, with weights that keep activations near unit size."""

    def __init__(self, c: dict[str, Any], seed: int = 0) -> None:
        super().__init__()
        vision, text = c["vision_config"]["hidden_size"], c["llm_config"]["hidden_size"]
        self.vision_model = Vision(c["vision_config"], c["select_layer"])
        self.language_model = Language(c["llm_config"])
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(4 * vision), nn.Linear(4 * vision, text), nn.GELU(), nn.Linear(text, text)
        )
        draw_weights(self, seed, spread=0.3)

    def forward(self, tokens: Tensor, pixels: Tensor, picture_token: int) -> Tensor:
        """Logits; the features of the tiles take the place of `picture_token`."""
        features = self.vision_model(pixels)
        side = int(features.shape[1] ** 0.5)
        # A square of 2 × 2 patches becomes one feature; the channels of a column come first.
        squares = features.unflatten(1, (side // 2, 2, side // 2, 2))
        features = self.mlp1(squares.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2))
        x = self.language_model.model[self.language_model.names[0]](tokens)
        x = x.masked_scatter((tokens == picture_token)[..., None], features)
        return self.language_model(x)


def save_original(
    folder: Path, content: dict[str, Any], *, dtype: torch.dtype = torch.float32, shards: int = 2
) -> Original:
    """Write the folder; return the model."""
    model = Original(content).eval()
    folder.mkdir(parents=True)
    tensors = {name: value.to(dtype) for name, value in model.state_dict().items()}
    if content["llm_config"]["tie_word_embeddings"]:
        del tensors[f"language_model.{model.language_model.names[1]}.weight"]
    files = {
        name: f"model-{number % shards + 1:05}-of-{shards:05}.safetensors"
        for number, name in enumerate(sorted(tensors))
    }
    for file in set(files.values()):
        save_file(
            {name: tensors[name].clone() for name in tensors if files[name] == file}, folder / file
        )
    write(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})
    write(folder / "config.json", content)
    for name in ("configuration_internvl_chat", "modeling_internvl_chat", "tokenization_internlm2"):
        (folder / f"{name}.py").write_text("raise SystemExit('remote code was run')\n")
    fused = content["llm_config"]["architectures"][0] != "Qwen2ForCausalLM"
    (save_sentencepiece if fused else save_qwen2_files)(folder)
    return model

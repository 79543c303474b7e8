"""A minimal Llama for training, with the names and arithmetic of ``LlamaForCausalLM``.

The caller gives the positions. Training relies on gaps between positions, which transformers' own class
interprets as borders between packed sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from rapid_integrations.demo.tokenizer import MAX_LENGTH, SPECIAL_TOKENS, build_vocabulary, save_tokenizer

NORM_EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """The sizes of one model."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_hidden_layers: int = 4
    head_dim: int = 32
    rope_theta: float = 1e9
    vocab_size: int = -(-len(build_vocabulary()) // 64) * 64


SHAPES = {
    "target": Shape(hidden_size=256, intermediate_size=640, num_attention_heads=8),
    "drafter": Shape(hidden_size=128, intermediate_size=320, num_attention_heads=4),
}


class RMSNorm(nn.Module):
    """Root-mean-square normalisation."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return functional.rms_norm(x, (x.shape[-1],), self.weight, NORM_EPS)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.num_attention_heads * shape.head_dim
        self.heads = (shape.num_attention_heads, shape.head_dim)
        self.q_proj = nn.Linear(shape.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map ``[batch, length, hidden]`` to the same shape."""
        batch, length, _ = x.shape
        query, key, value = (
            projection(x).view(batch, length, *self.heads).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query = query * cos + _rotate_half(query) * sin
        key = key * cos + _rotate_half(key) * sin
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Gated feed-forward layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., hidden]`` to the same shape."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention, then the feed-forward layer, each added to its input."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape)
        self.input_layernorm = RMSNorm(shape.hidden_size)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map ``[batch, length, hidden]`` to the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Body(nn.Module):
    """All layers except the output projection."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size)
        self.register_buffer("frequencies", rope_frequencies(shape), persistent=False)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Map ``[batch, length]`` token ids and positions to ``[batch, length, hidden]``."""
        angles = positions.float()[..., None] * self.get_buffer("frequencies")
        angles = torch.cat((angles, angles), -1)[:, None]
        x, cos, sin = self.embed_tokens(ids), angles.cos(), angles.sin()
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)  # type: ignore[no-any-return]


class TrainableLlama(nn.Module):
    """The trained model. ``save_for_transformers`` saves it as a ``LlamaForCausalLM``."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Body(shape)

    def logits(self, hidden: Tensor) -> Tensor:
        """Project hidden states onto the (tied) embeddings."""
        return functional.linear(hidden, self.model.embed_tokens.weight)


def rope_frequencies(shape: Shape) -> Tensor:
    """The ``head_dim / 2`` angular frequencies, fastest first."""
    return 1.0 / shape.rope_theta ** (torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)


def save_for_transformers(model: TrainableLlama, folder: Path) -> None:
    """Save the model in float16 and its tokenizer into ``folder``, for ``AutoModelForCausalLM``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = model.shape
    ids = {name: SPECIAL_TOKENS.index(f"<{name}>") for name in ("pad", "bos", "eos")}
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_attention_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=MAX_LENGTH,
        rms_norm_eps=NORM_EPS,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        pad_token_id=ids["pad"],
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
    )
    exported = LlamaForCausalLM(config)
    exported.load_state_dict(model.state_dict() | {"lm_head.weight": model.model.embed_tokens.weight})
    exported.half().save_pretrained(folder)  # type: ignore[no-untyped-call]  # untyped in transformers
    save_tokenizer(folder)


def load_from_transformers(model: TrainableLlama, folder: Path) -> None:
    """Load weights that ``save_for_transformers`` wrote, possibly for an earlier and smaller vocabulary.

    The embedding of a new piece starts as the mean of a random word's embedding and noise, scaled to the
    variance of the known embeddings. It is similar to words in general and to no word in particular.
    """
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    weights = load_file(folder / "model.safetensors")
    name = "model.embed_tokens.weight"
    num_earlier = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    vocabulary = build_vocabulary()
    words = [
        i for piece, i in vocabulary.items() if i < num_earlier and len(piece) > 2 and piece[1:].isalpha()
    ]
    embeddings = weights[name][:num_earlier].float()
    grown = embeddings.new_empty(model.shape.vocab_size, embeddings.shape[1])
    grown[:num_earlier] = embeddings
    choices = torch.randint(len(words), (len(grown) - num_earlier,))
    words_drawn = embeddings[torch.tensor(words)[choices]]
    grown[num_earlier:] = (words_drawn + torch.randn_like(words_drawn) * words_drawn.std()) * 0.5**0.5
    model.load_state_dict({**weights, name: grown})

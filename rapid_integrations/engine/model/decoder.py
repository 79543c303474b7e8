"""A forward pass in few calls: the decoder of the Llama family without transformers' modules.

For a small model, a pass over one token through transformers' modules takes several times as long as the
arithmetic, and a drafter reads one token at a time. :class:`LeanDecoder` calls the functions of the same
layers directly, on the model's own parameters.

A model is supported if its exact class and its parts are known. When a
:class:`~rapid_integrations.engine.model.causal_model.CausalModel` is created, its self-check compares the
results with the modelling code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from rapid_integrations.engine import onednn
from rapid_integrations.engine.model.linear import LinearGroup, LinearMap
from rapid_integrations.engine.model.quantized import Int8Linear

_CLASSES = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
# Positions whose rotary angles are computed at a time.
_BLOCK_POSITIONS = 512


class Batch(Protocol):
    """The sequences of a pass: :class:`PackedBatch`, or a recorded pass."""

    @property
    def all_wanted(self) -> bool:
        """Whether all new tokens need logits."""

    def select_wanted(self, tokens: Tensor) -> Tensor:
        """The rows of a tensor ``[tokens, …]`` that belong to tokens that need logits."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None,
        sliding_window: int | None,
    ) -> Tensor:
        """Write keys and values and attend, as :meth:`PackedBatch.attend`."""


class _Norm:
    """Root-mean-square normalisation over the last dimension.

    Args:
        module: The model's own.
    """

    def __init__(self, module: Any) -> None:
        self._weight: Tensor = module.weight
        self._eps = float(module.variance_epsilon)

    @classmethod
    def of(cls, module: Any) -> _Norm:
        return (_Float32Norm if onednn.supports(module.weight) else cls)(module)

    def __call__(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, self._weight.shape, self._weight, self._eps)


class _Float32Norm(_Norm):
    """The same as ``sqrt(d) x w / sqrt(|x|^2 + d eps)``, which takes half of the time on a CPU."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self._root = len(self._weight) ** 0.5
        self._min_length = torch.tensor(self._root * self._eps**0.5, dtype=torch.float32, device="cpu")
        self._zero = torch.zeros((), dtype=torch.float32, device="cpu")

    def __call__(self, hidden: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True).hypot_(self._min_length)
        return torch.addcdiv(self._zero, hidden * self._weight, length, value=self._root)


class _Layer:
    """One decoder layer's parts."""

    def __init__(self, layer: Any, index: int) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.index = index
        self.input_norm = _Norm.of(layer.input_layernorm)
        self.query_key_value = LinearGroup(attention.q_proj, attention.k_proj, attention.v_proj)
        self.query, self.key, self.value = self.query_key_value.parts
        self.output = LinearMap.of(attention.o_proj)
        # Qwen 3 normalises each head's queries and keys.
        self.query_norm = _Norm.of(attention.q_norm) if hasattr(attention, "q_norm") else None
        self.key_norm = _Norm.of(attention.k_norm) if hasattr(attention, "k_norm") else None
        self.head_dim = int(attention.head_dim)
        self.num_heads, self.num_kv_heads = (
            len(projection.weight) // self.head_dim for projection in (self.query, self.key)
        )
        self.scaling = float(attention.scaling)
        self.sliding_window = _sliding_window(attention)
        self.mlp_norm = _Norm.of(layer.post_attention_layernorm)
        self.gate_up = LinearGroup(mlp.gate_proj, mlp.up_proj)
        self.down = LinearMap.of(mlp.down_proj)
        # The bare function, because calling a module checks for hooks.
        self.activation: Callable[[Tensor], Tensor] = getattr(mlp.act_fn, "forward", mlp.act_fn)

    def __call__(self, hidden: Tensor, cos: Tensor, sin: Tensor, batch: Batch, *, last: bool) -> Tensor:
        """Run the layer. The last layer computes only keys and values for tokens that need no logits.

        Args:
            hidden: ``[tokens, hidden]``.
            cos: ``[tokens, 1, head_dim]``.
            sin: ``[tokens, 1, head_dim]``, with the signs of :class:`_RotaryTable`.
            batch: The sequences.
            last: Whether it is the model's last layer.

        Returns:
            ``[tokens, hidden]``; from the last layer only for the tokens that need logits.
        """
        normed = self.input_norm(hidden)
        if last and not batch.all_wanted:
            key = _rotate(_normed(self._heads(self.key(normed)), self.key_norm), cos, sin)
            value = self._heads(self.value(normed))
            hidden, normed, cos, sin = map(batch.select_wanted, (hidden, normed, cos, sin))
            query = _rotate(_normed(self._heads(self.query(normed)), self.query_norm), cos, sin)
        else:
            heads = self._heads(self.query_key_value.concatenated(normed))
            rotated, value = heads.tensor_split([self.num_heads + self.num_kv_heads], 1)
            if self.query_norm is not None:
                query, key = rotated.tensor_split([self.num_heads], 1)
                rotated = torch.cat([_normed(query, self.query_norm), _normed(key, self.key_norm)], 1)
            query, key = _rotate(rotated, cos, sin).tensor_split([self.num_heads], 1)
        attended = batch.attend(
            self.index,
            query.transpose(0, 1),
            key.transpose(0, 1),
            value.transpose(0, 1),
            scaling=self.scaling,
            sliding_window=self.sliding_window,
        )
        # In place, because page faults in newly allocated memory cost more than the arithmetic.
        hidden = self.output(attended.transpose(0, 1).flatten(1)).add_(hidden)
        gate, up = self.gate_up.separate(self.mlp_norm(hidden))
        return self.down(self.activation(gate).mul_(up)).add_(hidden)

    def _heads(self, projected: Tensor) -> Tensor:
        """``[tokens, heads * head_dim]`` to ``[tokens, heads, head_dim]``."""
        return projected.view(-1, projected.shape[1] // self.head_dim, self.head_dim)


class _RotaryTable:
    """The rotary angles of positions, computed in blocks when one of their positions is first needed.

    A prompt loaded from disk starts at a high position; computing the angles of all positions before it would
    take longer than its pass.

    Args:
        compute: The model's own rotary embedding.
        like: A tensor with the dtype and on the device of the angles.
    """

    def __init__(self, compute: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], like: Tensor) -> None:
        self._compute = compute
        self._like = like
        # [positions, 2, 1, head_dim]: cosines, and sines with the signs that _rotate needs.
        self._angles = like.new_empty(0)
        self._known: set[int] = set()

    def __call__(self, spans: Sequence[range]) -> tuple[Tensor, Tensor]:
        """Cosines and sines of ranges of positions, ``[positions, 1, head_dim]`` each."""
        for span in spans:
            for block in range(span.start // _BLOCK_POSITIONS, -(-span.stop // _BLOCK_POSITIONS)):
                if block not in self._known:
                    self._add(block)
        angles = [self._angles[span.start : span.stop] for span in spans]
        cos, sin = (angles[0] if len(angles) == 1 else torch.cat(angles)).unbind(1)
        return cos, sin

    def _add(self, block: int) -> None:
        span = slice(block * _BLOCK_POSITIONS, (block + 1) * _BLOCK_POSITIONS)
        positions = torch.arange(span.start, span.stop, device=self._like.device)[None]
        cos, sin = (table[0] for table in self._compute(self._like, positions))
        left, right = sin.chunk(2, -1)
        angles = torch.stack([cos, torch.cat([-left, right], -1)], 1)[:, :, None]
        size = self._angles.shape[0]
        if span.stop > size:
            grown = angles.new_empty(max(span.stop, 2 * size), *angles.shape[1:])
            if size:
                grown[:size] = self._angles
            self._angles = grown
        self._angles[span] = angles
        self._known.add(block)


class LeanDecoder:
    """A model's forward pass over a packed batch.

    Args:
        model: A supported model. Later changes of its parameters have effect, in place or by ``.data``;
            assigning another parameter or module to the model has none. Parameters of small layers may become
            views of common memory (:mod:`rapid_integrations.engine.model.linear`); ``save_pretrained`` saves
            them as before.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        decoder: Any = model.model
        self._embedding: Tensor = decoder.embed_tokens.weight
        self._layers = [_Layer(layer, index) for index, layer in enumerate(decoder.layers)]
        self._norm = _Norm.of(decoder.norm)
        self._head = LinearMap.of(model.lm_head)
        self._rotary = _RotaryTable(decoder.rotary_emb, self._embedding)

    @staticmethod
    def supports(model: PreTrainedModel) -> bool:
        """Whether the class is known, all is on one device, and no module is hooked, adapted or replaced."""
        if type(model) not in _CLASSES or len({parameter.device for parameter in model.parameters()}) > 1:
            return False
        for module in model.modules():
            if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
                return False
            # Adapters and bitsandbytes use subclasses of nn.Linear; torchao changes only the weight.
            if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
                return False
        projections = [
            projection
            for layer in model.model.layers
            for part in (layer.self_attn, layer.mlp)
            for name, projection in part.named_children()
            if name.endswith("_proj")
        ]
        return all(type(linear) in (nn.Linear, Int8Linear) for linear in [*projections, model.lm_head])

    def __call__(self, tokens: Tensor, spans: Sequence[range], batch: Batch) -> Tensor:
        """Compute logits and write keys and values.

        Args:
            tokens: ``[tokens]`` int64, of all sequences one after the other.
            spans: The positions of each sequence's tokens.
            batch: The sequences; the pass writes to their caches.

        Returns:
            ``[wanted, vocab]``: the logits after the tokens that need them.
        """
        return self.run(tokens, *self.angles(spans), batch)

    def angles(self, spans: Sequence[range]) -> tuple[Tensor, Tensor]:
        """Cosines and sines of ranges of positions, ``[positions, 1, head_dim]`` each."""
        return self._rotary(spans)

    def run(self, tokens: Tensor, cos: Tensor, sin: Tensor, batch: Batch) -> Tensor:
        """The same for tokens whose :meth:`angles` are given."""
        hidden = F.embedding(tokens, self._embedding)
        for layer in self._layers:
            hidden = layer(hidden, cos, sin, batch, last=layer is self._layers[-1])
        return self._head(self._norm(hidden))


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``[tokens, heads, head_dim]`` in the planes of dimensions ``i`` and ``i + head_dim / 2``."""
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), sin)


def _normed(heads: Tensor, norm: _Norm | None) -> Tensor:
    return heads if norm is None else norm(heads)


def _sliding_window(attention: Any) -> int | None:
    """A layer's window, read from where its modelling code reads it."""
    if hasattr(attention, "sliding_window"):  # Qwen has one for each layer
        window = attention.sliding_window
    else:  # Mistral has one for all layers; Llama has none
        window = getattr(attention.config, "sliding_window", None)
    return None if window is None else int(window)

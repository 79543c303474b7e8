"""The initial weights: ``initialise`` for the drafter, ``widen`` for the target.

``initialise`` sets the weights to an approximate copying circuit, and all weights are trained from there.
With a standard initialisation these models learn nothing in 500 steps, and learning to copy takes far longer
than the rest of the training. The first layers therefore start as training would leave them:

* Layer 0: each head attends to the token at a fixed offset of 1 to 4 before the current one, by its rotary
  positions and one constant embedding dimension. It writes that token into a separate subspace, rotated by a
  random orthogonal matrix.
* Layer 1: each head's query (the current token) matches the previous tokens that layer 0 wrote, on the
  slowest rotary frequencies, which hardly depend on the distance. The head copies the token at the matching
  position, which is the one that followed the current token earlier in the text.
* The attention of layers 2 and 3, and the feed-forward part of all layers, start with an output of zero.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rapid_integrations.demo.training.network import Attention, TrainableLlama, rope_frequencies

# The value of embedding dimension 0 of all tokens.
_CONSTANT = 5.0
# The number of rotary frequencies by which layer 0 distinguishes offsets.
_NUM_FAST = 5
# A frequency is slow if it turns by little more than one radian over this number of tokens.
_SLOW_DISTANCE = 16384


def initialise(model: TrainableLlama, seed: int, *, match_gain: float = 2.5, copy_gain: float = 4.0) -> None:
    """Set all weights of a model to the copying circuit.

    Args:
        model: The model. Its number of heads determines the offsets of layer 0.
        seed: The seed of the random matrices.
        match_gain: The scale of layer 1's query and key projections.
        copy_gain: The scale of layer 1's output projection.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        _initialise(model, generator, match_gain, copy_gain)


def _initialise(
    model: TrainableLlama, generator: torch.Generator, match_gain: float, copy_gain: float
) -> None:
    shape = model.shape
    hidden, head_dim, half = shape.hidden_size, shape.head_dim, shape.head_dim // 2
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, 0, parameter.shape[1] ** -0.5, generator=generator)
            if "o_proj" in name or "down_proj" in name:
                nn.init.zeros_(parameter)
    embeddings = model.model.embed_tokens.weight
    embeddings.normal_(0, 1.0, generator=generator)
    embeddings[:, 0] = _CONSTANT
    model.model.norm.weight.fill_(hidden**-0.5)

    offsets = [1, 1, 1, 1, 2, 2, 3, 4] if shape.num_attention_heads == 8 else [1, 1, 2, 3]
    values = _orthogonal(hidden, generator)
    values[:, 0] = 0
    # Heads with larger offsets reuse the projections of those with offset 1.
    first_far = offsets.index(2)
    values[first_far * head_dim :] = values[: hidden - first_far * head_dim].clone()

    attention = [_attention(model, i) for i in range(shape.num_hidden_layers)]
    written = _look_back(attention[0], offsets, values, rope_frequencies(shape), generator)

    frequencies = rope_frequencies(shape)
    slow = [i for i in range(half) if frequencies[i] * _SLOW_DISTANCE < 1.2]
    rows = torch.tensor(slow + [i + half for i in slow])
    near = [i for i in range(hidden) if offsets[i // head_dim] == 1]
    for number, layer in enumerate(attention[1:], 1):
        copied = _orthogonal(hidden, generator)
        copied[:, 0] = 0
        layer.v_proj.weight.copy_(copied)
        layer.o_proj.weight.copy_(copied.T * copy_gain)
        layer.q_proj.weight.mul_(0.3)
        layer.k_proj.weight.mul_(0.3)
        for head, offset in enumerate(offsets):
            block = slice(head * head_dim, (head + 1) * head_dim)
            if number > 1 or offset > 2:
                layer.o_proj.weight[:, block] = 0
                continue
            sketch = (_orthogonal(hidden, generator)[: len(rows)] @ values.T)[:, near]
            layer.q_proj.weight[head * head_dim + rows] += match_gain * sketch @ values[near]
            layer.k_proj.weight[head * head_dim + rows] += match_gain * sketch @ written.T[near]


def _look_back(
    layer: Attention, offsets: list[int], values: Tensor, frequencies: Tensor, generator: torch.Generator
) -> Tensor:
    """Make each head attend to the token at its offset, and return the output projection."""
    hidden, head_dim = values.shape[0], layer.heads[1]
    half = head_dim // 2
    rotations = {offset: _orthogonal(hidden, generator) for offset in sorted(set(offsets))}
    constant = _CONSTANT / ((hidden - 1 + _CONSTANT**2) / hidden) ** 0.5  # dimension 0 after normalisation
    gain = (8 / (0.5 * constant * constant / head_dim**0.5)) ** 0.5
    layer.q_proj.weight.mul_(0.1)
    layer.k_proj.weight.mul_(0.1)
    written = torch.zeros(hidden, hidden)
    for head, offset in enumerate(offsets):
        block = slice(head * head_dim, (head + 1) * head_dim)
        rotation = rotations[offset]
        rotation[0] = 0
        written[:, block] = rotation @ values[block].T
        for i in range(_NUM_FAST):
            angle = -offset * frequencies[i]
            row = head * head_dim + i
            layer.k_proj.weight[row, 0] = gain
            layer.q_proj.weight[row, 0] = gain * angle.cos()
            layer.q_proj.weight[row + half, 0] = gain * angle.sin()
    layer.v_proj.weight.copy_(values)
    layer.o_proj.weight.copy_(written)
    return written


def _attention(model: TrainableLlama, layer: int) -> Attention:
    module = model.get_submodule(f"model.layers.{layer}.self_attn")
    if not isinstance(module, Attention):
        raise TypeError(f"layer {layer} has {type(module).__name__} instead of Attention")
    return module


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    orthogonal: Tensor = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    return orthogonal


def widen(small: TrainableLlama, large: TrainableLlama, seed: int) -> None:
    """Initialise a model of twice the width with the function of a trained one (Net2Net, arXiv:1511.05641).

    ``large`` has two copies of each unit and head of ``small``. A weight that reads a doubled input is split
    into two random parts. The parts differ between copies, so that training can make the copies different.

    Args:
        small: The trained model.
        large: A model with twice the hidden size, intermediate size and number of heads.
        seed: The seed of the splits.

    Raises:
        ValueError: The shapes are not compatible.
    """
    old, new = small.shape, large.shape
    if (new.hidden_size, new.intermediate_size, new.num_attention_heads, new.num_hidden_layers) != (
        2 * old.hidden_size,
        2 * old.intermediate_size,
        2 * old.num_attention_heads,
        old.num_hidden_layers,
    ):
        raise ValueError(f"{new} must be twice as wide as {old}, with the same number of layers.")
    generator = torch.Generator().manual_seed(seed)
    weights = small.state_dict()
    with torch.no_grad():
        for name, parameter in large.named_parameters():
            source = weights[name]
            if source.dim() == 1:
                parameter.copy_(source.repeat(2))
            elif "embed" in name:
                parameter.copy_(source.repeat(1, 2))
            else:
                rows = source.repeat(2, 1)
                part = 0.5 + 0.25 * torch.randn(rows.shape, generator=generator)
                parameter.copy_(torch.cat((rows * part, rows * (1 - part)), 1))
        large.model.norm.weight.mul_(0.5)  # logits sum over twice as many dimensions

"""How training starts: the drafter from a copying circuit laid out by hand, the target from the drafter.

``initialise`` sets weights to an approximate copying circuit; then everything is trained.

From a standard initialisation these models learn nothing in 500 steps; the step from "no copying" to
"copying" takes far longer than all the rest of the training. So the first layers begin where training would
have led:

* Layer 0: each head looks a fixed number of tokens back (1 to 4; rotary positions and one constant embedding
  dimension make it so) and writes that token into a subspace of its own, rotated by a random orthogonal
  matrix.
* Layer 1: each head's query (the current token) matches the predecessor that layer 0 wrote, on the slowest
  rotary frequencies, which hardly depend on the distance; it copies the token it finds, which is the one that
  followed.
* Layers 2 and 3 begin with an output of zero in attention, all layers with one of zero in the feed-forward
  part.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rapid_integrations.demo.training.network import Attention, TrainableLlama, rope_frequencies

_CONSTANT = 5.0  # the value of embedding dimension 0 in every token
_NUM_FAST = 5  # rotary frequencies by which layer 0 tells offsets apart
_SLOW_REACH = 16384  # a frequency is slow if it turns by little more than one radian over this distance


def initialise(model: TrainableLlama, seed: int, *, match_gain: float = 2.5, copy_gain: float = 4.0) -> None:
    """Set all weights.

    Args:
        model: The model; its head count decides how many offsets layer 0 looks back.
        seed: Seed of the random matrices.
        match_gain: Scale of layer 1's query and key projections.
        copy_gain: Scale of layer 1's output projection.
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
    # Heads that look further back reuse the projections of those that look back by 1.
    first_far = offsets.index(2)
    values[first_far * head_dim :] = values[: hidden - first_far * head_dim].clone()

    attention = [_attention(model, i) for i in range(shape.num_hidden_layers)]
    written = _look_back(attention[0], offsets, values, rope_frequencies(shape), generator)

    frequencies = rope_frequencies(shape)
    slow = [i for i in range(half) if frequencies[i] * _SLOW_REACH < 1.2]
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
    """Make each head attend to the token ``offset`` places back; return the output projection."""
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
        raise TypeError(f"layer {layer} has no Attention but a {type(module).__name__}")
    return module


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    orthogonal: Tensor = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    return orthogonal


def widen(small: TrainableLlama, large: TrainableLlama, seed: int) -> None:
    """Start a model of twice the width with a trained one's function (Net2Net, arXiv:1511.05641).

    Every unit and head of ``small`` stands in ``large`` twice. A weight that reads a doubled input is split
    in two random parts; the parts differ between copies, so that training drives the copies apart.

    Args:
        small: The trained model.
        large: A model with twice the hidden and intermediate size and twice the heads.
        seed: Seed of the splits.

    Raises:
        ValueError: The shapes do not fit.
    """
    old, new = small.shape, large.shape
    if (new.hidden_size, new.intermediate_size, new.num_attention_heads, new.num_hidden_layers) != (
        2 * old.hidden_size,
        2 * old.intermediate_size,
        2 * old.num_attention_heads,
        old.num_hidden_layers,
    ):
        raise ValueError(f"{new} is not twice as wide as {old}, with as many layers; give shapes that fit.")
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
        large.model.norm.weight.mul_(0.5)  # the logits are sums over twice as many dimensions

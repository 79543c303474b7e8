"""The structured initial weights, and widening."""

import pytest
import torch

from rapid_integrations.demo.tokenizer import (
    SPECIAL_TOKENS,
)
from rapid_integrations.demo.training.initialisation import initialise, widen
from rapid_integrations.demo.training.network import (
    SHAPES,
    TrainableLlama,
)


def test_the_structured_start_attends_as_described() -> None:
    """Each of layer 0's heads attends most to the token its offset back."""
    model = TrainableLlama(SHAPES["target"])
    initialise(model, seed=1)
    ids = torch.randint(len(SPECIAL_TOKENS), 1300, (1, 64), generator=torch.Generator().manual_seed(0))
    layer = model.model.layers[0]
    x = layer.input_layernorm(model.model.embed_tokens(ids))
    angles = torch.arange(64).float()[:, None] * model.model.frequencies
    cos, sin = (torch.cat((f(angles), f(angles)), -1) for f in (torch.cos, torch.sin))

    def rotated(projection: torch.nn.Module) -> torch.Tensor:
        heads = projection(x).view(1, 64, 8, 32).transpose(1, 2)
        first, second = heads.chunk(2, -1)
        return heads * cos + torch.cat((-second, first), -1) * sin

    scores = rotated(layer.self_attn.q_proj) @ rotated(layer.self_attn.k_proj).mT
    looked_at = scores[0].masked_fill(torch.ones(64, 64).triu(1).bool(), -1e9).argmax(-1)
    for head, offset in enumerate([1, 1, 1, 1, 2, 2, 3, 4]):
        right = looked_at[head, 8:] == torch.arange(8, 64) - offset
        assert right.float().mean() > 0.9, (head, offset)


def test_a_widened_model_computes_the_same_with_different_copies() -> None:
    small, large = TrainableLlama(SHAPES["drafter"]), TrainableLlama(SHAPES["target"])
    initialise(small, seed=0)
    widen(small, large, seed=0)
    ids = torch.randint(0, 1300, (2, 50), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(50).expand(2, 50)
    with torch.no_grad():
        expected = small.logits(small.model(ids, positions))
        torch.testing.assert_close(large.logits(large.model(ids, positions)), expected, atol=2e-3, rtol=1e-3)
    query = large.get_parameter("model.layers.1.self_attn.q_proj.weight")
    assert not torch.allclose(query[:128], query[128:])
    with pytest.raises(ValueError, match="twice as wide"):
        widen(small, small, seed=0)

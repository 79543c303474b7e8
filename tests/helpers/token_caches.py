"""Caches that store their tokens as keys, and texts with common prefixes."""

from __future__ import annotations

import hypothesis.strategies as st
import torch

from rapid_integrations.engine.cache.sequence_kv import SequenceKV

TOKEN_BYTES = 8  # one head, one channel, keys and values in float32


def filled(tokens: list[int], capacity: int) -> SequenceKV:
    cache = SequenceKV(capacity)
    new = torch.tensor(tokens, dtype=torch.float32)[None, :, None]
    cache.write(0, new, -new)
    cache.length = len(tokens)
    return cache


def read(cache: SequenceKV) -> list[int]:
    """The tokens that a cache made by :func:`filled` holds."""
    keys, values = cache.write(0, torch.zeros(1, 0, 1), torch.zeros(1, 0, 1))
    assert torch.equal(keys, -values)
    return keys[0, :, 0].long().tolist()


def shared(left: list[int], right: list[int]) -> int:
    length = 0
    while length < min(len(left), len(right)) and left[length] == right[length]:
        length += 1
    return length


# Few different tokens in long runs, so that texts have prefixes in common.
texts = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 30)), min_size=1, max_size=4).map(
    lambda runs: [token for token, length in runs for _ in range(length)]
)

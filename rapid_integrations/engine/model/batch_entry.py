"""."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rapid_integrations.engine.cache.sequence_kv import SequenceKV

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True)
class Step:
    """One sequence's part in a forward pass.

    Attributes:
        cache: Its KV; advanced by the pass.
        tokens: The new tokens, at least one.
        num_logits: For how many of the last new tokens the logits are wanted.
    """

    cache: SequenceKV
    tokens: Sequence[int]
    num_logits: int = 1

"""One model's view of a request: all of its tokens, and a cache that holds the first of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rapid_integrations.engine.cache.sequence_kv import SequenceKV


@dataclass(slots=True)
class ModelState:
    """One model's view of a request.

    Attributes:
        tokens: Prompt and answer so far.
        cache: Keys and values of a prefix of them; during a round also of draft tokens.
    """

    tokens: list[int]
    cache: SequenceKV

    @property
    def unread(self) -> list[int]:
        """The tokens that are not in the cache yet."""
        return self.tokens[self.cache.length :]

    def unread_with(self, draft_tokens: Sequence[int]) -> list[int]:
        """The tokens and the draft tokens after them that are not in the cache yet."""
        num_draft_read = self.cache.length - len(self.tokens)
        return list(draft_tokens[num_draft_read:]) if num_draft_read >= 0 else [*self.unread, *draft_tokens]

    def drop_draft(self) -> None:
        """Remove draft tokens from the cache, and the last token, which the next pass reads."""
        self.cache.rollback(len(self.tokens) - 1)

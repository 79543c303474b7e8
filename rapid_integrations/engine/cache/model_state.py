"""."""

from __future__ import annotations

from dataclasses import dataclass

from rapid_integrations.engine.cache.sequence_kv import SequenceKV


@dataclass(slots=True)
class ModelState:
    """One model's view of a sequence.

    Attributes:
        tokens: Prompt and answer so far.
        cache: Holds a prefix of them.
    """

    tokens: list[int]
    cache: SequenceKV

    @property
    def unread(self) -> list[int]:
        """The tokens that are not in the cache yet."""
        return self.tokens[self.cache.length :]

    def unread_with(self, draft_tokens: list[int]) -> list[int]:
        """The tokens that are not in the cache yet, a draft behind them included."""
        beyond = self.cache.length - len(self.tokens)
        return draft_tokens[beyond:] if beyond >= 0 else self.unread + draft_tokens

    def settle(self) -> None:
        """Drop what a draft left in the cache, and keep the last token to be read."""
        self.cache.rollback(len(self.tokens) - 1)

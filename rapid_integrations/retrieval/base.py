"""What a retriever is: something that finds chunks of text for a question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of text that a retriever found.

    Attributes:
        text: The text, as the drafter is to read it.
        position: Its place among the document's chunks, or its character offset in the context; ``None`` when
            unknown.
        score: How well it fits the question, larger is better; ``None`` where the retriever does not say.
    """

    text: str
    position: int | None = None
    score: float | None = None


@runtime_checkable
class Retriever(Protocol):
    """Finds chunks for a question. Called from any thread, several at once."""

    @property
    def name(self) -> str:
        """What the stats call it."""
        ...

    @property
    def scores_are_cosine(self) -> bool:
        """Scores are cosine similarities, so that a threshold has a meaning across questions."""
        ...

    def retrieve(self, query: str, context: str, *, max_tokens: int) -> Sequence[Chunk]:
        """Find chunks for ``query``.

        Args:
            query: The question.
            context: The prompt's document; ``""`` in a prompt without one. A retriever over a corpus of its
                own may ignore it.
            max_tokens: How many drafter tokens of chunks will be used at most.

        Returns:
            Chunks, best first.
        """
        ...

"""The interface of retrievers, which find chunks of text for a question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class Chunk:
    """A retrieved piece of text.

    Attributes:
        text: The text, as the drafter reads it.
        position: Its index among the document's chunks, or its character offset in the context; ``None`` if
            unknown.
        score: Relevance to the question, larger is better; ``None`` if the retriever gives none.
    """

    text: str
    position: int | None = None
    score: float | None = None


@runtime_checkable
class Retriever(Protocol):
    """Finds chunks for a question. Called from any thread, also concurrently."""

    @property
    def name(self) -> str:
        """The name in the statistics."""
        ...

    @property
    def scores_are_cosine(self) -> bool:
        """Whether scores are cosine similarities, for which a threshold is meaningful across questions."""
        ...

    def retrieve(self, query: str, context: str, *, max_tokens: int) -> Sequence[Chunk]:
        """Find chunks for ``query``.

        Args:
            query: The question.
            context: The prompt's document; ``""`` in a prompt without one. A retriever with a corpus of its
                own may ignore it.
            max_tokens: Upper limit on the drafter tokens of chunks that will be used.

        Returns:
            Chunks, best first.
        """
        ...

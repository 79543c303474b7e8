"""Which of a host's own documents or nodes the drafter read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rapid_integrations.engine.stats import RetrievedChunk
from rapid_integrations.retrieval.base import Chunk
from rapid_integrations.retrieval.hosts import read_chunks


class SourceRecorder:
    """A host's search for one question, as a retriever that remembers the host's own objects.

    Args:
        name: What the stats call it.
        search: From a query to what the host finds: documents, nodes, or anything a chunk may be.
    """

    scores_are_cosine = False

    def __init__(self, name: str, search: Callable[[str], Any]) -> None:
        self.name = name
        self._search = search
        self._found: list[tuple[str, Any]] = []

    def retrieve(self, query: str, context: str, *, max_tokens: int) -> Sequence[Chunk]:
        """Ask the host.

        Raises:
            RetrievalError: It returned something that is not a sequence of chunks.
        """
        found = self._search(query)
        chunks = read_chunks(found, self.name)
        # A generator is used up by now, and a lone string is no sequence of items.
        items = found if isinstance(found, (list, tuple)) else chunks
        self._found = [(chunk.text.strip(), item) for chunk, item in zip(chunks, items, strict=True)]
        return chunks

    def item(self, chunk: RetrievedChunk) -> Any | None:
        """The host's object whose text the drafter read; ``None`` for text that the host did not find."""
        for text, item in self._found:
            if text == chunk.text:
                return item
        # The best one is cut where it is larger than the whole budget.
        return next((item for text, item in self._found if text.startswith(chunk.text)), None)

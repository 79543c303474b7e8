"""The sources of an answer: which of a framework's own documents or nodes the drafter's context came from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rapid_integrations.engine.stats import RetrievedChunk
from rapid_integrations.retrieval.adapters import read_chunks
from rapid_integrations.retrieval.base import Chunk


class SourceRecorder:
    """A retriever for one question that remembers the framework's objects behind its chunks.

    Args:
        name: The retriever's name in the statistics.
        search: A function from a query to documents, nodes, or other objects that can be read as chunks.
    """

    scores_are_cosine = False

    def __init__(self, name: str, search: Callable[[str], Any]) -> None:
        self.name = name
        self._search = search
        self._items: list[tuple[str, Any]] = []

    def retrieve(self, query: str, context: str, *, max_tokens: int) -> Sequence[Chunk]:
        """Search with the framework's retriever.

        Raises:
            RetrievalError: The result is not a sequence of chunks.
        """
        result = self._search(query)
        chunks = read_chunks(result, self.name)
        # read_chunks has consumed a generator, and a single string is one chunk: use the chunks themselves.
        items = result if isinstance(result, (list, tuple)) else chunks
        self._items = [(chunk.text.strip(), item) for chunk, item in zip(chunks, items, strict=True)]
        return chunks

    def item(self, chunk: RetrievedChunk) -> Any | None:
        """The framework's object with the text of ``chunk``; ``None`` if the search did not find it."""
        for text, item in self._items:
            if text == chunk.text:
                return item
        # The best chunk is cut if it is longer than the whole retrieval budget.
        return next((item for text, item in self._items if text.startswith(chunk.text)), None)

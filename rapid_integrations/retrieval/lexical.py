"""Ranking a document's chunks by BM25, which needs no model and no download."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import bm25s
import numpy as np

from rapid_integrations.retrieval.base import Chunk

# Chinese and Japanese have no spaces between words: each character counts as a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")

# bm25s logs every index that it builds.
logging.getLogger("bm25s").setLevel(logging.WARNING)


def words(text: str) -> list[str]:
    """The lower-cased words of a text, and its Chinese and Japanese characters."""
    return _WORD.findall(text.lower())


class LexicalIndex:
    """Ranks chunks by BM25 (Lucene's variant, ``k1 = 1.5``, ``b = 0.75``), without stemming or stop words.

    Args:
        chunks: The chunks to search.
    """

    name = "bm25"
    scores_are_cosine = False

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        tokens = [words(chunk.text) for chunk in chunks]
        self._chunks = [chunk for chunk, found in zip(chunks, tokens, strict=True) if found]
        self._index: bm25s.BM25 | None = None
        if self._chunks:
            self._index = bm25s.BM25()
            self._index.index([found for found in tokens if found], show_progress=False)

    def retrieve(self, query: str, context: str = "", *, max_tokens: int = 0) -> list[Chunk]:
        """Chunks that share a word with ``query``, best first; ties in document order."""
        query_words = words(query)
        if self._index is None or not query_words:
            return []
        scores = np.asarray(self._index.get_scores(query_words))
        order = np.argsort(-scores, kind="stable")
        return [
            Chunk(self._chunks[i].text, self._chunks[i].position, float(scores[i]))
            for i in order.tolist()
            if scores[i] > 0
        ]

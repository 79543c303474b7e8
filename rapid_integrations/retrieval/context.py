"""The drafter's context: from a question and a document to the chunks that the drafter reads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rapid_integrations.config import RetrievalParams
from rapid_integrations.engine.stats import RetrievedChunk
from rapid_integrations.retrieval.base import Chunk, Retriever
from rapid_integrations.retrieval.deadline import MAX_ABANDONED, Deadline, TimedOutError, TooManyError
from rapid_integrations.retrieval.documents import Document, DocumentCache
from rapid_integrations.tokenization.encoding import encode_plain, token_offsets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COSINE_THRESHOLD = 0.3
"""Minimum score of the built-in dense index (arXiv:2502.20330 §4.1)."""

_SEPARATOR = "\n\n"
# The budget counts as used up after so many chunks in a row that do not fit.
_MAX_MISFITS = 8


@dataclass(frozen=True, slots=True)
class RetrievedContext:
    """The drafter's context for one question.

    Attributes:
        text: The text; ``""`` if there is none.
        chunks: The chunks of the text, in its order.
        retriever: The name of the retriever: ``"bm25"``, ``"dense"``, the host's class; ``"context"`` if the
            whole context fits into the budget; ``""`` if there was nothing to retrieve from.
        fallback: The reason, in one line, why ``text`` is the context's start and end (or empty); ``None`` if
            it is not.
        seconds: Wall time of the retrieval.
    """

    text: str
    chunks: tuple[RetrievedChunk, ...]
    retriever: str
    fallback: str | None
    seconds: float


class DrafterContext:
    """Finds the drafter's context for a question. Usable from any thread.

    Args:
        tokenizer: The drafter's tokenizer; all budgets are in its tokens.
        retriever: Finds the chunks. ``None`` cuts the prompt's context into chunks and ranks them: by
            embeddings if ``embeddings`` are given, else by BM25. The indexes of the last few documents are
            kept.
        embeddings: Any embeddings that :func:`~rapid_integrations.retrieval.embedding.as_embedder` takes.

    Raises:
        ConfigurationError: The type of ``embeddings`` is not supported.
    """

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase,
        retriever: Retriever | None = None,
        embeddings: Any = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._retriever = retriever
        self._built_in = "bm25" if embeddings is None else "dense"
        self._documents = DocumentCache(tokenizer, _index_builder(embeddings))
        self._separator_tokens = len(encode_plain(_SEPARATOR, tokenizer))
        self._deadline = Deadline()

    @property
    def name(self) -> str:
        """The name of the default retriever: ``"bm25"``, ``"dense"`` or the given retriever's."""
        return self._built_in if self._retriever is None else self._retriever.name

    def find(
        self, query: str, context: str, params: RetrievalParams, *, retriever: Retriever | None = None
    ) -> RetrievedContext:
        """Find the chunks that the drafter reads.

        The budget is filled with the best chunks, which are then put in document order. Chunks that the
        context does not contain come last. If the retriever fails, takes longer than ``params.timeout_s`` or
        finds nothing, the context's start and end are used instead, and ``fallback`` gives the reason.

        Args:
            query: The question.
            context: The prompt's document; ``""`` if it has none. The drafter's context then consists of the
                retriever's chunks only.
            params: Budget, threshold, time limit.
            retriever: Replaces the constructor's retriever for this question.
        """
        started = time.perf_counter()
        chosen = retriever if retriever is not None else self._retriever
        document = self._documents.get(context, params.chunk_tokens)
        budget = params.budget(document.num_tokens)
        name = chosen.name if chosen is not None else self._built_in
        chunks: list[RetrievedChunk] = []
        fallback: str | None = None
        if chosen is None and not context.strip():
            name = ""
        elif chosen is None and document.num_tokens <= budget:
            name, chunks = "context", [RetrievedChunk(context, 0)]
        elif not query.strip():
            fallback = "the prompt has no question to retrieve with"
        else:
            chunks, fallback = self._ask(chosen, query.strip(), document, params, budget)
        if fallback is not None:
            chunks = [RetrievedChunk(c.text, c.position) for c in document.head_and_tail(budget)]
        return RetrievedContext(
            text=_SEPARATOR.join(chunk.text for chunk in chunks),
            chunks=tuple(chunks),
            retriever=name,
            fallback=fallback,
            seconds=time.perf_counter() - started,
        )

    def _ask(
        self,
        chosen: Retriever | None,
        query: str,
        document: Document,
        params: RetrievalParams,
        budget: int,
    ) -> tuple[list[RetrievedChunk], str | None]:
        """Call the retriever; returns chunks in document order, or no chunks and the reason."""
        name = chosen.name if chosen is not None else self._built_in

        def ask() -> list[RetrievedChunk]:
            source = chosen if chosen is not None else document.index()
            ranked = source.retrieve(query, document.text, max_tokens=budget)
            min_score = params.min_score
            if min_score is None and chosen is None and source.scores_are_cosine:
                min_score = COSINE_THRESHOLD
            good = (c for c in ranked if min_score is None or c.score is None or c.score >= min_score)
            selected = self._fit(good, budget)
            # The built-in index numbers its chunks; the position of a host's chunk is searched for.
            return _in_document_order(selected if chosen is None else _locate(selected, document.text))

        try:
            chunks = self._deadline.run(ask, params.timeout_s)
        except TimedOutError:
            return [], f"{name} took longer than {params.timeout_s:g} s"
        except TooManyError:
            return [], f"{name} was not asked: {MAX_ABANDONED} earlier calls are still running"
        except Exception as error:  # a host's retriever may raise any error
            return [], f"{name} failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return chunks, None if chunks else f"{name} found nothing"

    def _fit(self, ranked: Iterable[Chunk], budget: int) -> list[Chunk]:
        """The best chunks that fit into ``budget`` together, each once; the first is cut if necessary."""
        taken: list[Chunk] = []
        seen: set[str] = set()
        left = budget
        misfits = 0
        for chunk in ranked:
            text = chunk.text.strip()
            if not text or text in seen:
                continue
            seen.add(text)
            cost = len(encode_plain(text, self._tokenizer)) + (self._separator_tokens if taken else 0)
            if cost > left and not taken:
                text, cost = self._cut(text, budget), left
            if cost <= left and text:
                taken.append(Chunk(text, chunk.position, chunk.score))
                left -= cost
                misfits = 0
            else:
                misfits += 1
            if left <= self._separator_tokens or misfits >= _MAX_MISFITS:
                break
        return taken

    def _cut(self, text: str, max_tokens: int) -> str:
        starts = token_offsets(text, self._tokenizer)
        keep = min(max_tokens, len(starts) - 1)
        # The cut text may be tokenized differently from the same text inside the whole.
        while keep > 1 and len(encode_plain(text[: starts[keep]], self._tokenizer)) > max_tokens:
            keep -= 1
        return text[: max(starts[keep], 1)] if starts else ""


def _locate(chunks: Sequence[Chunk], context: str) -> list[Chunk]:
    """Set each chunk's position to its offset in ``context``; ``None`` if it does not occur there."""
    offsets = [context.find(chunk.text) for chunk in chunks]
    return [
        Chunk(chunk.text, offset if offset >= 0 else None, chunk.score)
        for chunk, offset in zip(chunks, offsets, strict=True)
    ]


def _in_document_order(chunks: Sequence[Chunk]) -> list[RetrievedChunk]:
    ordered = sorted(chunks, key=lambda c: (c.position is None, c.position or 0))
    return [RetrievedChunk(c.text, c.position, c.score) for c in ordered]


def _index_builder(embeddings: Any) -> Callable[[Sequence[Chunk]], Retriever]:
    if embeddings is None:

        def lexical(chunks: Sequence[Chunk]) -> Retriever:
            from rapid_integrations.retrieval.lexical import LexicalIndex

            return LexicalIndex(chunks)

        return lexical

    from rapid_integrations.retrieval.embedding import as_embedder

    embedder = as_embedder(embeddings)

    def dense(chunks: Sequence[Chunk]) -> Retriever:
        from rapid_integrations.retrieval.dense import DenseIndex

        return DenseIndex(chunks, embedder)

    return dense

"""What the drafter gets to read: what a retriever finds, or retrieval made good or bad on purpose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from rapid_integrations.config import RetrievalParams
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation.tasks.task import Task, TaskQuestion
from rapid_integrations.pipeline import RapidPipeline
from rapid_integrations.retrieval import Chunk, DrafterContext, RetrievedContext
from rapid_integrations.retrieval.chunking import cut_into_chunks
from rapid_integrations.retrieval.lexical import LexicalIndex
from rapid_integrations.tokenization.encoding import encode_plain, token_offsets

RetrievalQuality = Literal["natural", "gold", "missing", "unrelated", "adversarial"]
RETRIEVAL_QUALITIES: tuple[str, ...] = get_args(RetrievalQuality)
RetrieverName = Literal["bm25", "dense"]
RETRIEVERS: tuple[str, ...] = get_args(RetrieverName)


@dataclass(frozen=True, slots=True)
class GivenChunks:
    """A retriever that always finds the same chunks.

    Attributes:
        chunks: What it finds, best first.
        name: What the stats call it.
        scores_are_cosine: Always false.
    """

    chunks: tuple[Chunk, ...]
    name: str
    scores_are_cosine: bool = False

    @classmethod
    def of(cls, retrieved: RetrievedContext) -> GivenChunks:
        """One that finds again what was found."""
        return cls(tuple(Chunk(c.text, c.position, c.score) for c in retrieved.chunks), retrieved.retriever)

    def retrieve(self, query: str, context: str, *, max_tokens: int) -> Sequence[Chunk]:
        """The chunks, whatever is asked."""
        return self.chunks


@dataclass(frozen=True, slots=True)
class Found:
    """What was retrieved for one question.

    Attributes:
        retrieved: The drafter's context and its chunks.
        max_tokens: The budget it was found with, in the drafter's tokens.
        holds_evidence: Whether all of the evidence is in it; ``None`` where the task does not name any.
    """

    retrieved: RetrievedContext
    max_tokens: int
    holds_evidence: bool | None


class TaskRetrieval:
    """Retrieves for a task's questions with a chosen quality.

    ``"natural"`` asks the pipeline's own retriever. The others cut the document into chunks as the built-in
    index does and rank them by BM25: ``"gold"`` puts the chunks that hold evidence first and raises the
    budget where they need more, ``"missing"`` leaves them out, ``"adversarial"`` puts the question's
    contradiction in their place, ``"unrelated"`` takes another document's.

    Args:
        pipeline: Whose tokenizer and retriever to use.
        params: Budget, chunk length and the like.
        quality: How good the retrieval is.
        retriever: How ``"natural"`` retrieval ranks chunks of the document instead: by BM25, or densely by
            the pipeline's embedding model.

    Raises:
        ConfigurationError: The quality or the retriever is unknown, or the pipeline has no embedding model.
    """

    def __init__(
        self,
        pipeline: RapidPipeline,
        params: RetrievalParams,
        quality: RetrievalQuality,
        retriever: RetrieverName | None = None,
    ) -> None:
        if quality not in RETRIEVAL_QUALITIES:
            raise ConfigurationError(
                f"retrieval={quality!r} is not allowed: it is one of {', '.join(RETRIEVAL_QUALITIES)}."
            )
        self._tokenizer = pipeline.tokenizer
        self._params = params
        self._quality = quality
        self._built_in = DrafterContext(tokenizer=pipeline.tokenizer)
        # Else the very object that finds the drafter's context when the pipeline answers by itself.
        self._natural = self._built_in if retriever == "bm25" else pipeline.drafter_context
        if retriever not in (None, *RETRIEVERS):
            raise ConfigurationError(
                f"retriever={retriever!r} is not allowed: it is one of {', '.join(RETRIEVERS)}."
            )
        if retriever == "dense" and self._natural.name != "dense":
            raise ConfigurationError(
                "retriever='dense' ranks passages by an embedding model, but the pipeline retrieves by "
                f"{self._natural.name}: make it with embeddings, or leave 'dense' out."
            )

    def find(self, task: Task, question: TaskQuestion) -> Found:
        """Retrieve for one question.

        Raises:
            ConfigurationError: The task does not say what this quality needs: the evidence, what contradicts
                it, or another document.
        """
        token_starts = token_offsets(task.document, self._tokenizer)
        budget = self._params.budget(len(token_starts))
        if self._quality == "natural":
            retrieved = self._natural.find(question.question, task.document, self._with_budget(budget))
            return Found(retrieved, budget, holds_evidence(retrieved, task, question))
        if self._quality == "unrelated":
            if task.other_document is None:
                raise ConfigurationError(
                    "retrieval='unrelated' takes chunks of another document: give every task an "
                    "other_document."
                )
            retrieved = self._built_in.find(question.question, task.other_document, self._with_budget(budget))
            return Found(retrieved, budget, holds_evidence(retrieved, task, question))
        if not question.evidence:
            raise ConfigurationError(
                f"retrieval={self._quality!r} must know where the answer stands, but the question "
                f"{question.question!r} has no evidence."
            )
        if self._quality == "adversarial" and not question.contradiction:
            raise ConfigurationError(
                "retrieval='adversarial' takes a passage that says otherwise than the document, but the "
                f"question {question.question!r} has no contradiction."
            )
        chunks = cut_into_chunks(task.document, token_starts, self._params.chunk_tokens)
        gold, rest = _part(chunks, question)
        ranked = _rank(rest, question.question)
        wanted = {"gold": gold, "adversarial": [Chunk(question.contradiction)]}.get(self._quality, [])
        if wanted:
            separators = len(wanted) * len(encode_plain("\n\n", self._tokenizer))
            needed = sum(len(encode_plain(chunk.text.strip(), self._tokenizer)) for chunk in wanted)
            budget = max(budget, needed + separators)
            ranked = [*wanted, *ranked]
        elif not ranked:
            raise ConfigurationError(
                "retrieval='missing' leaves nothing of a document whose every chunk holds evidence: take "
                "longer documents or a smaller retrieval_chunk_tokens."
            )
        retrieved = self._built_in.find(
            question.question,
            task.document,
            self._with_budget(budget),
            retriever=GivenChunks(tuple(ranked), self._quality),
        )
        return Found(retrieved, budget, holds_evidence(retrieved, task, question))

    def _with_budget(self, budget: int) -> RetrievalParams:
        params = self._params
        return RetrievalParams(
            chunk_tokens=params.chunk_tokens,
            max_tokens=budget,
            min_score=params.min_score,
            timeout_s=params.timeout_s,
        )


def holds_evidence(retrieved: RetrievedContext, task: Task, question: TaskQuestion) -> bool | None:
    """Whether a question's whole evidence was retrieved; ``None`` where the task does not name any."""
    if not question.evidence:
        return None
    text = " ".join(retrieved.text.split())
    return all(" ".join(task.document[a:b].split()) in text for a, b in question.evidence)


def _part(chunks: Sequence[Chunk], question: TaskQuestion) -> tuple[list[Chunk], list[Chunk]]:
    """The chunks that hold a part of the evidence, and the others."""
    gold: list[Chunk] = []
    rest: list[Chunk] = []
    start = 0
    for chunk in chunks:
        end = start + len(chunk.text)
        overlaps = any(a < end and b > start for a, b in question.evidence)
        (gold if overlaps else rest).append(chunk)
        start = end
    return gold, rest


def _rank(chunks: Sequence[Chunk], query: str) -> list[Chunk]:
    """The chunks by BM25, those that share no word with the query last."""
    found = LexicalIndex(chunks).retrieve(query)
    positions = {chunk.position for chunk in found}
    # Without scores: a threshold is for what a retriever found by itself.
    ranked = [Chunk(chunk.text, chunk.position) for chunk in found]
    return ranked + [Chunk(c.text, c.position) for c in chunks if c.position not in positions]

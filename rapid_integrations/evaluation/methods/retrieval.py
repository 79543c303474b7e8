"""The passages that the drafter reads: found by a retriever, or made good or bad on purpose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from rapid_integrations.config import RetrievalParams
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation.tasks.retrieval_quality import RETRIEVAL_QUALITIES, RetrievalQuality
from rapid_integrations.evaluation.tasks.task import Task, TaskQuestion
from rapid_integrations.pipeline import RapidPipeline
from rapid_integrations.retrieval import Chunk, DrafterContext, RetrievedContext
from rapid_integrations.retrieval.chunking import cut_into_chunks
from rapid_integrations.retrieval.lexical import LexicalIndex
from rapid_integrations.tokenization.encoding import encode_plain, token_offsets

RetrieverName = Literal["bm25", "dense"]
RETRIEVERS: tuple[str, ...] = get_args(RetrieverName)


@dataclass(frozen=True, slots=True)
class GivenChunks:
    """A retriever that always finds the same chunks.

    Attributes:
        chunks: The chunks, best first.
        name: The retriever's name in the stats.
        scores_are_cosine: Always false.
    """

    chunks: tuple[Chunk, ...]
    name: str
    scores_are_cosine: bool = False

    @classmethod
    def of(cls, retrieved: RetrievedContext) -> GivenChunks:
        """Make a retriever that finds the chunks of an earlier retrieval."""
        return cls(tuple(Chunk(c.text, c.position, c.score) for c in retrieved.chunks), retrieved.retriever)

    def retrieve(self, query: str, context: str, *, max_tokens: int) -> Sequence[Chunk]:
        """The chunks, for any query."""
        return self.chunks


@dataclass(frozen=True, slots=True)
class FoundContext:
    """The context retrieved for one question.

    Attributes:
        retrieved: The drafter's context and its chunks.
        max_tokens: The token budget of the retrieval.
        holds_evidence: Whether the context has the whole evidence; ``None`` if the task names none.
    """

    retrieved: RetrievedContext
    max_tokens: int
    holds_evidence: bool | None


class TaskRetrieval:
    """Retrieves for a task's questions with a given quality.

    ``"natural"`` uses the pipeline's own retriever. The other qualities split the document into chunks as the
    built-in index does, and rank them by BM25. ``"gold"`` puts the chunks with evidence first, and raises the
    budget if they need more tokens. ``"missing"`` leaves them out. ``"adversarial"`` replaces them by the
    question's contradiction. ``"unrelated"`` uses the chunks of another document.

    Args:
        pipeline: The pipeline with the tokenizer and the retriever.
        params: The budget and the chunk length.
        quality: The quality of retrieval.
        retriever: The retriever of ``"natural"`` retrieval: BM25, or the pipeline's embedding model;
            ``None`` is the pipeline's own.

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
        # By default the same object as in the pipeline's normal operation.
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

    def find(self, task: Task, question: TaskQuestion) -> FoundContext:
        """Retrieve for one question.

        Raises:
            ConfigurationError: The task lacks data that this quality needs: the evidence, a contradiction, or
                another document.
        """
        token_starts = token_offsets(task.document, self._tokenizer)
        budget = self._params.budget(len(token_starts))
        if self._quality == "natural":
            retrieved = self._natural.find(question.question, task.document, self._with_budget(budget))
            return FoundContext(retrieved, budget, holds_evidence(retrieved, task, question))
        if self._quality == "unrelated":
            if task.other_document is None:
                raise ConfigurationError(
                    "retrieval='unrelated' uses chunks of another document: give every task an "
                    "other_document."
                )
            retrieved = self._built_in.find(question.question, task.other_document, self._with_budget(budget))
            return FoundContext(retrieved, budget, holds_evidence(retrieved, task, question))
        if not question.evidence:
            raise ConfigurationError(
                f"retrieval={self._quality!r} needs the position of the answer, but the question "
                f"{question.question!r} has no evidence."
            )
        if self._quality == "adversarial" and not question.contradiction:
            raise ConfigurationError(
                "retrieval='adversarial' needs a passage that contradicts the document, but the "
                f"question {question.question!r} has no contradiction."
            )
        chunks = cut_into_chunks(task.document, token_starts, self._params.chunk_tokens)
        gold, rest = _split_by_evidence(chunks, question)
        ranked = _rank(rest, question.question)
        wanted = {"gold": gold, "adversarial": [Chunk(question.contradiction)]}.get(self._quality, [])
        if wanted:
            separators = len(wanted) * len(encode_plain("\n\n", self._tokenizer))
            needed = sum(len(encode_plain(chunk.text.strip(), self._tokenizer)) for chunk in wanted)
            budget = max(budget, needed + separators)
            ranked = [*wanted, *ranked]
        elif not ranked:
            raise ConfigurationError(
                "retrieval='missing' leaves no chunk, because every chunk of the document has evidence: use "
                "longer documents or a smaller retrieval_chunk_tokens."
            )
        retrieved = self._built_in.find(
            question.question,
            task.document,
            self._with_budget(budget),
            retriever=GivenChunks(tuple(ranked), self._quality),
        )
        return FoundContext(retrieved, budget, holds_evidence(retrieved, task, question))

    def _with_budget(self, budget: int) -> RetrievalParams:
        params = self._params
        return RetrievalParams(
            chunk_tokens=params.chunk_tokens,
            max_tokens=budget,
            min_score=params.min_score,
            timeout_s=params.timeout_s,
        )


def holds_evidence(retrieved: RetrievedContext, task: Task, question: TaskQuestion) -> bool | None:
    """Whether a question's whole evidence was retrieved; ``None`` if the task names none."""
    if not question.evidence:
        return None
    text = " ".join(retrieved.text.split())
    return all(" ".join(task.document[a:b].split()) in text for a, b in question.evidence)


def _split_by_evidence(chunks: Sequence[Chunk], question: TaskQuestion) -> tuple[list[Chunk], list[Chunk]]:
    """The chunks that overlap the evidence, and the others."""
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
    """The chunks ranked by BM25. Those without a word of the query come last."""
    found = LexicalIndex(chunks).retrieve(query)
    positions = {chunk.position for chunk in found}
    # Without scores, because a score threshold applies only to natural retrieval.
    ranked = [Chunk(chunk.text, chunk.position) for chunk in found]
    return ranked + [Chunk(c.text, c.position) for c in chunks if c.position not in positions]

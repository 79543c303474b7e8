"""LlamaIndex events of an answer: the retrieved context, the prefill, the finished answer.

Each event carries the span id of its LLM call, and reaches every handler of LlamaIndex's root dispatcher.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.span import active_span_id
from llama_index_instrumentation import get_dispatcher

from rapid_integrations.events import Completion, PrefillProgress, TextEvent
from rapid_integrations.retrieval import RetrievedContext

_dispatcher = get_dispatcher(__name__)


class RapidRetrievalEvent(BaseEvent):
    """The drafter's context was found.

    Attributes:
        retriever: The name of the retriever.
        fallback: The reason why the drafter reads the context's start and end instead; ``None`` if it does
            not.
        seconds: Wall time of the retrieval.
        chunks: The chunks that the drafter reads, as dicts with text, position and score.
    """

    retriever: str
    fallback: str | None
    seconds: float
    chunks: list[dict[str, Any]]

    @classmethod
    def class_name(cls) -> str:
        """LlamaIndex's name for the class."""
        return "RapidRetrievalEvent"


class RapidPrefillEvent(BaseEvent):
    """Both models have read their prompts.

    Attributes:
        read_tokens: Prompt tokens that target and drafter read for this request, without reused prefixes.
        seconds: Wall time since the drafter's context was found, or since the call if nothing is drafted.
    """

    read_tokens: int
    seconds: float

    @classmethod
    def class_name(cls) -> str:
        """LlamaIndex's name for the class."""
        return "RapidPrefillEvent"


class RapidDecodeEvent(BaseEvent):
    """The answer is complete.

    Attributes:
        finish_reason: ``"stop"`` or ``"length"``.
        stats: :meth:`~rapid_integrations.RapidStats.as_dict`.
    """

    finish_reason: str
    stats: dict[str, Any]

    @classmethod
    def class_name(cls) -> str:
        """LlamaIndex's name for the class."""
        return "RapidDecodeEvent"


class EventReporter:
    """Turns the pipeline's events of one answer into LlamaIndex's. Made inside the span of the LLM call.

    Args:
        also: Called with the pipeline's events too.
    """

    def __init__(self, also: Callable[[TextEvent], None] | None = None) -> None:
        self._also = also
        self._span_id = active_span_id.get()
        self._since = time.perf_counter()

    def __call__(self, event: TextEvent) -> None:
        """Report an event."""
        match event:
            case RetrievedContext():
                self._since = time.perf_counter()
                chunks = [{"text": c.text, "position": c.position, "score": c.score} for c in event.chunks]
                _dispatcher.event(
                    RapidRetrievalEvent(
                        span_id=self._span_id,
                        retriever=event.retriever,
                        fallback=event.fallback,
                        seconds=event.seconds,
                        chunks=chunks,
                    )
                )
            case PrefillProgress(done, total) if done == total:
                seconds = time.perf_counter() - self._since
                _dispatcher.event(
                    RapidPrefillEvent(span_id=self._span_id, read_tokens=total, seconds=seconds)
                )
            case Completion():
                _dispatcher.event(
                    RapidDecodeEvent(
                        span_id=self._span_id,
                        finish_reason=event.finish_reason,
                        stats=event.stats.as_dict(),
                    )
                )
        if self._also is not None:
            self._also(event)

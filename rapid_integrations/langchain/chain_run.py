"""One run of the question-answering chain: its input, the events of its answer, and its output.

The events give the output its sources and statistics. They come from the LLM that answers, through its
``on_event`` argument.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from langchain_core.documents import Document
from langchain_core.runnables.utils import AddableDict
from langchain_core.tracers.schemas import Run

from rapid_integrations.engine.stats import RetrievedChunk
from rapid_integrations.events import Completion, TextEvent
from rapid_integrations.hosts.prompt_text import value_text
from rapid_integrations.hosts.sources import SourceRecorder
from rapid_integrations.retrieval import RetrievedContext


@dataclass
class ChainRun:
    """One question and the events of its answer.

    Attributes:
        inputs: The chain's input as a dict.
        question_name: The key of the question in the input, and in the output.
        question: The question.
        documents: The documents that the target reads.
        text: Their text, joined by blank lines.
        recorder: Maps the drafter's chunks to the retriever's documents, if the retriever returned any.
        retrieved: The drafter's context, once it is known.
        completion: The whole answer, once it is known.
    """

    inputs: dict[str, Any]
    question_name: str
    question: str
    documents: Any
    text: str
    recorder: SourceRecorder | None = None
    retrieved: RetrievedContext | None = None
    completion: Completion | None = None
    _sources_emitted: bool = False

    def record_event(
        self,
        event: TextEvent,
        *,
        recorder: SourceRecorder | None,
        listener: Callable[[TextEvent], None] | None,
    ) -> None:
        """Keep the drafter's context and the completion, and pass the event on to ``listener``."""
        if isinstance(event, RetrievedContext):
            self.retrieved, self.recorder = event, recorder
        elif isinstance(event, Completion):
            self.completion = event
        if listener is not None:
            listener(event)

    def forget_events(self, run: Run) -> None:
        """Drop all events, because a fallback answers; ``run`` is the fallback's trace."""
        self.retrieved = self.recorder = self.completion = None

    def question_chunk(self) -> AddableDict:
        """The first chunk of the output."""
        return AddableDict({self.question_name: self.question})

    def answer_chunks(self, piece: Any) -> list[AddableDict]:
        """A piece of the answer (text or message); the sources come before the first one."""
        answer = AddableDict({"answer": str(getattr(piece, "text", piece))})
        if self._sources_emitted:
            return [answer]
        self._sources_emitted = True
        chunks = self.retrieved.chunks if self.retrieved is not None else ()
        return [AddableDict({"context": [self._source(chunk) for chunk in chunks]}), answer]

    def stats_chunk(self) -> AddableDict:
        """The last chunk of the output; ``None`` as statistics if a fallback of another class answered."""
        return AddableDict({"stats": self.completion and self.completion.stats.as_dict()})

    def output(self, answer: Any) -> AddableDict:
        """The whole output for an answer in one piece."""
        output = self.question_chunk()
        for chunk in (*self.answer_chunks(answer), self.stats_chunk()):
            output = AddableDict(output + chunk)
        return output

    def _source(self, chunk: RetrievedChunk) -> Document:
        """The retrieved document, or a new document for a piece of the whole documents."""
        item = None if self.recorder is None else self.recorder.item(chunk)
        if isinstance(item, Document):
            return item
        if item is not None:  # a node, or a text
            metadata = getattr(getattr(item, "node", item), "metadata", None)
            return Document(chunk.text, metadata=dict(metadata or {}))
        documents = self.documents if isinstance(self.documents, (list, tuple)) else [self.documents]
        for document in documents:
            if (start := value_text(document).find(chunk.text)) >= 0:
                metadata = getattr(document, "metadata", None)
                return Document(chunk.text, metadata={**(metadata or {}), "start_index": start})
        return Document(chunk.text)  # the chunk spans two documents

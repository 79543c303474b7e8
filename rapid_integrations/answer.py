"""One answer of the pipeline: its request to the engine, and the engine's events turned into text events."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rapid_integrations.engine.requests import Event, Failed, Finished, NewTokens, Prefilled, Request
from rapid_integrations.events import Completion, PrefillProgress, TextDelta, TextEvent
from rapid_integrations.retrieval import RetrievedContext
from rapid_integrations.tokenization.streaming import TextAssembler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True)
class Answer:
    """An answer in progress.

    Attributes:
        request: The request to submit to the engine.
        retrieved: The drafter's context; ``None`` if nothing was retrieved.
        assembler: Turns the answer's tokens into text.
        completion: The complete answer; ``None`` until the engine has finished.
    """

    request: Request
    retrieved: RetrievedContext | None
    assembler: TextAssembler
    completion: Completion | None = None
    _token_ids: list[int] = field(default_factory=list)

    @property
    def first_events(self) -> list[TextEvent]:
        """The events that precede all events of the engine."""
        return [] if self.retrieved is None else [self.retrieved]

    def text_events(self, event: Event) -> list[TextEvent]:
        """The text events that follow from the engine's next event.

        Raises:
            RapidError: The error with which the request failed.
        """
        match event:
            case Prefilled(done, total):
                return [PrefillProgress(done, total)]
            case NewTokens(token_ids):
                self._token_ids.extend(token_ids)
                text = self.assembler.feed(token_ids)
                return [TextDelta(text, len(token_ids))] if text else []
            case Failed(error):
                raise error
            case Finished(reason, stats):
                rest = self.assembler.flush()
                if self.retrieved is not None:
                    stats.retriever = self.retrieved.retriever
                    stats.retrieval_s = self.retrieved.seconds
                    stats.retrieval_fallback = self.retrieved.fallback
                    stats.retrieved_chunks = self.retrieved.chunks
                self.completion = Completion(self.assembler.text, reason, stats, tuple(self._token_ids))
                return [TextDelta(rest, 0), self.completion] if rest else [self.completion]


def stop_matcher(
    tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], visible_controls: Collection[str]
) -> Callable[[int], bool] | None:
    """A function that takes an answer's tokens in order and returns whether a stop string is complete.

    Args:
        tokenizer: The target's.
        stop: The stop strings; without any the result is ``None``.
        visible_controls: Control tokens that are part of the answer's text.
    """
    if not stop:
        return None
    assembler = TextAssembler(tokenizer, stop, visible=visible_controls)

    def is_stopped(token: int) -> bool:
        assembler.feed([token])
        return assembler.stopped

    return is_stopped

"""The interface of a method: a question and its retrieved passages in, a stream of text events out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from rapid_integrations.config import GenerationOptions
from rapid_integrations.evaluation.methods.retrieval import FoundContext
from rapid_integrations.evaluation.tasks.task import Task, TaskQuestion
from rapid_integrations.events import TextEvent
from rapid_integrations.pipeline import RapidPipeline
from rapid_integrations.prompts import PromptParts


@dataclass(frozen=True, slots=True)
class Case:
    """One question, in the form that every method receives.

    Attributes:
        task: The task, with the document that the question is about.
        question: The question.
        prompt: The prompt with the whole document as its context.
        found: The passages retrieved for the question, the same for all methods that use retrieval.
    """

    task: Task
    question: TaskQuestion
    prompt: PromptParts
    found: FoundContext


class Method(Protocol):
    """A way to answer a question about a document.

    Attributes:
        name: The name in reports and on the command line.
        label: The name in tables.
        speculates: Whether the method drafts tokens. Otherwise it has no acceptance rate.
        uses_retrieval: Whether a model reads the passages retrieved for the question.
    """

    @property
    def name(self) -> str: ...  # noqa: D102  # described in the class docstring

    @property
    def label(self) -> str: ...  # noqa: D102

    @property
    def speculates(self) -> bool: ...  # noqa: D102

    @property
    def uses_retrieval(self) -> bool: ...  # noqa: D102

    def in_force(self, options: GenerationOptions) -> GenerationOptions:
        """The options, with those that do not affect this method at their defaults.

        Two settings with equal results give the same answers at the same cost, provided that the retrieved
        passages are also equal or the method uses none. The evaluation then asks in one of them only.
        """
        ...

    def stream(self, pipeline: RapidPipeline, case: Case, options: GenerationOptions) -> Iterator[TextEvent]:
        """Answer the question. The last event is the completion."""
        ...

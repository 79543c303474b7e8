"""The interface of a source of tasks, and the source of the demo's tasks."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from rapid_integrations.demo.domains import DOMAINS, HANDBOOK
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation.tasks.task import Task, demo_tasks
from rapid_integrations.pipeline import RapidPipeline


class TaskSource(Protocol):
    """The tasks of a run. Files are read and checked when a source is made.

    Attributes:
        name: The source's name in reports.
        num_questions: Number of questions in all tasks.
    """

    @property
    def name(self) -> str: ...  # noqa: D102  # described in the class docstring

    @property
    def num_questions(self) -> int: ...  # noqa: D102

    def tasks(self, pipeline: RapidPipeline) -> Iterator[Task]:
        """Make the tasks one at a time.

        Args:
            pipeline: The pipeline with the tokenizer and the context window.

        Raises:
            RapidError: The tasks cannot be made for these models.
        """
        ...

    def settings(self) -> Mapping[str, Any]:
        """JSON-compatible data about the tasks, for the report's settings."""
        ...


@dataclass(frozen=True, slots=True)
class DemoSource:
    """Generated documents in the demo language.

    Attributes:
        contexts: Document lengths in the demo tokenizer's tokens.
        questions: Number of questions at each length about each domain.
        seed: Equal seeds give equal documents and questions.
        subsets: The documents' domains, a selection of :data:`rapid_integrations.demo.domains.DOMAINS`.

    Raises:
        ConfigurationError: A domain is unknown, or none is given.
    """

    contexts: tuple[int, ...]
    questions: int
    seed: int
    subsets: tuple[str, ...] = (HANDBOOK.name,)
    name: str = "demo"

    def __post_init__(self) -> None:
        check_subsets(self.subsets, DOMAINS)

    @property
    def num_questions(self) -> int:
        """Number of questions at all lengths and about all domains."""
        return self.questions * len(self.contexts) * len(self.subsets)

    def tasks(self, pipeline: RapidPipeline) -> Iterator[Task]:
        """Generate the documents, ordered by context length and then by domain."""
        for context in self.contexts:
            for domain in self.subsets:
                yield from demo_tasks(
                    context=context, num_questions=self.questions, seed=self.seed, domain=domain
                )

    def settings(self) -> Mapping[str, Any]:
        """The lengths, domains, number of questions and seed."""
        return {
            "contexts": list(self.contexts),
            "questions": self.questions,
            "seed": self.seed,
            "subsets": list(self.subsets),
        }


def content_digest(content: object) -> str:
    """Compute the SHA-256 digest of data, as 64 hexadecimal digits.

    Args:
        content: Texts and numbers, or tuples and dataclasses of them. Their ``repr`` is hashed, so a
            renamed class or field changes the digests in journals.
    """
    return hashlib.sha256(repr(content).encode("utf-8", "surrogatepass")).hexdigest()


def check_subsets(subsets: Collection[str], allowed: Collection[str]) -> None:
    """Check the names of subsets.

    Raises:
        ConfigurationError: A name is unknown, or none is given.
    """
    if not subsets or set(subsets) - set(allowed):
        raise ConfigurationError(
            f"the subsets {', '.join(subsets) or '(none)'} are not allowed: name one or more of "
            f"{', '.join(allowed)}."
        )

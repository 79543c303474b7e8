"""Where ``rapid eval`` takes its questions from."""

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
    """Tasks for a run; whatever can be wrong with its files shows when it is made.

    Attributes:
        name: How reports name it.
        num_questions: How many will be asked.
    """

    @property
    def name(self) -> str: ...  # noqa: D102  # the class's docstring says it

    @property
    def num_questions(self) -> int: ...  # noqa: D102

    def tasks(self, pipeline: RapidPipeline) -> Iterator[Task]:
        """The tasks, made one at a time.

        Args:
            pipeline: Whose tokens and context window count.

        Raises:
            RapidError: They cannot be made for these models.
        """
        ...

    def settings(self) -> Mapping[str, Any]:
        """What a report is to say about it, as plain data."""
        ...


@dataclass(frozen=True, slots=True)
class DemoSource:
    """Generated documents in the demo language.

    Attributes:
        contexts: Document lengths in the demo tokenizer's tokens.
        questions: Questions at each length about each domain.
        seed: Same seed, same documents and questions.
        subsets: The documents' domains, of :data:`rapid_integrations.demo.domains.DOMAINS`.

    Raises:
        ConfigurationError: A domain is unknown, or there is none.
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
        """Over all lengths and domains."""
        return self.questions * len(self.contexts) * len(self.subsets)

    def tasks(self, pipeline: RapidPipeline) -> Iterator[Task]:
        """The documents, one context length after the other, and of each one domain after the other."""
        for context in self.contexts:
            for domain in self.subsets:
                yield from demo_tasks(
                    context=context, num_questions=self.questions, seed=self.seed, domain=domain
                )

    def settings(self) -> Mapping[str, Any]:
        """Lengths, domains, number of questions and seed."""
        return {
            "contexts": list(self.contexts),
            "questions": self.questions,
            "seed": self.seed,
            "subsets": list(self.subsets),
        }


def content_digest(content: object) -> str:
    """64 hexadecimal digits that tell texts, and what is made of them, from any others.

    Args:
        content: Texts, numbers, tuples and dataclasses of such.
    """
    return hashlib.sha256(repr(content).encode("utf-8", "surrogatepass")).hexdigest()


def check_subsets(subsets: Collection[str], allowed: Collection[str]) -> None:
    """Check the names of subsets.

    Raises:
        ConfigurationError: One is unknown, or there is none.
    """
    if not subsets or set(subsets) - set(allowed):
        raise ConfigurationError(
            f"the subsets {', '.join(subsets) or '(none)'} are not allowed: name one or more of "
            f"{', '.join(allowed)}."
        )

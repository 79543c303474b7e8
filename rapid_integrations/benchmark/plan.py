"""The plan of a benchmark: which baselines do which work, and how often.

A :class:`BenchmarkPlan` yields groups of :class:`CellPlan`; :mod:`~rapid_integrations.benchmark.runner`
measures each group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from rapid_integrations.benchmark.baselines import (
    ASSISTED,
    BASELINES,
    GENERATE,
    HF_LLM,
    HF_PIPELINE,
    LOSSLESS,
    PLAIN,
    RAPID,
    RAPID_LANGCHAIN,
    RAPID_LLAMAINDEX,
    Baseline,
    Runtime,
)
from rapid_integrations.benchmark.results import EARLIER_SUITE_NAMES, Suite
from rapid_integrations.benchmark.work import Run, make_task
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation.tasks.retrieval_quality import RetrievalQuality
from rapid_integrations.evaluation.tasks.task import Task

SUITES: tuple[str, ...] = get_args(Suite)

# Questions with long answers: decoding takes most of the time.
_DECODE_KINDS = ("describe",)
_QUESTIONS = 8
# generate() keeps a copy of the document for each question of a batch: longer documents take too much memory.
_BATCH_CONTEXT = 4096
# The classes of the host frameworks read the whole document again for each question.
_QUESTIONS_CONTEXT = 16384

_HOSTS = (HF_PIPELINE, HF_LLM, RAPID_LANGCHAIN, RAPID_LLAMAINDEX)
_REREAD_PER_QUESTION = (HF_PIPELINE, HF_LLM)
_BASELINES_OF: Mapping[str, tuple[Baseline, ...]] = {
    "prefill": (GENERATE, ASSISTED, PLAIN, RAPID),
    "decode": tuple(baseline for baseline in BASELINES.values() if baseline not in _HOSTS),
    "batch": (GENERATE, PLAIN, LOSSLESS, RAPID),
    "questions": (GENERATE, PLAIN, RAPID),
    "end-to-end": _HOSTS,
}


@dataclass(frozen=True, slots=True)
class CellPlan:
    """One baseline on one piece of work.

    Attributes:
        suite: The part of the benchmark that it belongs to.
        baseline: The baseline.
        task: The document, and the questions to ask.
        repeats: The number of repetitions.
        together: Whether the questions are asked at the same time.
        cold: Whether caches are cleared first, which includes the prefill of the document in the measurement.
        retrieval: The quality of the drafter's context; ``None`` if there is no drafter.
    """

    suite: Suite
    baseline: Baseline
    task: Task
    repeats: int
    together: bool = False
    cold: bool = False
    retrieval: RetrievalQuality | None = None

    @property
    def run(self) -> Run:
        """One repetition, as its worker process receives it."""
        return Run(
            self.baseline.name,
            self.task,
            together=self.together,
            cold=self.cold,
            retrieval=self.retrieval or "natural",
        )


@dataclass(frozen=True, slots=True)
class Group:
    """Cells that are measured in turn.

    Attributes:
        task: The document and all questions that any of the cells asks.
        cells: One or more cells.
    """

    task: Task
    cells: tuple[CellPlan, ...]


@dataclass(frozen=True, slots=True)
class BenchmarkPlan:
    """The work that ``rapid bench`` measures.

    Attributes:
        suites: One or more of :data:`SUITES`. The names of earlier versions are replaced by the present ones.
        contexts: Lengths of the documents in tokens.
        batches: Numbers of questions asked at the same time.
        repeats: The number of repetitions of each measurement.
        cold_tokens: The number of tokens that all cold runs of a baseline may read in total. Their
            repetitions are reduced to stay within it, but each is measured at least once: reading a long
            document five times shows little more than reading it twice.
        baselines: The baselines that take part.
        retrievals: Qualities of the drafter's context while decoding is measured. RAPID is measured with
            each, the other baselines that draft with the first. Cold runs use the pipeline's own retriever.
        seed: The same seed gives the same documents.
    """

    suites: tuple[str, ...]
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    repeats: int
    cold_tokens: int
    baselines: tuple[Baseline, ...]
    retrievals: tuple[RetrievalQuality, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        """Replace earlier suite names, and check that there is something to measure."""
        object.__setattr__(self, "suites", tuple(EARLIER_SUITE_NAMES.get(name, name) for name in self.suites))
        for suite in self.suites:
            if suite not in SUITES:
                raise ConfigurationError(
                    f"there is no suite {suite!r}: allowed are {', '.join(SUITES)}, separated by commas."
                )
        if not (self.suites and self.contexts and self.batches and self.retrievals and self.repeats >= 1):
            raise ConfigurationError(
                "there is nothing to measure: suites, contexts, batches and retrieval each need a value, and "
                f"repeats={self.repeats} must be at least 1."
            )
        if any(batch < 1 for batch in self.batches):
            raise ConfigurationError(f"batches={list(self.batches)}: a batch has at least one question.")
        if not self.runtimes:
            raise ConfigurationError(
                f"none of the baselines {', '.join(c.name for c in self.baselines)} takes part in "
                f"{', '.join(self.suites)}: name others with --baselines or --suite."
            )

    @property
    def runtimes(self) -> tuple[Runtime, ...]:
        """The runtimes to load; empty if no baseline takes part in the suites.

        The runtime of ``generate()`` is always included, because its answers are the reference.
        """
        needed = [baseline.runtime for suite in self.suites for baseline in self._taking_part(suite)]
        return tuple(dict.fromkeys((GENERATE.runtime, *needed))) if needed else ()

    def groups(self, count_tokens: Callable[[str], int]) -> Iterator[Group]:
        """Generate each document together with the cells that are measured on it.

        Args:
            count_tokens: Counts a text's tokens in the models' own vocabulary.

        Raises:
            ConfigurationError: A document is too short for its questions.
        """
        for context in self.contexts:
            if {"prefill", "decode"} & set(self.suites):
                task = self._task(context, _QUESTIONS, count_tokens, _DECODE_KINDS)
                yield from self._group("prefill", task, self._prefill_cells)
                yield from self._group("decode", task, self._decode_cells)
        if "batch" in self.suites:
            context = _longest(self.contexts, _BATCH_CONTEXT)
            task = self._task(context, max(self.batches), count_tokens, None)
            for batch in self.batches:
                yield from self._group("batch", _first(task, batch), self._batch_cells)
        if {"questions", "end-to-end"} & set(self.suites):
            context = _longest(self.contexts, _QUESTIONS_CONTEXT)
            task = self._task(context, _QUESTIONS, count_tokens, None)
            yield from self._group("questions", task, self._question_cells)
            yield from self._group("end-to-end", task, self._host_cells)

    def _task(
        self, context: int, questions: int, count_tokens: Callable[[str], int], kinds: Sequence[str] | None
    ) -> Task:
        return make_task(
            context=context, num_questions=questions, seed=self.seed, count_tokens=count_tokens, kinds=kinds
        )

    def _group(
        self, suite: Suite, task: Task, make_cells: Callable[[Task], list[CellPlan]]
    ) -> Iterator[Group]:
        """The suite's cells on this task as one group; nothing if the suite is not measured."""
        if suite in self.suites and (cells := make_cells(task)):
            yield Group(task, tuple(cells))

    def _prefill_cells(self, task: Task) -> list[CellPlan]:
        one_question = _first(task, 1)
        return [self._cold("prefill", baseline, one_question) for baseline in self._taking_part("prefill")]

    def _decode_cells(self, task: Task) -> list[CellPlan]:
        return [
            CellPlan("decode", baseline, task, self.repeats, retrieval=retrieval)
            for baseline in self._taking_part("decode")
            for retrieval in (self.retrievals if baseline == RAPID else (self._retrieval(baseline),))
        ]

    def _batch_cells(self, task: Task) -> list[CellPlan]:
        return [
            CellPlan(
                "batch", baseline, task, self.repeats, together=True, retrieval=self._retrieval(baseline)
            )
            for baseline in self._taking_part("batch")
        ]

    def _question_cells(self, task: Task) -> list[CellPlan]:
        return [
            self._cold("questions", baseline, task, together=together)
            for baseline in self._taking_part("questions")
            for together in ((False,) if baseline == GENERATE else (False, True))
        ]

    def _host_cells(self, task: Task) -> list[CellPlan]:
        return [self._cold("end-to-end", baseline, task) for baseline in self._taking_part("end-to-end")]

    def _cold(self, suite: Suite, baseline: Baseline, task: Task, *, together: bool = False) -> CellPlan:
        tokens_read = task.context * (len(task.questions) if baseline in _REREAD_PER_QUESTION else 1)
        return CellPlan(
            suite,
            baseline,
            task,
            max(1, min(self.repeats, self.cold_tokens // tokens_read)),
            together=together,
            cold=True,
            # The user who waits for the prefill also waits for retrieval, so the pipeline retrieves itself.
            retrieval="natural" if self._retrieval(baseline) else None,
        )

    def _retrieval(self, baseline: Baseline) -> RetrievalQuality | None:
        """The quality of the drafter's context outside the runs that measure every quality."""
        if baseline.runtime == "transformers" or baseline == PLAIN:
            return None
        return self.retrievals[0]

    def _taking_part(self, suite: str) -> list[Baseline]:
        return [baseline for baseline in _BASELINES_OF[suite] if baseline in self.baselines]


def _first(task: Task, questions: int) -> Task:
    """The task with only its first questions."""
    return dataclasses.replace(task, questions=task.questions[:questions])


def _longest(contexts: Sequence[int], max_tokens: int) -> int:
    """The longest context of at most ``max_tokens``; the shortest of all if none is that short."""
    return max((context for context in contexts if context <= max_tokens), default=min(contexts))

"""What a benchmark measures: pieces of work, and who does each of them how often."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
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
from rapid_integrations.benchmark.results import Suite
from rapid_integrations.benchmark.work import Run, make_task
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation.retrieval import RetrievalQuality
from rapid_integrations.evaluation.tasks.task import Task

SUITES: tuple[str, ...] = get_args(Suite)

# Long answers, so that decoding is what takes the time.
_DECODE_KINDS = ("describe",)
_QUESTIONS = 8
# generate() keeps a copy of the document for each question of a batch: beyond this it is out of the question.
_BATCH_CONTEXT = 4096
# The frameworks' classes read the document anew for each of the questions.
_QUESTIONS_CONTEXT = 16384

_PREFILLING = (GENERATE, ASSISTED, PLAIN, RAPID)
_BATCHED = (GENERATE, PLAIN, LOSSLESS, RAPID)
_ASKED = (GENERATE, PLAIN, RAPID)
_HOSTS = (HF_PIPELINE, HF_LLM, RAPID_LANGCHAIN, RAPID_LLAMAINDEX)
_REREADING = (HF_PIPELINE, HF_LLM)


@dataclass(frozen=True, slots=True)
class CellPlan:
    """One baseline on one piece of work.

    Attributes:
        suite: Which part of the benchmark it belongs to.
        baseline: Who.
        task: The document, and the questions to ask.
        repeats: How often.
        together: Whether they are asked at once.
        cold: Whether the document has to be read.
        retrieval: What the drafter reads; ``None`` for a baseline without one.
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
        """What its process is asked."""
        return Run(
            self.baseline.name,
            self.task,
            together=self.together,
            cold=self.cold,
            retrieval=self.retrieval or "natural",
        )


@dataclass(frozen=True, slots=True)
class Group:
    """Cells that are measured in turns.

    Attributes:
        task: The document and all questions that any of the cells asks.
        cells: At least one.
    """

    task: Task
    cells: tuple[CellPlan, ...]


@dataclass(frozen=True, slots=True)
class BenchmarkPlan:
    """What ``rapid bench`` was asked to measure.

    Attributes:
        suites: Of :data:`SUITES`, at least one.
        contexts: Lengths of the documents in tokens.
        batches: Numbers of questions at once.
        repeats: How often everything is measured.
        cold_tokens: Cold runs of a baseline are repeated while they read no more than so many tokens in
            all, at least once: reading a long document five times shows little more than reading it twice.
        baselines: Who takes part.
        retrievals: What the drafter reads while decoding is measured: RAPID with each, everybody else who
            drafts with the first. Cold runs retrieve as the pipeline does by itself.
        seed: Same seed, same documents.
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
        """Validate what the command line cannot, and that somebody has something to do."""
        for suite in self.suites:
            if suite not in SUITES:
                raise ConfigurationError(
                    f"there is no suite {suite!r}: allowed are {', '.join(SUITES)}, with commas between."
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
        """What has to be loaded; ``generate()`` is always, for it is the reference. Empty: nobody runs."""
        needed = [c.runtime for suite in self.suites for c in self._taking_part(_entrants(suite))]
        return tuple(dict.fromkeys((GENERATE.runtime, *needed))) if needed else ()

    def groups(self, count_tokens: Callable[[str], int]) -> Iterator[Group]:
        """Generate the documents and what is measured on each, one after the other.

        Args:
            count_tokens: Counts a text's tokens in the models' own vocabulary.

        Raises:
            ConfigurationError: A document is too short for its questions.
        """
        for context in self.contexts:
            if {"prefill", "decode"} & set(self.suites):
                task = self._task(context, _QUESTIONS, count_tokens, _DECODE_KINDS)
                yield from self._group(task, self._prefill_cells(task) if "prefill" in self.suites else [])
                yield from self._group(task, self._decode_cells(task) if "decode" in self.suites else [])
        if "batch" in self.suites:
            context = _longest(self.contexts, _BATCH_CONTEXT)
            task = self._task(context, max(self.batches), count_tokens, None)
            for batch in self.batches:
                yield from self._group(task, self._batch_cells(_first(task, batch)))
        if {"questions", "end-to-end"} & set(self.suites):
            context = _longest(self.contexts, _QUESTIONS_CONTEXT)
            task = self._task(context, _QUESTIONS, count_tokens, None)
            yield from self._group(task, self._question_cells(task) if "questions" in self.suites else [])
            yield from self._group(task, self._host_cells(task) if "end-to-end" in self.suites else [])

    def _task(
        self, context: int, questions: int, count_tokens: Callable[[str], int], kinds: Sequence[str] | None
    ) -> Task:
        return make_task(
            context=context, num_questions=questions, seed=self.seed, count_tokens=count_tokens, kinds=kinds
        )

    def _group(self, task: Task, cells: Sequence[CellPlan]) -> Iterator[Group]:
        if cells:
            yield Group(task, tuple(cells))

    def _prefill_cells(self, task: Task) -> list[CellPlan]:
        return [
            self._cold("prefill", baseline, _first(task, 1)) for baseline in self._taking_part(_PREFILLING)
        ]

    def _decode_cells(self, task: Task) -> list[CellPlan]:
        cells = []
        for baseline in self._taking_part(_entrants("decode")):
            for retrieval in self.retrievals if baseline == RAPID else (self._retrieval(baseline),):
                cells.append(CellPlan("decode", baseline, task, self.repeats, retrieval=retrieval))
        return cells

    def _batch_cells(self, task: Task) -> list[CellPlan]:
        return [
            CellPlan(
                "batch", baseline, task, self.repeats, together=True, retrieval=self._retrieval(baseline)
            )
            for baseline in self._taking_part(_BATCHED)
        ]

    def _question_cells(self, task: Task) -> list[CellPlan]:
        return [
            self._cold("questions", baseline, task, together=together)
            for baseline in self._taking_part(_ASKED)
            for together in ((False,) if baseline == GENERATE else (False, True))
        ]

    def _host_cells(self, task: Task) -> list[CellPlan]:
        return [self._cold("end-to-end", baseline, task) for baseline in self._taking_part(_HOSTS)]

    def _cold(self, suite: Suite, baseline: Baseline, task: Task, *, together: bool = False) -> CellPlan:
        read = task.context * (len(task.questions) if baseline in _REREADING else 1)
        return CellPlan(
            suite,
            baseline,
            task,
            max(1, min(self.repeats, self.cold_tokens // read)),
            together=together,
            cold=True,
            # Whoever waits for a document to be read has no retrieval but the pipeline's own.
            retrieval="natural" if self._retrieval(baseline) else None,
        )

    def _retrieval(self, baseline: Baseline) -> RetrievalQuality | None:
        if baseline.runtime == "transformers" or baseline == PLAIN:
            return None
        return self.retrievals[0]

    def _taking_part(self, entrants: Sequence[Baseline]) -> list[Baseline]:
        return [baseline for baseline in entrants if baseline in self.baselines]


def _entrants(suite: str) -> tuple[Baseline, ...]:
    """Who a suite is for."""
    others = {"prefill": _PREFILLING, "batch": _BATCHED, "questions": _ASKED, "end-to-end": _HOSTS}
    return others.get(suite) or tuple(c for c in BASELINES.values() if c not in _HOSTS)


def _first(task: Task, questions: int) -> Task:
    """The task with only its first questions."""
    return dataclasses.replace(task, questions=task.questions[:questions])


def _longest(contexts: Sequence[int], most: int) -> int:
    """The longest context of at most ``most`` tokens, else the shortest."""
    return max((context for context in contexts if context <= most), default=min(contexts))

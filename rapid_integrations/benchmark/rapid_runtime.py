"""Runs the baselines that use the engine: directly through its pipeline, or through ``RapidLLM``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rapid_integrations.benchmark.baselines import BASELINES, RAPID_LANGCHAIN, RAPID_LLAMAINDEX
from rapid_integrations.benchmark.memory import PeakMemory
from rapid_integrations.benchmark.work import Answer, Outcome, Run
from rapid_integrations.config import GenerationOptions
from rapid_integrations.demo import PROMPT_TEMPLATE
from rapid_integrations.engine.stats import RapidStats
from rapid_integrations.evaluation.methods.retrieval import TaskRetrieval
from rapid_integrations.evaluation.tasks.prompts import question_prompt
from rapid_integrations.evaluation.tasks.retrieval_quality import RetrievalQuality
from rapid_integrations.evaluation.tasks.task import Task
from rapid_integrations.events import Completion, TextDelta, TextEvent
from rapid_integrations.pipeline import RapidPipeline
from rapid_integrations.prompts import PromptParts
from rapid_integrations.retrieval import Chunk


@dataclass(frozen=True, slots=True)
class PreparedRetrieval:
    """A retriever that returns chunks found before the measurement.

    Attributes:
        chunks: The chunks for each question.
        max_tokens: The maximum of the questions' retrieval budgets, in tokens.
        name: The retriever's name in the stats.
        scores_are_cosine: Always false.
    """

    chunks: Mapping[str, Sequence[Chunk]]
    max_tokens: int
    name: str
    scores_are_cosine: bool = False

    def retrieve(self, query: str, context: str, *, max_tokens: int) -> Sequence[Chunk]:
        """The chunks prepared for the question ``query``."""
        return self.chunks[query]


@dataclass(slots=True)
class _EventRecord:
    """The completion of one question, and the times of its call and of its first text."""

    called_at: float
    first_text_at: float = 0.0
    completion: Completion | None = None

    def add(self, event: TextEvent) -> None:
        if isinstance(event, TextDelta) and not self.first_text_at:
            self.first_text_at = time.perf_counter()
        elif isinstance(event, Completion):
            self.completion = event


class RapidRuntime:
    """Runs baselines on the engine.

    Args:
        load: Loads the pipeline. It is called again for every cold run, which discards the pipeline's indexes
            of earlier documents. It must return a pipeline with the same engine each time.
    """

    def __init__(self, load: Callable[[], RapidPipeline]) -> None:
        self._load = load
        self._pipeline = load()
        self._prepared: dict[tuple[str, Task], PreparedRetrieval] = {}

    @property
    def pipeline(self) -> RapidPipeline:
        """The pipeline of the latest cold run."""
        return self._pipeline

    def run(self, run: Run) -> Outcome:
        """Ask all questions of a run.

        Raises:
            RapidError: A question cannot be answered.
        """
        baseline = BASELINES[run.baseline]
        if run.cold:
            self._forget()
        engine = self._pipeline.engine
        options = self._pipeline.options.override(**baseline.options)
        retriever = None
        if run.retrieval != "natural" and options.speculation.num_draft_tokens != 0:
            retriever = self._prepare(run.task, run.retrieval)
            options = options.override(retrieval_max_tokens=retriever.max_tokens)
        prompts = [
            question_prompt(PROMPT_TEMPLATE, context=run.task.document, question=question.question)
            for question in run.task.questions
        ]
        memory = PeakMemory(engine.target.device)
        started = time.perf_counter()
        if baseline in (RAPID_LANGCHAIN, RAPID_LLAMAINDEX):
            langchain = baseline == RAPID_LANGCHAIN
            records = [self._ask_host(prompt, options, langchain=langchain) for prompt in prompts]
        elif run.together:
            records = [_EventRecord(started) for _ in prompts]
            self._pipeline.generate(
                prompts,
                options=options,
                retriever=retriever,
                on_event=lambda index, event: records[index].add(event),
            )
        else:
            records = [self._ask(prompt, options, retriever) for prompt in prompts]
        wall_s = time.perf_counter() - started
        completions = [record.completion for record in records if record.completion is not None]
        return Outcome(
            answers=tuple(Answer(c.text, c.token_ids) for c in completions),
            stats=RapidStats.pooled(c.stats for c in completions),
            wall_s=wall_s,
            first_token_s=tuple(record.first_text_at - record.called_at for record in records),
            kv_bytes=engine.prefix_cache.num_bytes if run.cold else None,
            rest_bytes=memory.rest_bytes,
            peak_bytes=memory.peak_bytes(),
        )

    def _forget(self) -> None:
        """Discard the keys and values of all documents, and the indexes of their chunks."""
        # The engine stays loaded only while a pipeline uses it: load the new one before dropping the old.
        self._pipeline = self._load()
        self._pipeline.engine.prefix_cache.clear()

    def _ask(
        self, prompt: PromptParts, options: GenerationOptions, retriever: PreparedRetrieval | None
    ) -> _EventRecord:
        record = _EventRecord(time.perf_counter())
        for event in self._pipeline.stream(prompt, options=options, retriever=retriever):
            record.add(event)
        return record

    def _ask_host(self, prompt: PromptParts, options: GenerationOptions, *, langchain: bool) -> _EventRecord:
        from rapid_integrations.llm import RapidLLM

        llm = RapidLLM(target=self._pipeline, **options.flat())
        record = _EventRecord(time.perf_counter())
        ask = llm.invoke if langchain else llm.complete
        ask(prompt.text, query=prompt.query, context=prompt.context, on_event=record.add)
        return record

    def _prepare(self, task: Task, quality: RetrievalQuality) -> PreparedRetrieval:
        """Retrieve for all questions of a task, before the measurement."""
        key = (quality, task)
        if key not in self._prepared:
            retrieval = TaskRetrieval(self._pipeline, self._pipeline.options.retrieval, quality)
            results = {question.question: retrieval.find(task, question) for question in task.questions}
            self._prepared[key] = PreparedRetrieval(
                chunks={
                    question: [Chunk(c.text, c.position, c.score) for c in result.retrieved.chunks]
                    for question, result in results.items()
                },
                max_tokens=max(result.max_tokens for result in results.values()),
                name=quality,
            )
        return self._prepared[key]

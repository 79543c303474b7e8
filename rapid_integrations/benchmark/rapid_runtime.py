"""Our baselines: the engine through its pipeline, and through the frameworks by ``RapidLLM``."""

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
from rapid_integrations.evaluation.methods import question_prompt
from rapid_integrations.evaluation.retrieval import RetrievalQuality, TaskRetrieval
from rapid_integrations.evaluation.tasks.task import Task
from rapid_integrations.events import Completion, TextDelta, TextEvent
from rapid_integrations.pipeline import RapidPipeline
from rapid_integrations.prompts import PromptParts
from rapid_integrations.retrieval import Chunk


@dataclass(frozen=True, slots=True)
class PreparedRetrieval:
    """A retriever that finds what was found for each question before.

    Attributes:
        chunks: By question.
        max_tokens: The largest budget that any of the questions was retrieved with.
        name: What the stats call it.
        scores_are_cosine: Always false.
    """

    chunks: Mapping[str, Sequence[Chunk]]
    max_tokens: int
    name: str
    scores_are_cosine: bool = False

    def retrieve(self, query: str, context: str, *, max_tokens: int) -> Sequence[Chunk]:
        """The chunks of the question."""
        return self.chunks[query]


@dataclass(slots=True)
class _Heard:
    """Collects one answer's events, and when the first text came."""

    called: float
    first_text: float = 0.0
    completion: Completion | None = None

    def hear(self, event: TextEvent) -> None:
        if isinstance(event, TextDelta) and not self.first_text:
            self.first_text = time.perf_counter()
        elif isinstance(event, Completion):
            self.completion = event


class RapidRuntime:
    """Runs baselines on the engine.

    Args:
        load: Loads the pipeline. It is called again for every cold run, so that nothing that the pipeline
            keeps of a document outlives it; its engine must be the same each time.
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
            RapidError: What a question made impossible.
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
            heard = [self._ask_host(prompt, options, langchain=langchain) for prompt in prompts]
        elif run.together:
            heard = [_Heard(started) for _ in prompts]
            self._pipeline.generate(
                prompts,
                options=options,
                retriever=retriever,
                on_event=lambda index, event: heard[index].hear(event),
            )
        else:
            heard = [self._ask(prompt, options, retriever) for prompt in prompts]
        wall_s = time.perf_counter() - started
        completions = [each.completion for each in heard if each.completion is not None]
        return Outcome(
            answers=tuple(Answer(c.text, c.token_ids) for c in completions),
            stats=RapidStats.pooled(c.stats for c in completions),
            wall_s=wall_s,
            first_token_s=tuple(each.first_text - each.called for each in heard),
            kv_bytes=engine.prefix_cache.num_bytes if run.cold else None,
            rest_bytes=memory.rest_bytes,
            peak_bytes=memory.peak_bytes(),
        )

    def _forget(self) -> None:
        """Drop the KV of every document, and the indexes over their chunks."""
        # The old pipeline keeps the engine loaded until the new one has it.
        self._pipeline = self._load()
        self._pipeline.engine.prefix_cache.clear()

    def _ask(
        self, prompt: PromptParts, options: GenerationOptions, retriever: PreparedRetrieval | None
    ) -> _Heard:
        heard = _Heard(time.perf_counter())
        for event in self._pipeline.stream(prompt, options=options, retriever=retriever):
            heard.hear(event)
        return heard

    def _ask_host(self, prompt: PromptParts, options: GenerationOptions, *, langchain: bool) -> _Heard:
        from rapid_integrations.llm import RapidLLM

        llm = RapidLLM(target=self._pipeline, **options.flat())
        heard = _Heard(time.perf_counter())
        ask = llm.invoke if langchain else llm.complete
        ask(prompt.text, query=prompt.query, context=prompt.context, on_event=heard.hear)
        return heard

    def _prepare(self, task: Task, quality: RetrievalQuality) -> PreparedRetrieval:
        """Retrieve for all of a task's questions, outside the time that is measured."""
        key = (quality, task)
        if key not in self._prepared:
            retrieval = TaskRetrieval(self._pipeline, self._pipeline.options.retrieval, quality)
            found = {question.question: retrieval.find(task, question) for question in task.questions}
            self._prepared[key] = PreparedRetrieval(
                chunks={
                    question: [Chunk(c.text, c.position, c.score) for c in each.retrieved.chunks]
                    for question, each in found.items()
                },
                max_tokens=max(each.max_tokens for each in found.values()),
                name=quality,
            )
        return self._prepared[key]

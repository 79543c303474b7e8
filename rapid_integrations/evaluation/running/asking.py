"""Asking methods questions: retrieval, prompt, answer and score."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from rapid_integrations.config import GenerationOptions, RetrievalParams
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation.methods.method import Case, Method
from rapid_integrations.evaluation.methods.retrieval import FoundContext, RetrieverName, TaskRetrieval
from rapid_integrations.evaluation.methods.settings import Setting
from rapid_integrations.evaluation.results.answer_record import AnswerRecord
from rapid_integrations.evaluation.running.follow_up import asked_again
from rapid_integrations.evaluation.scoring.answer_metrics import Metric, make_metric
from rapid_integrations.evaluation.tasks.prompts import question_prompt
from rapid_integrations.evaluation.tasks.retrieval_quality import RetrievalQuality
from rapid_integrations.evaluation.tasks.task import Task, TaskQuestion
from rapid_integrations.events import Completion, TextEvent
from rapid_integrations.pipeline import RapidPipeline
from rapid_integrations.tokenization.streaming import token_pieces

_RetrievalKey = tuple[RetrievalParams, RetrievalQuality, RetrieverName | None]
EventCallback = Callable[[Method, Case, TextEvent], None]

_WARM_UP_CHARACTERS = 1000
_WARM_UP_TOKENS = 8


def answer(
    pipeline: RapidPipeline,
    method: Method,
    case: Case,
    options: GenerationOptions,
    on_event: EventCallback | None = None,
) -> Completion:
    """A method's answer to a question.

    Args:
        pipeline: The models.
        method: The method.
        case: The question and its retrieved context.
        options: Generation options, which the method may override.
        on_event: As in :func:`evaluate`.
    """
    for event in method.stream(pipeline, case, options):
        if on_event is not None:
            on_event(method, case, event)
        if isinstance(event, Completion):
            return event
    raise ConfigurationError(
        f"the method {method.name!r} ended without a completion, which must be its last event."
    )


class Examiner:
    """Asks questions, and keeps results that several answers share.

    Args:
        pipeline: The models.
        asks: Every method with every setting in which it will be asked.
        options: The options that settings, formats and methods change.
        prompt_template: The template for tasks without one.
        on_event: As in :func:`evaluate`.

    Raises:
        ConfigurationError: The pipeline cannot retrieve as a setting requires.
    """

    def __init__(
        self,
        pipeline: RapidPipeline,
        asks: Sequence[tuple[Method, Setting]],
        options: GenerationOptions,
        prompt_template: str,
        on_event: EventCallback | None,
    ) -> None:
        self._pipeline = pipeline
        self._methods = tuple({method.name: method for method, _ in asks}.values())
        self._options = {setting: setting.applied_to(options) for _, setting in asks}
        self._prompt_template = prompt_template
        self._on_event = on_event
        self._metrics: dict[str, Metric] = {}
        self._retrievals = {
            key: TaskRetrieval(pipeline, *key)
            for key in dict.fromkeys(self._retrieval_key(setting) for _, setting in asks)
        }
        # Retrieved contexts of the last question only.
        self._found: dict[_RetrievalKey, FoundContext] = {}
        self._found_for: TaskQuestion | None = None
        self._warm = False

    def metric(self, task: Task) -> Metric:
        """The metric of a task, made once.

        Raises:
            ConfigurationError: The metric is unknown, or its library is missing.
        """
        name = task.format.metric
        if name not in self._metrics:
            self._metrics[name] = make_metric(name)
        return self._metrics[name]

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics in use."""
        return sorted(self._metrics)

    def ask(self, task: Task, question: TaskQuestion, method: Method, setting: Setting) -> AnswerRecord:
        """A method's answer in a setting. Before the first answer, every method answers once to warm up.

        Raises:
            RapidError: The question cannot be answered.
        """
        options = self._options[setting]
        template = task.format.prompt_template or self._prompt_template
        found = self._find(task, question, setting)
        if not self._warm:
            self._warm = True
            self._warm_up(task, template, found, options)
        if task.format.max_new_tokens is not None:
            options = options.override(max_new_tokens=task.format.max_new_tokens)
        prompt = question_prompt(
            template,
            context=task.document,
            question=question.question,
            answer_start=question.answer_start,
        )
        completion = answer(
            self._pipeline, method, Case(task, question, prompt, found), options, self._on_event
        )
        text = judged = completion.text
        if task.format.follow_up_template is not None:
            judged = asked_again(self._pipeline, task.format, question, text, options)
            text = f"{text}\n\n{judged}"
        score = float(self.metric(task)(judged, question.answers))
        stats = completion.stats
        if method.uses_retrieval:
            stats = dataclasses.replace(
                stats,
                retriever=found.retrieved.retriever,
                retrieval_s=found.retrieved.seconds,
                retrieval_fallback=found.retrieved.fallback,
                retrieved_chunks=found.retrieved.chunks,
            )
        return AnswerRecord(
            method=method.name,
            context=task.context,
            kind=question.kind,
            question=question.question,
            answers=question.answers,
            answer=text,
            correct=score == 1,
            score=score,
            finish_reason=completion.finish_reason,
            evidence_found=found.holds_evidence if method.uses_retrieval else None,
            stats=stats,
            question_id=question.question_id,
            setting=setting,
            pieces=token_pieces(
                completion.token_ids,
                self._pipeline.tokenizer,
                completion.text,
                visible=prompt.visible_controls,
            ),
        )

    def _find(self, task: Task, question: TaskQuestion, setting: Setting) -> FoundContext:
        """The retrieved context of a question, found once for all methods and settings that share it."""
        if question is not self._found_for:
            self._found, self._found_for = {}, question
        key = self._retrieval_key(setting)
        if key not in self._found:
            self._found[key] = self._retrievals[key].find(task, question)
        return self._found[key]

    def _retrieval_key(self, setting: Setting) -> _RetrievalKey:
        return self._options[setting].retrieval, setting.retrieval, setting.retriever

    def _warm_up(self, task: Task, template: str, found: FoundContext, options: GenerationOptions) -> None:
        """Have every method give a short answer, so that costs of the first use are not measured.

        It reads the end of the document, so that no prefix of it is cached before the first answer.
        """
        question = task.questions[0]
        prompt = question_prompt(
            template, context=task.document[-_WARM_UP_CHARACTERS:], question=question.question
        )
        case = Case(task, question, prompt, found)
        for method in self._methods:
            answer(self._pipeline, method, case, options.override(max_new_tokens=_WARM_UP_TOKENS))

"""Ask every method every question of every task, in one run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from rapid_integrations.config import GenerationOptions
from rapid_integrations.demo import PROMPT_TEMPLATE
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation.follow_up import asked_again
from rapid_integrations.evaluation.methods import Case, Method, make_method, question_prompt
from rapid_integrations.evaluation.report import (
    AnswerRecord,
    EvaluationReport,
    MethodResult,
    package_versions,
)
from rapid_integrations.evaluation.retrieval import RetrievalQuality, TaskRetrieval
from rapid_integrations.evaluation.scoring import Metric, make_metric
from rapid_integrations.evaluation.tasks import Task
from rapid_integrations.pipeline import Completion, RapidPipeline, TextEvent

_WARM_UP_CHARACTERS = 1000
_WARM_UP_TOKENS = 8


def evaluate(
    pipeline: RapidPipeline,
    tasks: Iterable[Task],
    methods: Sequence[str | Method] = ("lc", "rag", "sd", "rapid"),
    *,
    retrieval: RetrievalQuality = "natural",
    options: GenerationOptions | None = None,
    prompt_template: str = PROMPT_TEMPLATE,
    on_event: Callable[[Method, Case, TextEvent], None] | None = None,
    on_answer: Callable[[AnswerRecord], None] | None = None,
) -> EvaluationReport:
    """Measure methods on tasks.

    Every question is put to every method before the next one, so that a document is read once for all of
    them and a slow minute of the machine hits all alike; who begins changes from question to question. Each
    method first answers one short question that does not count.

    Args:
        pipeline: The models.
        tasks: Documents with questions; consumed one at a time.
        methods: Names, see :data:`METHOD_NAMES`, or methods of your own.
        retrieval: What the drafter, and the target of ``rag``, reads: ``"natural"``, what the pipeline's
            retriever finds; ``"gold"``, with the chunks that hold the evidence; ``"missing"``, without them;
            ``"unrelated"``, chunks of another document; ``"adversarial"``, with a passage that contradicts
            the evidence in its place.
        options: Instead of the pipeline's. A method overrides what makes it that method, a task's format the
            length of its answers.
        prompt_template: The prompt, with ``{context}`` and then ``{question}``, where a task has none.
        on_event: Called with every event of every answer, the method and the question it belongs to.
        on_answer: Called with every answer when it is complete.

    Raises:
        ConfigurationError: The options contradict the methods, there is no task, a method is unknown or named
            twice, or a task lacks what the retrieval quality needs.
        RapidError: What a question made impossible.
    """
    options = options or pipeline.options
    chosen = [make_method(method) if isinstance(method, str) else method for method in methods]
    _check(chosen, options)
    retriever = TaskRetrieval(pipeline, options.retrieval, retrieval)
    records: list[AnswerRecord] = []
    metrics: dict[str, Metric] = {}
    started = time.perf_counter()
    for document, task in enumerate(tasks):
        form = task.format
        template = form.prompt_template or prompt_template
        task_options = options
        if form.max_new_tokens is not None:
            task_options = options.override(max_new_tokens=form.max_new_tokens)
        if form.metric not in metrics:
            metrics[form.metric] = make_metric(form.metric)
        if not records:
            _warm_up(pipeline, chosen, task, retriever, options, template)
        for question_number, question in enumerate(task.questions):
            case = Case(
                task,
                question,
                question_prompt(
                    template,
                    context=task.document,
                    question=question.question,
                    answer_start=question.answer_start,
                ),
                retriever.find(task, question),
            )
            turn = len(records) // len(chosen) % len(chosen)
            for method in (*chosen[turn:], *chosen[:turn]):
                completion = answer(pipeline, method, case, task_options, on_event)
                text = judged = completion.text
                if form.follow_up_template is not None:
                    judged = asked_again(pipeline, form, question, text, task_options)
                    text = f"{text}\n\n{judged}"
                score = float(metrics[form.metric](judged, question.answers))
                record = AnswerRecord(
                    method=method.name,
                    context=task.context,
                    kind=question.kind,
                    question=question.question,
                    answers=question.answers,
                    answer=text,
                    correct=score == 1,
                    score=score,
                    finish_reason=completion.finish_reason,
                    evidence_found=case.found.holds_evidence,
                    stats=completion.stats,
                    question_id=question.question_id,
                    document=document,
                    question_number=question_number,
                )
                records.append(record)
                if on_answer is not None:
                    on_answer(record)
    if not records:
        raise ConfigurationError("there is nothing to evaluate: give at least one task with a question.")
    return EvaluationReport(
        results=_results(records, chosen),
        answers=tuple(records),
        settings={
            "target": pipeline.name,
            "drafter": _drafter_name(pipeline),
            "methods": [method.name for method in chosen],
            "retrieval": retrieval,
            "prompt_template": prompt_template,
            "metrics": sorted(metrics),
            "options": options.flat(),
            "device": str(pipeline.engine.target.device),
            "threads": torch.get_num_threads(),
            "cpus": os.cpu_count(),
            "seconds": time.perf_counter() - started,
        },
        versions=package_versions(),
    )


def answer(
    pipeline: RapidPipeline,
    method: Method,
    case: Case,
    options: GenerationOptions,
    on_event: Callable[[Method, Case, TextEvent], None] | None = None,
) -> Completion:
    """One method's answer to one question.

    Args:
        pipeline: The models.
        method: How to answer.
        case: The question and what was retrieved for it.
        options: What the method may override.
        on_event: As in :func:`evaluate`.
    """
    for event in method.stream(pipeline, case, options):
        if on_event is not None:
            on_event(method, case, event)
        if isinstance(event, Completion):
            return event
    raise ConfigurationError(
        f"the method {method.name!r} ended without a completion: its last event must be one."
    )


def _check(methods: Sequence[Method], options: GenerationOptions) -> None:
    if not methods:
        raise ConfigurationError("there is no method to evaluate: name at least one.")
    names = [method.name for method in methods]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigurationError(f"the method {', '.join(twice)} is named twice: name each once.")
    speculating = [method.name for method in methods if method.speculates]
    if speculating and options.speculation.num_draft_tokens == 0:
        raise ConfigurationError(
            f"num_draft_tokens=0 is plain decoding, but {', '.join(speculating)} "
            f"{'drafts' if len(speculating) == 1 else 'draft'}: leave the method out, or num_draft_tokens."
        )


def _warm_up(
    pipeline: RapidPipeline,
    methods: Sequence[Method],
    task: Task,
    retriever: TaskRetrieval,
    options: GenerationOptions,
    template: str,
) -> None:
    """Have every method answer once, briefly, so that first-use costs are in nobody's figures.

    The document's end is read, so that nothing of its beginning is known before the first answer.
    """
    question = task.questions[0]
    prompt = question_prompt(
        template, context=task.document[-_WARM_UP_CHARACTERS:], question=question.question
    )
    case = Case(task, question, prompt, retriever.find(task, question))
    for method in methods:
        answer(pipeline, method, case, options.override(max_new_tokens=_WARM_UP_TOKENS))


def _results(records: Sequence[AnswerRecord], methods: Sequence[Method]) -> tuple[MethodResult, ...]:
    results = []
    for context in dict.fromkeys(record.context for record in records):
        for method in methods:
            cell = [r for r in records if r.context == context and r.method == method.name]
            results.append(MethodResult.of(cell, speculates=method.speculates))
    return tuple(results)


def _drafter_name(pipeline: RapidPipeline) -> str | None:
    drafter: Any = pipeline.engine.drafter
    return None if drafter is None else str(drafter.name)

"""The loop of an evaluation: every method answers every question of every task in every setting."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rapid_integrations.config import GenerationOptions
from rapid_integrations.demo import PROMPT_TEMPLATE
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation.methods.choice import make_method
from rapid_integrations.evaluation.methods.method import Method
from rapid_integrations.evaluation.methods.settings import Setting, asked_in, make_settings
from rapid_integrations.evaluation.results.answer_record import AnswerRecord
from rapid_integrations.evaluation.results.environment import machine, package_versions
from rapid_integrations.evaluation.results.identity import run_identity
from rapid_integrations.evaluation.results.journal import Journal, open_journal
from rapid_integrations.evaluation.results.report import EvaluationReport, MethodResult
from rapid_integrations.evaluation.running.asking import EventCallback, Examiner
from rapid_integrations.evaluation.tasks.retrieval_quality import RetrievalQuality
from rapid_integrations.evaluation.tasks.task import Task
from rapid_integrations.pipeline import RapidPipeline


def evaluate(
    pipeline: RapidPipeline,
    tasks: Iterable[Task],
    methods: Sequence[str | Method] = ("lc", "rag", "sd", "rapid"),
    *,
    retrieval: RetrievalQuality | Sequence[RetrievalQuality] = "natural",
    sweep: Mapping[str, Sequence[Any]] | None = None,
    options: GenerationOptions | None = None,
    prompt_template: str = PROMPT_TEMPLATE,
    about: Mapping[str, Any] | None = None,
    journal_folder: Path | None = None,
    on_event: EventCallback | None = None,
    on_answer: Callable[[AnswerRecord], None] | None = None,
) -> EvaluationReport:
    """Measure methods on tasks.

    All methods answer a question in all settings before the next question is asked. A document is therefore
    prefilled once for all of them, and a temporary slowdown of the machine affects all methods alike. The
    order of the methods rotates from question to question. Before the first question, each method gives a
    short answer that is not measured. Settings whose difference does not affect a method share its answers.

    Args:
        pipeline: The models.
        tasks: Documents with questions; consumed one at a time.
        methods: Names (see :data:`METHOD_NAMES`) or other objects with the interface :class:`Method`.
        retrieval: The passages that the drafter and the target of ``rag`` read. ``"natural"``: passages found
            by the pipeline's retriever; ``"gold"``: the passages with the evidence first; ``"missing"``: none
            with evidence; ``"unrelated"``: passages of another document; ``"adversarial"``: a passage that
            contradicts the evidence, and none with evidence. Several qualities are several settings.
        sweep: Values of flat generation options, such as ``{"transfer_strength": (1, 5, 10)}``. Each
            combination of values with each retrieval quality is a setting. ``"retriever"`` may also vary,
            for natural retrieval: ``"bm25"`` and ``"dense"``.
        options: Replace the pipeline's options. Settings, methods and task formats override some of them.
        prompt_template: The prompt for tasks without one, with ``{context}`` and then ``{question}``.
        about: JSON-compatible data about the tasks, copied to the report's settings.
        journal_folder: Folder in which every complete answer is written to ``answers.jsonl``. An interrupted
            run continues when it is started again with the same arguments.
        on_event: Called with every event of every answer, with its method and question.
        on_answer: Called with every complete answer, including those read from the journal.

    Raises:
        ConfigurationError: The options contradict the methods, there is no task, a method is unknown or named
            twice, a sweep is not allowed, a task lacks data that the retrieval quality needs, or the journal
            belongs to another run.
        RapidError: A question cannot be answered, for example because its prompt is too long.
    """
    options = options or pipeline.options
    chosen = [make_method(method) if isinstance(method, str) else method for method in methods]
    settings = make_settings(retrieval, sweep or {})
    for setting in settings:
        _check(chosen, setting.applied_to(options))
    sources = asked_in(chosen, settings, options)
    asks = [
        (method, setting)
        for setting in settings
        for method in chosen
        if sources[method.name, setting] == setting
    ]
    examiner = Examiner(pipeline, asks, options, prompt_template, on_event)
    records: list[AnswerRecord] = []
    about = about or {}
    with ExitStack() as stack:
        journal = None
        if journal_folder is not None:
            identity = run_identity(pipeline, chosen, settings, options, prompt_template, about)
            journal = stack.enter_context(open_journal(journal_folder, identity))
        started = time.perf_counter()
        for record in _answers(tasks, asks, examiner, journal):
            records.append(record)
            if on_answer is not None:
                on_answer(record)
        seconds = time.perf_counter() - started + (journal.elapsed_s if journal else 0)
    if not records:
        raise ConfigurationError("there is nothing to evaluate: give at least one task with a question.")
    return EvaluationReport(
        results=_results(records, chosen, sources),
        answers=tuple(records),
        settings={
            "target": pipeline.name,
            "drafter": _drafter_name(pipeline),
            "methods": [method.name for method in chosen],
            "retrieval": ",".join(dict.fromkeys(setting.retrieval for setting in settings)),
            "sweep": {name: list(values) for name, values in (sweep or {}).items()},
            "prompt_template": prompt_template,
            "metrics": examiner.metrics,
            "options": options.flat(),
            "device": str(pipeline.engine.target.device),
            "threads": torch.get_num_threads(),
            "cpus": os.cpu_count(),
            **machine(pipeline.engine.target.device),
            "seconds": seconds,
            **about,
        },
        versions=package_versions(),
    )


def _answers(
    tasks: Iterable[Task],
    asks: Sequence[tuple[Method, Setting]],
    examiner: Examiner,
    journal: Journal | None,
) -> Iterator[AnswerRecord]:
    """Yield the answers one by one, from the journal if it has them.

    The method that begins depends only on the numbers of the document and the question. The order is
    therefore the same after an interruption, and each method is the first to prefill some documents.
    """
    started = time.perf_counter()
    for document, task in enumerate(tasks):
        examiner.metric(task)
        if journal is not None:
            journal.begin(document, task)
        for question_number, question in enumerate(task.questions):
            first = (document + question_number) % len(asks)
            for method, setting in (*asks[first:], *asks[:first]):
                if journal is not None:
                    stored = journal.find(document, question_number, method.name, setting)
                    if stored is not None:
                        yield stored
                        continue
                record = replace(
                    examiner.ask(task, question, method, setting),
                    document=document,
                    question_number=question_number,
                )
                if journal is not None:
                    journal.add(record, time.perf_counter() - started)
                yield record


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


def _results(
    records: Sequence[AnswerRecord],
    methods: Sequence[Method],
    sources: Mapping[tuple[str, Setting], Setting],
) -> tuple[MethodResult, ...]:
    """The figures for each context, setting and method. Settings with common answers share them."""
    cells: dict[tuple[int, Setting, str], list[AnswerRecord]] = {}
    for record in records:
        cells.setdefault((record.context, record.setting, record.method), []).append(record)
    speculates = {method.name: method.speculates for method in methods}
    results = {key: MethodResult.of(cell, speculates=speculates[key[2]]) for key, cell in cells.items()}
    return tuple(
        replace(results[context, sources[method.name, setting], method.name], setting=setting)
        for context in dict.fromkeys(record.context for record in records)
        for setting in dict.fromkeys(setting for _, setting in sources)
        for method in methods
    )


def _drafter_name(pipeline: RapidPipeline) -> str | None:
    drafter: Any = pipeline.engine.drafter
    return None if drafter is None else str(drafter.name)

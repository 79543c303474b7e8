"""Ask every method every question of every task in every setting, in one run."""

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
from rapid_integrations.evaluation.answer_record import AnswerRecord
from rapid_integrations.evaluation.asking import EventCallback, Examiner
from rapid_integrations.evaluation.identity import run_identity
from rapid_integrations.evaluation.journal import Journal, open_journal
from rapid_integrations.evaluation.methods import Method, make_method
from rapid_integrations.evaluation.report import (
    EvaluationReport,
    MethodResult,
    machine,
    package_versions,
)
from rapid_integrations.evaluation.retrieval import RetrievalQuality
from rapid_integrations.evaluation.settings import Setting, asked_in, make_settings
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

    Every question is put to every method in every setting before the next one, so that a document is read
    once for all of them and a slow minute of the machine hits all alike; who begins changes from question to
    question. Each method first answers one short question that does not count. Settings that make no
    difference to a method share its answers.

    Args:
        pipeline: The models.
        tasks: Documents with questions; consumed one at a time.
        methods: Names, see :data:`METHOD_NAMES`, or methods of your own.
        retrieval: What the drafter, and the target of ``rag``, reads: ``"natural"``, what the pipeline's
            retriever finds; ``"gold"``, with the chunks that hold the evidence; ``"missing"``, without them;
            ``"unrelated"``, chunks of another document; ``"adversarial"``, with a passage that contradicts
            the evidence in its place. With several, each is a setting.
        sweep: Values of flat generation options, such as ``{"transfer_strength": (1, 5, 10)}``: each
            combination of them, with each quality of retrieval, is a setting. ``"retriever"`` may vary
            too: ``"bm25"`` and ``"dense"``, for natural retrieval.
        options: Instead of the pipeline's. A setting overrides what it sweeps, a method what makes it that
            method, a task's format the length of its answers.
        prompt_template: The prompt, with ``{context}`` and then ``{question}``, where a task has none.
        about: What the report's settings are to say about the tasks, as plain data.
        journal_folder: Keeps every answer there as soon as it is complete, in ``answers.jsonl``. A run that
            was interrupted goes on where it was when it is started again with the same arguments.
        on_event: Called with every event of every answer, the method and the question it belongs to.
        on_answer: Called with every answer when it is complete, and with those that the journal had.

    Raises:
        ConfigurationError: The options contradict the methods, there is no task, a method is unknown or named
            twice, a sweep is not allowed, a task lacks what the retrieval quality needs, or the journal is of
            another run.
        RapidError: What a question made impossible.
    """
    options = options or pipeline.options
    chosen = [make_method(method) if isinstance(method, str) else method for method in methods]
    settings = make_settings(retrieval, sweep or {})
    for setting in settings:
        _check(chosen, setting.applied_to(options))
    holds = asked_in(chosen, settings, options)
    asks = [
        (method, setting)
        for setting in settings
        for method in chosen
        if holds[method.name, setting] == setting
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
        results=_results(records, chosen, holds),
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
    """The answers one by one: those that the journal has, and those that are asked for.

    Whose turn it is depends on the question's place alone, so that it is the same after an interruption; it
    changes from document to document too, so that every method reads some of them first.
    """
    started = time.perf_counter()
    for document, task in enumerate(tasks):
        examiner.metric(task)
        if journal is not None:
            journal.begin(document, task)
        for question_number, question in enumerate(task.questions):
            turn = (document + question_number) % len(asks)
            for method, setting in (*asks[turn:], *asks[:turn]):
                if journal is not None:
                    known = journal.find(document, question_number, method.name, setting)
                    if known is not None:
                        yield known
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
    holds: Mapping[tuple[str, Setting], Setting],
) -> tuple[MethodResult, ...]:
    """A cell for each context, setting and method."""
    cells: dict[tuple[int, Setting, str], list[AnswerRecord]] = {}
    for record in records:
        cells.setdefault((record.context, record.setting, record.method), []).append(record)
    speculates = {method.name: method.speculates for method in methods}
    # A cell that holds for several settings is worked out once.
    found = {key: MethodResult.of(cell, speculates=speculates[key[2]]) for key, cell in cells.items()}
    return tuple(
        replace(found[context, holds[method.name, setting], method.name], setting=setting)
        for context in dict.fromkeys(record.context for record in records)
        for setting in dict.fromkeys(setting for _, setting in holds)
        for method in methods
    )


def _drafter_name(pipeline: RapidPipeline) -> str | None:
    drafter: Any = pipeline.engine.drafter
    return None if drafter is None else str(drafter.name)

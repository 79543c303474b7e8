"""``rapid eval``: an evaluation, with progress, tables and files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from rapid_integrations.evaluation.methods import make_method
from rapid_integrations.evaluation.progress import answering_progress
from rapid_integrations.evaluation.report import AnswerRecord, EvaluationReport
from rapid_integrations.evaluation.retrieval import RetrievalQuality
from rapid_integrations.evaluation.runner import evaluate
from rapid_integrations.evaluation.settings import asked_in, make_settings
from rapid_integrations.evaluation.sources import TaskSource
from rapid_integrations.evaluation.tables import (
    context_label,
    group_table,
    method_label,
    report_table,
    settings_line,
)
from rapid_integrations.pipeline import RapidPipeline


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """What ``rapid eval`` was asked to measure.

    Attributes:
        methods: Names of methods.
        source: What is asked.
        retrievals: Qualities of retrieval.
        sweep: Values of flat generation options.
    """

    methods: list[str]
    source: TaskSource
    retrievals: tuple[RetrievalQuality, ...] = ("natural",)
    sweep: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def run(self, pipeline: RapidPipeline, json_file: Path | None) -> EvaluationReport:
        """Measure; progress goes to stderr, tables to stdout, everything to the file.

        Args:
            pipeline: The models.
            json_file: Written when all is done; ``None`` writes nothing.

        Raises:
            RapidError: As :func:`evaluate`.
            OSError: The file cannot be written.
        """
        console, progress_console = Console(), Console(stderr=True)
        methods = [make_method(name) for name in self.methods]
        settings = make_settings(self.retrievals, self.sweep)
        asks = {(name, asked) for (name, _), asked in asked_in(methods, settings, pipeline.options).items()}
        with answering_progress(progress_console) as progress:
            bar = progress.add_task("preparing", total=self.source.num_questions * len(asks))

            def show(record: AnswerRecord) -> None:
                description = f"{context_label(record.context)}, {method_label(record.method)}"
                progress.update(bar, advance=1, description=description)

            report = evaluate(
                pipeline,
                self.source.tasks(pipeline),
                methods,
                retrieval=self.retrievals,
                sweep=self.sweep,
                about={"task": self.source.name, **self.source.settings()},
                on_answer=show,
            )
        self._print(report, console)
        if json_file is not None:
            json_file.write_text(json.dumps(report.as_dict(), indent=1) + "\n", encoding="utf-8")
            progress_console.print(f"written to {json_file}", highlight=False, soft_wrap=True)
        return report

    def _print(self, report: EvaluationReport, console: Console) -> None:
        """Tables for each setting, under its name where there are several."""
        grouped = self.source.name != "demo" and any(record.kind for record in report.answers)
        for setting in report.swept:
            part = report.within(setting)
            if len(report.swept) > 1:
                console.print(setting.label, style="bold", highlight=False, soft_wrap=True)
            console.print(report_table(part))
            if grouped:
                console.print()
                console.print(group_table(part.answers, self.methods))
            if len(report.swept) > 1:
                console.print()
        console.print(settings_line(report.settings), style="dim", highlight=False)

"""``rapid eval``: an evaluation, with progress, a table and a JSON file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from rapid_integrations.evaluation.matching import Match, match_methods
from rapid_integrations.evaluation.methods import Method, make_method
from rapid_integrations.evaluation.progress import answering_progress
from rapid_integrations.evaluation.report import AnswerRecord, EvaluationReport
from rapid_integrations.evaluation.retrieval import RetrievalQuality
from rapid_integrations.evaluation.runner import evaluate
from rapid_integrations.evaluation.sources import TaskSource
from rapid_integrations.evaluation.tables import (
    context_label,
    group_table,
    match_line,
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
        retrieval: Its quality.
        match_acceptance: A method's name: the others are tuned to accept as much first.
    """

    methods: list[str]
    source: TaskSource
    retrieval: RetrievalQuality
    match_acceptance: str | None = None

    def run(self, pipeline: RapidPipeline, json_file: Path | None) -> EvaluationReport:
        """Measure; progress goes to stderr, the table to stdout, everything to the file.

        Args:
            pipeline: The models.
            json_file: Written when all is done; ``None`` writes nothing.

        Raises:
            RapidError: As :func:`evaluate`.
            OSError: The file cannot be written.
        """
        console, progress_console = Console(), Console(stderr=True)
        methods: Sequence[Method] = [make_method(name) for name in self.methods]
        matches: list[Match] = []
        if self.match_acceptance is not None:
            with progress_console.status(f"matching the acceptance of {self.match_acceptance}"):
                methods, matches = match_methods(
                    pipeline, self.source, self.methods, self.match_acceptance, retrieval=self.retrieval
                )
        total = self.source.num_questions * len(self.methods)
        with answering_progress(progress_console) as progress:
            bar = progress.add_task("preparing", total=total)

            def show(record: AnswerRecord) -> None:
                description = f"{context_label(record.context)}, {method_label(record.method)}"
                progress.update(bar, advance=1, description=description)

            tasks = self.source.tasks(pipeline)
            report = evaluate(pipeline, tasks, methods, retrieval=self.retrieval, on_answer=show)
        report = EvaluationReport(
            report.results,
            report.answers,
            {
                **report.settings,
                "task": self.source.name,
                **self.source.settings(),
                "matched": {match.method.name: match.as_dict() for match in matches},
            },
            report.versions,
        )
        console.print(report_table(report))
        if self.source.name != "demo" and any(record.kind for record in report.answers):
            console.print()
            console.print(group_table(report.answers, self.methods))
        for match in matches:
            console.print(match_line(match), style="dim", highlight=False)
        console.print(settings_line(report.settings), style="dim", highlight=False)
        if json_file is not None:
            json_file.write_text(json.dumps(report.as_dict(), indent=1) + "\n", encoding="utf-8")
            progress_console.print(f"written to {json_file}", highlight=False, soft_wrap=True)
        return report

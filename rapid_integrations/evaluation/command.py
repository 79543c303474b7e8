"""The implementation of ``rapid eval``: an evaluation with progress, tables and result files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation.methods.choice import make_method
from rapid_integrations.evaluation.methods.method import Method
from rapid_integrations.evaluation.methods.settings import asked_in, make_settings
from rapid_integrations.evaluation.page import check_page, write_page
from rapid_integrations.evaluation.progress import answering_progress
from rapid_integrations.evaluation.results.answer_record import AnswerRecord
from rapid_integrations.evaluation.results.groups import are_grouped
from rapid_integrations.evaluation.results.report import EvaluationReport
from rapid_integrations.evaluation.running.matching import Match, match_methods
from rapid_integrations.evaluation.running.runner import evaluate
from rapid_integrations.evaluation.tables import (
    context_label,
    group_table,
    match_line,
    method_label,
    report_table,
    settings_line,
)
from rapid_integrations.evaluation.tasks.retrieval_quality import RetrievalQuality
from rapid_integrations.evaluation.tasks.sources import TaskSource
from rapid_integrations.pipeline import RapidPipeline

RESULTS_FILE = "results.json"


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """An evaluation to run.

    Attributes:
        methods: Names of methods.
        source: The tasks.
        retrievals: Qualities of retrieval.
        sweep: Values of flat generation options.
        embeddings: The embedding model that ranks passages; ``None`` ranks them by BM25.
        report_folder: Where answers are stored as soon as they are complete, and where the page is written.
            An interrupted run continues with the answers in it.
        match_acceptance: The name of a method. The others are tuned to its acceptance first, with the first
            of the qualities.
    """

    methods: list[str]
    source: TaskSource
    retrievals: tuple[RetrievalQuality, ...] = ("natural",)
    sweep: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    embeddings: str | None = None
    report_folder: Path | None = None
    match_acceptance: str | None = None

    def __post_init__(self) -> None:
        """Check before models are loaded that retriever and packages are available.

        Raises:
            ConfigurationError: Dense retrieval has no embedding model, or the page has no matplotlib.
        """
        if self.report_folder is not None:
            check_page()
        if "dense" in self.sweep.get("retriever", ()) and self.embeddings is None:
            raise ConfigurationError(
                "the sweep of retriever has 'dense', which ranks passages by an embedding model: name one "
                "with --embeddings, for example BAAI/bge-m3."
            )

    def run(self, pipeline: RapidPipeline, json_file: Path | None) -> EvaluationReport:
        """Run the evaluation. Progress goes to stderr, tables to stdout, and all results to the file.

        Args:
            pipeline: The models.
            json_file: The file for the results; ``None`` writes none.

        Raises:
            RapidError: As :func:`evaluate`.
            OSError: A file cannot be written.
        """
        console, progress_console = Console(), Console(stderr=True)
        methods: Sequence[Method] = [make_method(name) for name in self.methods]
        matches: list[Match] = []
        if self.match_acceptance is not None:
            with progress_console.status(f"matching the acceptance of {self.match_acceptance}"):
                methods, matches = match_methods(
                    pipeline, self.source, self.methods, self.match_acceptance, retrieval=self.retrievals[0]
                )
        settings = make_settings(self.retrievals, self.sweep)
        asks = {(name, asked) for (name, _), asked in asked_in(methods, settings, pipeline.options).items()}
        with answering_progress(progress_console) as progress:
            bar = progress.add_task("preparing", total=self.source.num_questions * len(asks))

            def show(record: AnswerRecord) -> None:
                description = f"{context_label(record.context)}, {method_label(record.method)}"
                progress.update(bar, advance=1, description=description)

            try:
                report = evaluate(
                    pipeline,
                    self.source.tasks(pipeline),
                    methods,
                    retrieval=self.retrievals,
                    sweep=self.sweep,
                    about={
                        "task": self.source.name,
                        **self.source.settings(),
                        "embeddings": self.embeddings,
                        "matched": {match.method.name: match.as_dict() for match in matches},
                    },
                    journal_folder=self.report_folder,
                    on_answer=show,
                )
            except KeyboardInterrupt:
                if self.report_folder is not None:
                    kept = f"the answers so far are in {self.report_folder}: repeat the command to continue"
                    progress_console.print(kept, highlight=False, soft_wrap=True)
                raise
        self._print(report, console)
        for match in matches:
            console.print(match_line(match), style="dim", highlight=False)
        files = [json_file, None if self.report_folder is None else self.report_folder / RESULTS_FILE]
        text = json.dumps(report.as_dict(), indent=1) + "\n"
        for file in (file for file in files if file is not None):
            write_whole(file, text)
            progress_console.print(f"written to {file}", highlight=False, soft_wrap=True)
        if self.report_folder is not None:
            page = write_page(report, self.report_folder)
            progress_console.print(f"open {page} in a browser", highlight=False, soft_wrap=True)
        return report

    def _print(self, report: EvaluationReport, console: Console) -> None:
        """Print the tables of each setting, under its name if there are several."""
        grouped = are_grouped(report.answers)
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


def write_whole(file: Path, text: str) -> None:
    """Write a file atomically: it keeps its old contents until the new ones are complete.

    Raises:
        OSError: The file cannot be written.
    """
    unfinished = file.with_name(f".{file.name}.new")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(file)

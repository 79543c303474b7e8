"""The implementation of ``rapid demo``: four methods answer questions with the bundled models."""

from __future__ import annotations

import time

from rich.console import Console
from rich.live import Live
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from rapid_integrations.demo import sample_documents
from rapid_integrations.evaluation.methods.engine_methods import RAPID
from rapid_integrations.evaluation.methods.method import Case, Method
from rapid_integrations.evaluation.results.report import EvaluationReport
from rapid_integrations.evaluation.running.runner import evaluate
from rapid_integrations.evaluation.scoring.answer_metrics import exact_match
from rapid_integrations.evaluation.tables import demo_table
from rapid_integrations.evaluation.tasks.task import Task, TaskQuestion, demo_task
from rapid_integrations.events import Completion, PrefillProgress, TextDelta, TextEvent
from rapid_integrations.pipeline import RapidPipeline

_CONTEXT = 16384
# RAPID answers first, so the live display includes the prefill of the document.
_METHODS = ("rapid", "lc", "rag", "sd")
_SHOWN_METHODS = ("lc", "rag", "sd", "rapid")
# A prefill of fewer tokens shows no progress bar.
_MIN_SHOWN_PREFILL = 2000
_INDENT = (0, 0, 0, 4)

_ADVICE = """\
This pair knows only the little language of its documents.
For your own documents, take real models:

  rapid ask --document report.pdf --question "What was agreed?" \\
    --target Qwen/Qwen2.5-7B-Instruct --drafter Qwen/Qwen2.5-0.5B-Instruct
"""


def show(num_questions: int) -> EvaluationReport:
    """Run the demonstration on stdout.

    Args:
        num_questions: Number of questions about the sample document, 1 to 10.
    """
    console = Console(highlight=False)
    started = time.perf_counter()
    pipeline = RapidPipeline.demo()
    document = sample_documents()[1]
    whole = demo_task(document, context=_CONTEXT)
    task = Task(whole.document, _interleaved(whole.questions)[:num_questions], _CONTEXT)
    console.print(
        f"[bold]{document.title}[/bold], {pipeline.count_tokens(document.text):,} tokens: "
        f"{len(task.questions)} questions.\n"
        "RAPID answers live; three other methods answer too, for comparison.\n"
    )
    display = _LiveDisplay(console, task)
    try:
        report = evaluate(pipeline, [task], _METHODS, on_event=display.show)
    finally:
        display.stop()
    ordered = EvaluationReport(
        tuple(report.result(name, _CONTEXT) for name in _SHOWN_METHODS),
        report.answers,
        report.settings,
        report.versions,
    )
    console.print(demo_table(ordered))
    console.print()
    console.print(_prefill_summary(report))
    console.print(f"All of it took {time.perf_counter() - started:.0f} s.\n", style="dim")
    console.print(_ADVICE, soft_wrap=True, end="")
    return ordered


def _interleaved(questions: tuple[TaskQuestion, ...]) -> tuple[TaskQuestion, ...]:
    """The questions in an order that alternates between kinds."""
    turns: dict[str, int] = {}
    ranked = []
    for question in questions:
        turns[question.kind] = turns.get(question.kind, 0) + 1
        ranked.append((turns[question.kind], question))
    return tuple(question for _, question in sorted(ranked, key=lambda pair: pair[0]))


def _prefill_summary(report: EvaluationReport) -> str:
    """A sentence about the number of times that the document was prefilled."""
    over_document = [record for record in report.answers if record.method != "rag"]
    reused = [record for record in over_document if record.stats.reused_prefix_tokens > _CONTEXT // 2]
    seconds = max(record.stats.prefill_s for record in over_document)
    return (
        f"The document was read once, in {seconds:.1f} s: {len(reused)} of {len(over_document)} answers over "
        f"it reused it ({min(r.stats.reused_prefix_tokens for r in reused):,} tokens or more each)."
        if reused
        else f"The document was read in {seconds:.1f} s."
    )


class _LiveDisplay:
    """Shows a progress bar during the prefill of the document, and RAPID's answers while they grow.

    Args:
        console: The terminal or file to write to.
        task: The document and its questions.
    """

    def __init__(self, console: Console, task: Task) -> None:
        self._console = console
        self._numbers = {question.question: i for i, question in enumerate(task.questions, start=1)}
        self._prefill_bar: tuple[Progress, TaskID] | None = None
        self._live: Live | None = None
        self._answer = ""
        self._waiting = console.status("") if console.is_terminal else None

    def show(self, method: Method, case: Case, event: TextEvent) -> None:
        """Show one event."""
        if method.name != RAPID.name:
            self._show_waiting(method)
            return
        match event:
            case PrefillProgress(done, total):
                self._show_prefill(done, total)
            case TextDelta(text):
                self._show_text(case, text)
            case Completion():
                self._finish(case, event)

    def stop(self) -> None:
        """Remove all animated parts. Idempotent."""
        for animated in (self._waiting, self._live, self._prefill_bar and self._prefill_bar[0]):
            if animated is not None:
                animated.stop()

    def _show_prefill(self, done: int, total: int) -> None:
        if self._prefill_bar is None:
            if total < _MIN_SHOWN_PREFILL:
                return
            progress = Progress(
                TextColumn("Reading the document"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("tokens"),
                TimeElapsedColumn(),
                console=self._console,
            )
            self._prefill_bar = progress, progress.add_task("", total=total)
            progress.start()
        progress, bar = self._prefill_bar
        progress.update(bar, completed=done)
        if done == total:
            progress.stop()
            self._prefill_bar = None
            self._console.print()

    def _show_text(self, case: Case, text: str) -> None:
        """Add text to the answer. A terminal shows it at once, a file when the answer is complete."""
        if not self._answer:
            self.stop()
            number = self._numbers[case.question.question]
            self._console.print(Text(f"{number:>2}. {case.question.question}", style="bold"))
            if self._console.is_terminal:
                self._live = Live(console=self._console, auto_refresh=False, transient=True)
                self._live.start()
        self._answer += text
        if self._live is not None:
            self._live.update(Padding(Text(self._answer), _INDENT, expand=False), refresh=True)

    def _finish(self, case: Case, completion: Completion) -> None:
        if not self._answer:
            self._show_text(case, "(no answer)")
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._console.print(Padding(Text(self._answer), _INDENT, expand=False))
        self._answer = ""
        stats = completion.stats
        right = exact_match(completion.text, case.question.answers)
        verdict = ("✓ right", "green") if right else ("✗ wrong", "red")
        figures = f"  {stats.decode_tokens_per_s:.0f} tokens/s, {stats.tokens_per_round:.1f} a round"
        if stats.reused_prefix_tokens > _CONTEXT // 2:
            figures += f", {stats.reused_prefix_tokens:,} tokens not read again"
        self._console.print(Padding(Text.assemble(verdict, (figures, "dim")), _INDENT, expand=False))
        if not right:
            self._console.print(
                Padding(Text(f"expected: {case.question.answers[0]}", "dim"), _INDENT, expand=False)
            )
        self._console.print()

    def _show_waiting(self, method: Method) -> None:
        if self._waiting is not None:
            self._waiting.update(f"the same question: {method.label}")
            self._waiting.start()

"""The implementation of ``rapid demo``: several methods answer questions, and RAPID's answers appear live.

The bundled pair answers about a generated document, and other models about the harbour handbook.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.live import Live
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from rapid_integrations.demo import PROMPT_TEMPLATE, generate_documents, harbour_handbook
from rapid_integrations.demo.documents import HARBOUR_QUESTIONS_PATH
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation.methods.engine_methods import RAPID
from rapid_integrations.evaluation.methods.method import Case, Method
from rapid_integrations.evaluation.results.report import EvaluationReport
from rapid_integrations.evaluation.running.runner import evaluate
from rapid_integrations.evaluation.scoring.answer_metrics import make_metric
from rapid_integrations.evaluation.tables import demo_table
from rapid_integrations.evaluation.tasks.own_data import OwnData
from rapid_integrations.evaluation.tasks.task import Task, demo_task
from rapid_integrations.events import Completion, PrefillProgress, TextDelta, TextEvent
from rapid_integrations.pipeline import RapidPipeline

BUNDLED_QUESTIONS, HANDBOOK_QUESTIONS = 10, 12
"""Numbers of questions that can be asked about the bundled pair's document and about the handbook."""

HANDBOOK_OPTIONS: Mapping[str, int] = {
    "retrieval_chunk_tokens": 128,
    "retrieval_max_tokens": 512,
    "max_new_tokens": 48,
}
"""The options for the handbook, whose facts are a sentence each."""

_CONTEXT = 16384
# The seed of seeds 0 to 9 whose document comes nearest to the committed evaluation at this length (200
# questions: long context 67.0 % right, RAPID 75.5 %), by the sum of both distances. Over the six questions
# that are asked by default, seeds 3, 5 and 8 are equally near, with 4 and 5 right answers; over all ten
# questions, seed 3 is the nearest of them, with 7 and 8.
_SEED = 3
# RAPID answers first, so the live display includes the prefill of the document.
_BUNDLED_METHODS = ("rapid", "lc", "rag", "sd")
_HANDBOOK_METHODS = ("rapid", "lc")
_SHOWN_ORDER = ("lc", "rag", "sd", "rapid")
_SHOWN_SOURCES = 3
_SOURCE_CHARACTERS = 70
# A prefill of fewer tokens shows no progress bar.
_MIN_SHOWN_PREFILL = 2000
_INDENT = (0, 0, 0, 4)

_ADVICE = """\
This pair knows only the little language of its documents.
For English and your own documents, take real models:

  rapid demo --target Qwen/Qwen2.5-7B-Instruct \\
    --drafter Qwen/Qwen2.5-0.5B-Instruct
  rapid ask --document report.pdf --question "What was agreed?" \\
    --target Qwen/Qwen2.5-7B-Instruct --drafter Qwen/Qwen2.5-0.5B-Instruct
"""


def show(pipeline: RapidPipeline, num_questions: int) -> EvaluationReport:
    """Show the bundled pair on stdout: four methods answer about a generated document.

    Args:
        pipeline: The bundled pair.
        num_questions: Number of questions, 1 to :data:`BUNDLED_QUESTIONS`.

    Raises:
        ConfigurationError: There are more questions than that.
    """
    _check_questions(num_questions, BUNDLED_QUESTIONS, "the bundled pair's document")
    (document,) = generate_documents(
        num_tokens=_CONTEXT, num_documents=1, questions_per_document=BUNDLED_QUESTIONS, seed=_SEED
    )
    whole = demo_task(document, context=_CONTEXT)
    task = Task(whole.document, whole.questions[:num_questions], _CONTEXT)
    report = _show(pipeline, task, document.title, _BUNDLED_METHODS, PROMPT_TEMPLATE)
    Console(highlight=False).print(_ADVICE, soft_wrap=True, end="")
    return report


def show_handbook(pipeline: RapidPipeline, num_questions: int, prompt_template: str) -> EvaluationReport:
    """Show any models on stdout: RAPID and plain decoding answer about the harbour handbook.

    An answer is right if it contains one of the question's accepted answers.

    Args:
        pipeline: The models.
        num_questions: Number of questions, 1 to :data:`HANDBOOK_QUESTIONS`.
        prompt_template: Text with ``{context}`` and then ``{question}``.

    Raises:
        ConfigurationError: There are more questions than that.
        ContextLengthError: The handbook does not fit into the target's context window.
    """
    _check_questions(num_questions, HANDBOOK_QUESTIONS, "the handbook")
    data = OwnData.read(
        HARBOUR_QUESTIONS_PATH,
        metric="contains",
        prompt_template=prompt_template,
        max_questions=num_questions,
    )
    (task,) = data.tasks(pipeline)
    return _show(pipeline, task, harbour_handbook().title, _HANDBOOK_METHODS, prompt_template)


def _check_questions(number: int, maximum: int, document: str) -> None:
    if not 1 <= number <= maximum:
        raise ConfigurationError(
            f"--questions {number}: there are {maximum} questions about {document}. Ask 1 to {maximum}."
        )


def _show(
    pipeline: RapidPipeline, task: Task, title: str, methods: Sequence[str], prompt_template: str
) -> EvaluationReport:
    """Ask a task's questions with a live display, and print the table of all methods."""
    console = Console(highlight=False)
    started = time.perf_counter()
    compared = "three other methods answer" if len(methods) > 2 else "plain decoding answers"
    console.print(
        f"[bold]{title}[/bold], {pipeline.count_tokens(task.document):,} tokens: "
        f"{len(task.questions)} questions.\n"
        f"RAPID answers live; {compared} too, for comparison.\n"
    )
    display = _LiveDisplay(console, task, shows_sources=methods == _HANDBOOK_METHODS)
    try:
        report = evaluate(pipeline, [task], methods, prompt_template=prompt_template, on_event=display.show)
    finally:
        display.stop()
    ordered = EvaluationReport(
        tuple(report.result(name, task.context) for name in _SHOWN_ORDER if name in methods),
        report.answers,
        report.settings,
        report.versions,
    )
    console.print(demo_table(ordered))
    console.print()
    console.print(_prefill_summary(report))
    console.print(f"All of it took {time.perf_counter() - started:.0f} s.\n", style="dim")
    return ordered


def _prefill_summary(report: EvaluationReport) -> str:
    """A sentence about the number of times that the document was prefilled."""
    over_document = [record for record in report.answers if record.method != "rag"]
    reused = [r for r in over_document if r.stats.reused_prefix_tokens > r.context // 2]
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
        shows_sources: Whether to show the passages that the drafter read.
    """

    def __init__(self, console: Console, task: Task, *, shows_sources: bool) -> None:
        self._console = console
        self._task = task
        self._shows_sources = shows_sources
        self._metric = make_metric(task.format.metric)
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
        right = self._metric(completion.text, case.question.answers) == 1
        verdict = ("✓ right", "green") if right else ("✗ wrong", "red")
        figures = f"  {stats.decode_tokens_per_s:.0f} tokens/s, {stats.tokens_per_round:.1f} a round"
        if stats.reused_prefix_tokens > self._task.context // 2:
            figures += f", {stats.reused_prefix_tokens:,} tokens not read again"
        self._console.print(Padding(Text.assemble(verdict, (figures, "dim")), _INDENT, expand=False))
        if not right:
            self._print_dim(f"expected: {case.question.answers[0]}")
        if self._shows_sources:
            self._show_sources(case)
        self._console.print()

    def _print_dim(self, text: str) -> None:
        self._console.print(Padding(Text(text, "dim"), _INDENT, expand=False))

    def _show_sources(self, case: Case) -> None:
        """Show the start of the best passages that the drafter read."""
        retrieved = case.found.retrieved
        ranked = sorted(retrieved.chunks, key=lambda chunk: -(chunk.score or 0.0))
        evidence = "with" if case.found.holds_evidence else "without"
        self._print_dim(f"the drafter read {len(ranked)} passages, {evidence} the evidence; the best are:")
        for chunk in ranked[:_SHOWN_SOURCES]:
            start = " ".join(chunk.text.split())
            self._print_dim(f"- {textwrap.shorten(start, _SOURCE_CHARACTERS, placeholder=' …')}")

    def _show_waiting(self, method: Method) -> None:
        if self._waiting is not None:
            self._waiting.update(f"the same question: {method.label}")
            self._waiting.start()

"""Writes the page: fills the templates with figures and answers, and draws the plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from rapid_integrations.evaluation.methods.settings import Setting
from rapid_integrations.evaluation.page.plots import Plots
from rapid_integrations.evaluation.page.questions import question_pages, questions_of
from rapid_integrations.evaluation.page.summary import GroupRow, Row, SplitGroup, Summary
from rapid_integrations.evaluation.plotting import check_plotting
from rapid_integrations.evaluation.results.report import EvaluationReport
from rapid_integrations.evaluation.scoring.answer_metrics import GRADED_METRICS
from rapid_integrations.evaluation.tables import context_label, method_label

REPORT_FILE = "report.html"
# With more characters of questions, answers and chunks, the questions go to pages of their own.
_MAX_CHARACTERS = 300_000
# Characters that HTML does not allow: control characters except tab and line feed, and single surrogates.
_NOT_IN_HTML = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160), *range(0xD800, 0xE000)), "\ufffd")


@dataclass(frozen=True, slots=True)
class _Section:
    """The part of the page about one setting."""

    label: str
    rows: list[list[Row]]
    faster: list[str]
    plots: list[tuple[str, str]]
    splits: list[tuple[str, list[SplitGroup]]]
    groups: dict[int, list[GroupRow]]


def check_page() -> None:
    """Check that the page can be written, before anything is measured.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    check_plotting("--report", "eval")


def write_page(report: EvaluationReport, folder: Path) -> Path:
    """Write a report as a page that needs no network: styles, images and scripts are all local.

    Many questions go to pages of their own, ``questions-CONTEXT-NUMBER.html``, which the report links to. An
    earlier page in the folder is replaced.

    Args:
        report: The results.
        folder: Created if it does not exist.

    Returns:
        ``report.html`` in ``folder``.

    Raises:
        ConfigurationError: matplotlib is not installed.
        OSError: A file cannot be written.
    """
    check_page()
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob("questions-*-*.html"):
        earlier.unlink()
    summary = Summary(report)
    questions = questions_of(report)
    pages = []
    if sum(question.characters for question in questions) > _MAX_CHARACTERS:
        pages = question_pages(questions)
    environment = _environment()
    shared = {"methods": summary.methods, "several_settings": len(report.swept) > 1}
    for page in pages:
        _write(folder / page.name, environment.get_template("questions.html").render(shared, page=page))
    changes = summary.changes()
    settings = report.settings
    target, drafter = (Path(str(settings.get(name) or "unknown")).name for name in ("target", "drafter"))
    _write(
        folder / REPORT_FILE,
        environment.get_template("report.html").render(
            shared,
            report=report,
            target=target,
            drafter=drafter if settings.get("drafter") else "the target itself",
            machine=_machine_line(report),
            settings=[(name, _shown(value)) for name, value in settings.items()],
            num_questions=len(questions),
            graded=bool(GRADED_METRICS.intersection(settings.get("metrics", ()))),
            sections=_sections(summary, folder),
            others=[name for name in summary.methods if name not in ("lc", "rag")],
            changes=changes,
            option_names=list(dict.fromkeys(name for change in changes for name in change.options)),
            questions=questions,
            pages=pages,
        ),
    )
    return folder / REPORT_FILE


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("rapid_integrations.evaluation.page"),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["context_label"] = context_label
    environment.filters["method_label"] = method_label
    environment.filters["thousands"] = "{:,}".format
    environment.filters["option"] = lambda value: f"{value:g}" if isinstance(value, float) else _shown(value)
    return environment


def _sections(summary: Summary, folder: Path) -> list[_Section]:
    plots = Plots(folder, summary.methods)
    return [
        _section(summary, setting, plots, number)
        for number, setting in enumerate(summary.report.swept, start=1)
    ]


def _section(summary: Summary, setting: Setting, plots: Plots, number: int) -> _Section:
    """The tables and plots of one setting, without plots that would be empty."""
    rows = summary.rows(setting)
    all_rows = [row for context_rows in rows for row in context_rows]
    drawn = [(plots.accuracy(f"accuracy-{number}.png", rows), "Scores over context")]
    if any(row.result.acceptance_rate is not None for row in all_rows):
        drawn.append((plots.acceptance(f"acceptance-{number}.png", rows), "Acceptance over context"))
    if any(row.speed_up is not None and row.result.method != "lc" for row in all_rows):
        drawn.append((plots.speed(f"speed-{number}.png", rows), "Decoding speed over context"))
    all_contexts = summary.split(setting, summary.contexts)
    splits = []
    if all_contexts and any(group.right for group in all_contexts):
        alt = "Right answers where long context and retrieval agree or not"
        drawn.append((plots.split(f"split-{number}.png", all_contexts), alt))
        if len(summary.contexts) > 1:
            splits = [
                (context_label(context), summary.split(setting, [context])) for context in summary.contexts
            ]
        splits.append(("all", all_contexts))
    return _Section(setting.label, rows, _faster(summary, setting), drawn, splits, summary.groups(setting))


def _faster(summary: Summary, setting: Setting) -> list[str]:
    """One sentence for each speculating method: the contexts at which it is faster than long context."""
    if "lc" not in summary.methods:
        return []
    lines = []
    for name in summary.speculating():
        context = summary.faster_from(setting, name)
        if context is None:
            longest = context_label(max(summary.contexts))
            lines.append(
                f"{_capitalised(method_label(name))} does not decode faster than long context at {longest}."
            )
        else:
            where = f"from {context_label(context)} on" if context > min(summary.contexts) else "throughout"
            lines.append(f"{_capitalised(method_label(name))} decodes faster than long context {where}.")
    return lines


def _capitalised(label: str) -> str:
    return label[:1].upper() + label[1:]


def _machine_line(report: EvaluationReport) -> str:
    """A line about the hardware, as far as the report names it."""
    settings = report.settings
    parts = [str(settings[name]) for name in ("accelerator", "processor", "system") if settings.get(name)]
    device = settings.get("device")
    if device is not None:
        count = settings.get("threads")
        threads = f" with {count} {'thread' if count == 1 else 'threads'}" if count else ""
        parts.append(f"Computed on {device}{threads}")
    return ". ".join(parts) + "." if parts else ""


def _shown(value: Any) -> str:
    """A value of the report's settings as text."""
    if value is None:
        return "–"
    if isinstance(value, dict):
        return "\n".join(f"{name}: {_shown(item)}" for name, item in value.items())
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return ", ".join(_shown(item) for item in value)
    return json.dumps(value, default=str)


def _write(path: Path, html: str) -> None:
    path.write_text(html.translate(_NOT_IN_HTML), encoding="utf-8", newline="\n")

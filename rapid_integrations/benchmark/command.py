"""``rapid bench``: measures a plan, prints its tables, and writes the JSON file and the plots."""

from __future__ import annotations

import dataclasses
import json
import time
from importlib import metadata
from pathlib import Path

from rich.console import Console

from rapid_integrations.benchmark.baselines import BASELINES
from rapid_integrations.benchmark.models import ModelChoice
from rapid_integrations.benchmark.plan import BenchmarkPlan, CellPlan
from rapid_integrations.benchmark.plots import NEEDED, write_plots
from rapid_integrations.benchmark.processes import Workers
from rapid_integrations.benchmark.results import BenchmarkReport
from rapid_integrations.benchmark.runner import Measurement
from rapid_integrations.benchmark.tables import method_label, table_console, tables
from rapid_integrations.benchmark.work import make_task
from rapid_integrations.errors import GenerationError
from rapid_integrations.evaluation.plotting import check_plotting
from rapid_integrations.evaluation.progress import answering_progress
from rapid_integrations.evaluation.results.environment import machine, package_versions
from rapid_integrations.evaluation.tables import context_label

_WARM_UP_TOKENS = 512
_WIDTH = 110
_HOST_PACKAGES = (
    "langchain-core",
    "langchain-huggingface",
    "llama-index-core",
    "llama-index-llms-huggingface",
)


def run_benchmark(
    plan: BenchmarkPlan,
    models: ModelChoice,
    *,
    json_file: Path | None = None,
    plot_folder: Path | None = None,
) -> BenchmarkReport:
    """Measure a plan. Progress goes to stderr and tables to stdout.

    Args:
        plan: The work to measure.
        models: The models to measure it on.
        json_file: The file for the report with all samples; ``None`` writes none.
        plot_folder: The folder of the plots; ``None`` draws none.

    Raises:
        GenerationError: Answers of lossless baselines differ from the reference. It is raised after all
            results are written.
        RapidError: The models cannot be loaded, a package is missing, or a question cannot be answered.
        OSError: A file cannot be written.
    """
    if plot_folder is not None:
        check_plotting(*NEEDED)
    console, progress_console = table_console(_WIDTH), Console(stderr=True)
    started = time.perf_counter()
    tokenizer = models.load_tokenizer()

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    groups = list(plan.groups(count_tokens))
    cells = [cell for group in groups for cell in group.cells]
    warm_up = make_task(context=_WARM_UP_TOKENS, num_questions=1, seed=plan.seed, count_tokens=count_tokens)
    with Workers(plan.runtimes, models) as workers, answering_progress(progress_console) as progress:
        total = sum(cell.repeats + (not cell.cold) for cell in cells)
        bar = progress.add_task("warming up", total=total)

        def show(cell: CellPlan) -> None:
            description = f"{cell.suite}, {context_label(cell.task.context)}, {cell.baseline.label}"
            progress.update(bar, advance=1, description=description)

        measurement = Measurement(workers.run, show)
        measurement.warm_up(warm_up, cells)
        for group in groups:
            measurement.measure(group)
        computed_on = dict(workers.hardware)
    report = BenchmarkReport(
        cells=tuple(measurement.cells),
        differences=tuple(measurement.differences),
        settings={
            **{name: getattr(plan, name) for name in ("suites", "contexts", "batches", "repeats")},
            **{name: getattr(plan, name) for name in ("cold_tokens", "retrievals", "seed")},
            "baselines": [baseline.name for baseline in plan.baselines],
            "models": dataclasses.asdict(models),
            "seconds": time.perf_counter() - started,
        },
        hardware={**machine(), "runtimes": computed_on},
        versions={**package_versions(), **_host_versions()},
    )
    _print(report, console)
    if json_file is not None:
        json_file.write_text(json.dumps(report.as_dict(), indent=1) + "\n", encoding="utf-8")
        progress_console.print(f"written to {json_file}", highlight=False, soft_wrap=True)
    if plot_folder is not None:
        for path in write_plots(report, plot_folder):
            progress_console.print(f"written to {path}", highlight=False, soft_wrap=True)
    # Rounded keys and values may change answers: the report lists the differences, but they are no error.
    if report.differences and models.kv_dtype is None:
        raise GenerationError(_complaint(report))
    return report


def _print(report: BenchmarkReport, console: Console) -> None:
    for table in tables(report):
        console.print(table)
        console.print()
    seconds = report.settings["seconds"]
    first = next(iter(report.hardware["runtimes"].values()))
    lines = [
        f"{report.equal} of {report.compared} answers of lossless runs equal generate()'s, token for token "
        "(text for text for the host frameworks' classes). RAPID's may differ by design (η > 0).",
        f"{report.hardware['processor']}, {first['device']} with {first['threads']} threads; "
        f"{seconds:.0f} s in total. Figures are medians with the largest deviation of a run.",
    ]
    if (kv_dtype := report.settings["models"]["kv_dtype"]) is not None:
        lines.append(f"The engine held keys and values in {kv_dtype}: its answers may differ.")
    unlike = [cell for cell in report.cells if not all(sample.same_prompt for sample in cell.samples)]
    if skipped := sorted({method_label(cell) for cell in unlike}):
        lines.append(f"Not compared, because the prompt has other tokens there: {', '.join(skipped)}.")
    for line in lines:
        console.print(line, style="dim", highlight=False)


def _complaint(report: BenchmarkReport) -> str:
    first = report.differences[0]
    where = "" if first.position is None else f" from token {first.position} on"
    return (
        f"{len(report.differences)} answers of lossless runs differ from generate()'s; the first is "
        f"{BASELINES[first.baseline].label} at {context_label(first.context)}{where}: {first.answer!r} "
        f"instead of {first.expected!r}. --json lists them all."
    )


def _host_versions() -> dict[str, str]:
    versions = {}
    for package in _HOST_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # an extra that is not installed
            continue
    return versions

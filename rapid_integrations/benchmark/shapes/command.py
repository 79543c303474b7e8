"""``rapid bench-shape``: measures a plan, prints its tables and writes the JSON file."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from rapid_integrations.benchmark.shapes.bench import ShapeBench
from rapid_integrations.benchmark.shapes.plan import ShapePlan
from rapid_integrations.benchmark.shapes.report import ShapeReport, shape_tables
from rapid_integrations.benchmark.tables import table_console
from rapid_integrations.evaluation.progress import answering_progress

_WIDTH = 120


def run_shape_bench(plan: ShapePlan, *, json_file: Path | None = None) -> ShapeReport:
    """Measure a plan. Progress goes to stderr and tables to stdout.

    Args:
        plan: The work to measure.
        json_file: The file for the report with all runs; ``None`` writes none.

    Raises:
        ConfigurationError: A shape cannot be loaded, or a context is longer than the shape allows.
        RapidError: The models are not compatible with each other or with the engine.
        OSError: The file cannot be written.
    """
    console = table_console(_WIDTH)
    with ShapeBench(plan) as bench, answering_progress(Console(stderr=True)) as progress:
        bar = progress.add_task("warming up", total=bench.num_runs)
        report = bench.measure(lambda label: progress.update(bar, advance=1, description=label))
    for table in shape_tables(report):
        console.print(table)
        console.print()
    if json_file is not None:
        json_file.write_text(json.dumps(report.as_dict(), indent=1) + "\n", encoding="utf-8")
    return report

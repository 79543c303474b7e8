"""What is shown of a report."""

import dataclasses
import io
import sys

import pytest
from helpers.benchmark_reports import cell, full_report, outcome, report
from rich.console import Console

from rapid_integrations.benchmark import plots
from rapid_integrations.benchmark.tables import method_label, round_seconds, tables
from rapid_integrations.errors import ConfigurationError


def shown(whole) -> str:
    out = io.StringIO()
    console = Console(file=out, width=110)
    for table in tables(whole):
        console.print(table)
    return out.getvalue()


def test_every_suite_has_its_table():
    text = shown(full_report())
    for title in (
        "One question about a document that has to be read",
        "Decoding, one question at a time",
        "The bound E / (1 + γc + o)",
        "Where the time goes",
        "Questions at once on one document of 1k",
        "2 questions on one document of 1k",
        "by the frameworks",
    ):
        assert text.count(title) == 1, title
    assert "…" not in text


def test_speeds_are_medians_beside_the_others():
    lines = shown(full_report()).splitlines()
    gold = next(line for line in lines if "RAPID, gold" in line)
    assert gold.split()[-6:] == ["200", "20.00", "4.00", "–", "0/0", "1"]
    decoded = next(line for line in lines if "ours, plain" in line and "4/4" in line)
    assert decoded.split()[-8:] == ["50", "±0", "%", "5.00", "1.00", "4/4", "0/2", "2"]


def test_what_was_not_measured_is_not_shown():
    assert shown(report()) == ""
    text = shown(report(cell("decode", "generate", outcome("a"))))
    assert "bound" not in text
    assert "Where the time goes" not in text


def test_a_round_has_drafting_verification_and_host_time():
    (stats,) = (outcome("a", speed=100).stats,)
    parts = round_seconds(stats)
    assert parts == pytest.approx({"draft": 0.02 / 5, "verify": 0.07 / 5, "host": 0.01 / 5})


def test_labels_name_the_retrieval_where_it_matters():
    rapid = cell("decode", "rapid", outcome("a"), retrieval="gold")
    assert method_label(rapid) == "RAPID, gold"
    assert method_label(dataclasses.replace(rapid, baseline="lossless")) == "ours, η = 0"
    assert method_label(dataclasses.replace(rapid, cold=True)) == "RAPID"


def test_plots_are_png_files_of_what_was_measured(tmp_path):
    written = plots.write_plots(full_report(), tmp_path / "new")
    assert sorted(path.name for path in written) == [
        "round.png", "share_of_the_bound.png", "speed_over_batch.png", "speed_over_context.png",
    ]  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    only = report(*full_report().of("batch"))
    assert [path.name for path in plots.write_plots(only, tmp_path)] == ["speed_over_batch.png"]


def test_plots_without_matplotlib_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigurationError, match=r"rapid-integrations\[bench\]"):
        plots.check_plotting(*plots.NEEDED)

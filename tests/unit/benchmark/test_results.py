"""Samples become figures, survive JSON, and unequal answers are found."""

import json
from pathlib import Path

import pytest
from helpers.benchmark_reports import cell, full_report, outcome, plain_outcome, report

from rapid_integrations.benchmark.plan import SUITES
from rapid_integrations.benchmark.plots import write_plots
from rapid_integrations.benchmark.results import BenchmarkReport, Difference, Spread
from rapid_integrations.benchmark.tables import tables
from rapid_integrations.benchmark.work import Answer
from rapid_integrations.errors import ConfigurationError


def test_a_report_survives_json():
    whole = full_report()
    difference = Difference("decode", "plain", 1024, "Who?", "She.", "He.", 0)
    whole = report(*whole.cells, differences=(difference,))
    stored = json.loads(json.dumps(whole.as_dict()))
    assert BenchmarkReport.from_dict(stored) == whole
    assert len(stored["cells"][2]["samples"]) == 2
    assert stored["cells"][4]["figures"]["bound"]["share"] == whole.bound(whole.cells[4]).share


def test_other_json_is_refused():
    with pytest.raises(ConfigurationError, match="not a result file of rapid bench"):
        BenchmarkReport.from_dict({"answers": []})


# Of the repository: an installed package does not have them.
RESULTS = sorted(Path(__file__).parents[3].glob("rapid_integrations/benchmark/results/*.json"))


def test_there_are_committed_result_files():
    assert RESULTS


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_every_committed_result_file_can_be_read_and_shown(file, tmp_path):
    stored = json.loads(file.read_text(encoding="utf-8"))
    whole = BenchmarkReport.from_dict(stored)
    assert len(whole.cells) == len(stored["cells"]) > 0
    assert {cell.suite for cell in whole.cells} <= set(SUITES)
    shown = list(tables(whole))
    assert len(shown) >= len({cell.suite for cell in whole.cells})
    assert all(table.row_count for table in shown)
    drawn = write_plots(whole, tmp_path)
    assert bool(drawn) == bool(whole.of("decode") or whole.of("batch"))


def test_names_of_earlier_versions_are_read():
    stored = json.loads(json.dumps(report(cell("prefill", "plain", outcome("a"))).as_dict()))
    expected = BenchmarkReport.from_dict(stored)
    earlier = stored["cells"][0]
    earlier["suite"] = "reading"
    earlier["contestant"] = earlier.pop("baseline")
    stats = earlier["samples"][0]["stats"]
    stats["grounding"] = stats.pop("question_agreement")
    assert BenchmarkReport.from_dict(stored) == expected


def test_a_spread_has_the_median_and_the_range():
    assert Spread.of([5.0, 1.0, 2.0]) == Spread(2.0, 1.0, 5.0, 3)
    assert Spread.of([]) is None


def test_figures_are_taken_per_sample():
    measured = cell("decode", "rapid", *(outcome("a", "b", speed=s) for s in (100.0, 50.0, 200.0)))
    assert measured.decode_tokens_per_s == Spread(100.0, 50.0, 200.0, 3)
    assert measured.first_token_s(1) == Spread(0.2, 0.2, 0.2, 3)
    assert measured.first_token_s(2) is None
    assert measured.wall_s == Spread(0.7, 0.6, 0.9, 3)
    assert measured.kv_bytes == 2**20
    assert measured.run_bytes == 2**22 - 2**21


def test_memory_that_is_not_reported_is_unknown():
    measured = cell("decode", "plain", plain_outcome("a"))
    assert (measured.kv_bytes, measured.run_bytes, measured.peak_bytes) == (None, None, None)


def test_a_cell_is_compared_with_the_same_work_only():
    whole = full_report()
    gold, longer = (whole.of("decode")[i] for i in (2, 6))
    assert whole.beside(gold, "plain") == whole.of("decode")[1]
    assert whole.beside(longer, "plain") == whole.of("decode")[5]
    assert whole.beside(gold, "lookup") is None


def test_questions_at_once_have_no_bound():
    whole = full_report()
    assert whole.bound(whole.of("decode")[2]) is not None
    assert whole.bound(whole.of("batch")[3]) is None


@pytest.mark.parametrize(
    ("answer", "position"),
    [
        (Answer("x y", (1, 2)), 1),
        (Answer("x", (1,)), 1),
        (Answer("x z w", (1, 3, 4)), 2),
        (Answer("x  y", None), None),
    ],
    ids=["another token", "too short", "too long", "another text"],
)
def test_an_unequal_answer_is_a_difference(answer, position):
    found = Difference.between(
        Answer("x z", (1, 3)), answer, suite="decode", baseline="plain", context=9, question="?"
    )
    assert found == Difference("decode", "plain", 9, "?", "x z", answer.text, position)


@pytest.mark.parametrize("answer", [Answer("other spelling", (1, 3)), Answer(" x z\n", None)])
def test_equal_answers_are_no_difference(answer):
    found = Difference.between(
        Answer("x z", (1, 3)), answer, suite="decode", baseline="plain", context=9, question="?"
    )
    assert found is None

"""Metrics by name."""

import subprocess
import sys

import pytest

from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation.scoring.answer_metrics import (
    GRADED_METRICS,
    METRIC_NAMES,
    exact_match,
    make_metric,
)

CASES = [
    ("exact", "It is  12.", ["It is 12."], 1),
    ("exact", "it is 12.", ["It is 12."], 0),
    ("squad-exact", "the Fee is 12", ["Fee is 12."], 1),
    ("squad-exact", "the fee was 12", ["Fee is 12."], 0),
    # Three of four tokens answered, all three right: precision 1, recall 3/4.
    ("f1", "old red house", ["the old red house burned"], 6 / 7),
    ("f1", "house", ["nothing", "a house"], 1),
    ("f1", "", ["house"], 0),
    ("contains", "The number is 1234567.", ["7654321", "1234567"], 1),
    ("contains", "The number is 123.", ["1234567"], 0),
    ("contains-all", "They are ABCDE and fghij.", ["abcde", "FGHIJ", "KLMNO", "PQRST"], 0.5),
    ("contains-all", "None.", ["abcde"], 0),
    # The longest common subsequence "the cat sat" has 3 of 4 and 3 of 5 tokens: F = 2/3.
    ("rouge-l", "the cat sat down", ["the black cat had sat"], 2 / 3),
    ("rouge-l", "none", ["the black cat", "none"], 1),
    ("rouge-lsum", "b c\na", ["a\nb c"], 1),
]


@pytest.mark.parametrize(("name", "answer", "references", "score"), CASES)
def test_a_metric_scores_an_answer(name, answer, references, score):
    assert make_metric(name)(answer, references) == pytest.approx(score, abs=1e-6)


def test_rouge_lsum_takes_lines_for_sentences():
    swapped = ("b c\na", ["a\nb c"])
    assert make_metric("rouge-l")(*swapped) < make_metric("rouge-lsum")(*swapped) == 1


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("B", True),
        ("B.", True),
        ("(B) the mill", True),
        ("**B**", True),
        ("A", False),
        ("Because of that the answer is: B", True),
        ("I think that the correct answer is (A), not (B).", False),
        ("Answer: **B**", True),
        ("The answer is the old mill, of course.", True),
        ("The Old Mill.", True),
        ("It must be option B then", True),
        ("Both, but mostly B-side", False),
        ("", False),
    ],
)
def test_choice_finds_the_chosen_letter_or_text(answer, right):
    assert make_metric("choice")(answer, ["B", "the old mill"]) == right


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("The correct answer is (B).", True),
        ("So: **The correct answer is B**", True),
        ("The correct answer is (A). Or: The correct answer is (B)", False),
        ("The correct answer is B, no: The correct answer is (C)", False),
        ("B", False),
        ("the correct answer is (B)", False),
    ],
)
def test_stated_choice_takes_longbenchs_sentence_only(answer, right):
    assert make_metric("stated-choice")(answer, ["B"]) == right


@pytest.mark.parametrize("name", METRIC_NAMES)
def test_every_metric_stays_in_0_and_1_and_knows_a_perfect_answer(name):
    perfect = "The correct answer is (B)" if name == "stated-choice" else "B"
    metric = make_metric(name)
    assert metric(perfect, ["B"]) == 1
    for answer in ("", "B C\nD", "é", "the"):
        score = metric(answer, ["B", "the old mill"])
        assert 0 <= score <= 1
        assert name in GRADED_METRICS or score in (0, 1)


def test_an_unknown_metric_is_named_with_those_that_exist():
    with pytest.raises(ConfigurationError, match="no metric 'bleu': allowed are exact, squad-exact"):
        make_metric("bleu")


@pytest.mark.parametrize(
    ("metric", "module", "package"),
    [("f1", "torchmetrics", "torchmetrics"), ("rouge-l", "rouge_score", "rouge-score")],
)
def test_a_missing_library_names_the_extra(monkeypatch, metric, module, package):
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigurationError, match=rf"needs {package} .*rapid-integrations\[eval\]"):
        make_metric(metric)


@pytest.mark.slow
def test_the_libraries_are_imported_by_their_metrics_only():
    program = (
        "import sys, rapid_integrations.evaluation as e; e.evaluate\n"
        "assert not {'torchmetrics', 'rouge_score'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("answer", "references", "right"),
    [
        ("The fee is 12 crowns.", ["The fee is 12 crowns."], True),
        ("  The fee\nis 12  crowns. ", ["The fee is 12 crowns."], True),
        ("The fee is 12 crowns", ["The fee is 12 crowns."], False),
        ("The fee is 12 crowns. More.", ["The fee is 12 crowns."], False),
        ("the fee is 12 crowns.", ["The fee is 12 crowns."], False),
        ("b", ["a", "b"], True),
        ("", ["a"], False),
        ("a", [], False),
    ],
)
def test_exact_match_compares_the_whole_answer(answer, references, right):
    assert exact_match(answer, references) is right

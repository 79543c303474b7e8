"""Measuring in turns, and comparing every lossless answer."""

import dataclasses

from helpers.benchmark_reports import ScriptedWorkers, right_answers

from rapid_integrations.benchmark.baselines import choose_baselines
from rapid_integrations.benchmark.plan import BenchmarkPlan
from rapid_integrations.benchmark.runner import Measurement
from rapid_integrations.benchmark.work import Answer, Outcome, Run

COUNT = len


def measure(script, *, baselines=("generate", "plain", "rapid"), suites=("decode",), repeats=3):
    plan = BenchmarkPlan(
        suites=suites,
        contexts=(1500,),
        batches=(2,),
        repeats=repeats,
        cold_tokens=3000,
        baselines=choose_baselines(baselines, has_drafter=True),
        retrievals=("gold",),
    )
    workers = ScriptedWorkers(script)
    shown = []
    measurement = Measurement(workers.run, shown.append)
    for group in plan.groups(COUNT):
        measurement.measure(group)
    return measurement, workers.runs, shown


def changed(outcome: Outcome, index: int, answer: Answer) -> Outcome:
    answers = list(outcome.answers)
    answers[index] = answer
    return dataclasses.replace(outcome, answers=tuple(answers))


def test_every_repetition_asks_all_baselines_and_starts_with_another():
    measurement, runs, shown = measure(right_answers)
    names = [run.baseline for run in runs]
    assert names[:3] == ["generate", "plain", "rapid"]  # does not count
    assert names[3:12] == [
        "generate", "plain", "rapid", "plain", "rapid", "generate", "rapid", "generate", "plain",
    ]  # fmt: skip
    assert names[12:] == ["generate"]  # the reference
    assert [cell.baseline.name for cell in shown] == names[:-1]
    assert [len(cell.samples) for cell in measurement.cells] == [3, 3, 3]
    assert [run.retrieval for run in runs[:3]] == ["natural", "natural", "gold"]


def test_cold_runs_have_no_warm_up_and_clear_caches():
    measurement, runs, _ = measure(right_answers, suites=("prefill",), baselines=("plain", "rapid"))
    assert [run.baseline for run in runs] == ["plain", "rapid", "rapid", "plain", "generate"]
    assert [run.cold for run in runs] == [True, True, True, True, False]
    assert [len(cell.samples) for cell in measurement.cells] == [2, 2]


def test_equal_and_right_answers_are_counted():
    measurement, _, _ = measure(right_answers)
    counts = {cell.baseline: (cell.equal, cell.compared) for cell in measurement.cells}
    assert counts == {"generate": (24, 24), "plain": (24, 24), "rapid": (0, 0)}
    assert [(cell.right, cell.asked) for cell in measurement.cells] == [(8, 8)] * 3
    assert measurement.differences == []


def test_an_unequal_answer_of_a_lossless_baseline_is_caught():
    asked = []

    def script(run: Run) -> Outcome:
        asked.append(run.baseline)
        outcome = right_answers(run)
        if run.baseline == "plain" and asked.count("plain") == 3:
            return changed(outcome, 1, Answer("No.", (1, 2)))
        return outcome

    measurement, _, _ = measure(script)
    (difference,) = measurement.differences
    assert (difference.baseline, difference.answer, difference.position) == ("plain", "No.", 0)
    counts = {cell.baseline: (cell.equal, cell.compared) for cell in measurement.cells}
    assert counts["plain"] == (23, 24)


def test_rapid_may_differ():
    def script(run: Run) -> Outcome:
        outcome = right_answers(run)
        return changed(outcome, 0, Answer("No.", (1,))) if run.baseline == "rapid" else outcome

    measurement, _, _ = measure(script)
    assert measurement.differences == []
    assert [(cell.right, cell.asked) for cell in measurement.cells] == [(8, 8), (8, 8), (7, 8)]


def test_another_prompt_is_not_compared():
    def script(run: Run) -> Outcome:
        return dataclasses.replace(right_answers(run), same_prompt=run.baseline != "hf-llm")

    measurement, _, _ = measure(script, baselines=("hf-llm", "hf-pipeline"), suites=("end-to-end",))
    assert {cell.baseline: cell.compared for cell in measurement.cells} == {"hf-pipeline": 8, "hf-llm": 0}


def test_the_reference_is_asked_once_for_each_question():
    _, runs, _ = measure(right_answers, baselines=("plain",), suites=("prefill", "decode", "questions"))
    references = [run for run in runs if run.baseline == "generate"]
    assert [len(run.task.questions) for run in references] == [8, 8]
    assert not any(run.together or run.cold for run in references)

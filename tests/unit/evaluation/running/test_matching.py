"""Tuning of methods to equal acceptance."""

from dataclasses import replace

import pytest
from helpers.evaluation_pipelines import Call, ScriptedPipeline, random_pipeline

from rapid_integrations.engine.stats import RapidStats
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation import RulerSource, calibration_source, match_acceptance, match_methods
from rapid_integrations.evaluation.methods.engine_methods import (
    LONG_CONTEXT,
    MIXTURE,
    PLAIN_SPECULATION,
    RAPID,
    RAPID_FIXED,
)
from rapid_integrations.evaluation.tasks.own_data import OwnData
from rapid_integrations.evaluation.tasks.sources import DemoSource
from rapid_integrations.evaluation.tasks.task import demo_tasks

TASKS = demo_tasks(context=300, num_questions=4, seed=5)


def accepting(rate) -> ScriptedPipeline:
    """A pipeline that accepts the share ``rate(speculation)`` of 10,000 drafted tokens."""

    def stats(call: Call) -> RapidStats:
        accepted = round(1e4 * rate(call.options.speculation))
        return RapidStats(completion_tokens=4, rounds=2, drafted_tokens=10_000, accepted_tokens=accepted)

    return ScriptedPipeline(lambda call: "Yes.", stats)


def by_rule(speculation) -> float:
    match speculation.acceptance:
        case "lossless":
            return 0.5
        case "mixture":
            return 1 - 0.5 * speculation.mixture_weight
        case _:
            return 0.5 + 0.4 * speculation.transfer_strength / (10 + speculation.transfer_strength)


def test_the_mixture_weight_with_equal_acceptance_is_found():
    pipeline = accepting(by_rule)
    options = pipeline.options.override(transfer_strength=10.0)
    match = match_acceptance(pipeline, TASKS, MIXTURE, RAPID, options=options)
    assert match.wanted == pytest.approx(0.7)
    assert match.option == "mixture_weight"
    assert match.value == pytest.approx(0.6, abs=0.005)
    assert match.acceptance == pytest.approx(0.7, abs=0.0025)
    assert match.method.name == "mixture"
    assert match.method.options == {"acceptance": "mixture", "mixture_weight": match.value}
    drafted = {call.options.speculation.num_draft_tokens for call in pipeline.calls}
    assert drafted == {6}, "not chosen by the clock"


def test_the_transfer_strength_with_equal_acceptance_is_found():
    pipeline = accepting(by_rule)
    options = pipeline.options.override(mixture_weight=0.8, num_draft_tokens=3)
    match = match_acceptance(pipeline, TASKS, RAPID_FIXED, MIXTURE, options=options, steps=12)
    assert match.option == "transfer_strength"
    assert match.value == pytest.approx(10 / 3, abs=0.03)
    assert match.method.options["adaptive_transfer"] is False
    assert {call.options.speculation.num_draft_tokens for call in pipeline.calls} == {3}


def test_an_unreachable_acceptance_gives_the_end_of_the_range():
    pipeline = accepting(lambda s: {"lossless": 0.5, "mixture": 0.4 - 0.1 * s.mixture_weight}[s.acceptance])
    match = match_acceptance(pipeline, TASKS, MIXTURE, PLAIN_SPECULATION)
    assert (match.value, match.acceptance, match.wanted) == (0.0, 0.4, 0.5)
    same = accepting(lambda s: 0.5)
    assert match_acceptance(same, TASKS, MIXTURE, PLAIN_SPECULATION).value == 1.0, (
        "the target's own, of equals"
    )


def test_two_real_models_are_matched():
    pipeline = random_pipeline(temperature=1.0, seed=3)
    try:
        like = replace(MIXTURE, name="like", options={"acceptance": "mixture", "mixture_weight": 0.4})
        match = match_acceptance(pipeline, TASKS, MIXTURE, like, steps=6)
        assert match.acceptance == pytest.approx(match.wanted, abs=0.02)
        assert match.value == pytest.approx(0.4, abs=0.06)
    finally:
        pipeline.close()


def test_methods_that_cannot_be_matched_are_errors():
    pipeline = accepting(by_rule)
    with pytest.raises(ConfigurationError, match="'sd' cannot be tuned"):
        match_acceptance(pipeline, TASKS, PLAIN_SPECULATION, RAPID)
    with pytest.raises(ConfigurationError, match="'lc' drafts nothing"):
        match_acceptance(pipeline, TASKS, MIXTURE, LONG_CONTEXT)
    with pytest.raises(ConfigurationError, match="steps=0: at least 1 is needed"):
        match_acceptance(pipeline, TASKS, MIXTURE, RAPID, steps=0)


def test_only_tunable_methods_are_tuned():
    pipeline = accepting(by_rule)
    names = ["lc", "rapid", "mixture", "rapid-fixed"]
    source = DemoSource((300,), 4, seed=5)
    methods, matches = match_methods(pipeline, source, names, "rapid", num_questions=2)
    assert [method.name for method in methods] == names
    assert [match.method for match in matches] == methods[2:]
    assert methods[:2] == [LONG_CONTEXT, RAPID]
    assert matches[0].as_dict() == {
        "mixture_weight": pytest.approx(0.6, abs=0.005),
        "acceptance": pytest.approx(0.7, abs=0.0025),
        "wanted": pytest.approx(0.7),
    }
    asked = {task.document for task in source.tasks(pipeline)}
    assert not asked & {call.prompt.context for call in pipeline.calls}
    with pytest.raises(
        ConfigurationError, match=r"none of the methods lc, rapid can be tuned .* rapid-fixed"
    ):
        match_methods(pipeline, source, ["lc", "rapid"], "rapid")
    with pytest.raises(ConfigurationError, match="there is no method 'best'"):
        match_methods(pipeline, source, names, "best")


def test_calibration_questions_differ_from_the_measured_ones(tmp_path):
    source = DemoSource((300, 400), 4, seed=7)
    other = calibration_source(source, num_questions=2)
    assert other.num_questions == 4
    asked = {task.document for task in source.tasks(accepting(by_rule))}
    calibration = [task for task in other.tasks(accepting(by_rule))]
    assert {task.context for task in calibration} == {300, 400}
    assert not asked & {task.document for task in calibration}
    ruler = calibration_source(RulerSource((1024,), 4, 0, ("single",)), num_questions=2)
    assert ruler.num_questions == 2
    own = OwnData(tmp_path, ("a",), ((),), ("",), "exact", "{context}{question}")
    with pytest.raises(ConfigurationError, match="cannot be matched for the task 'own'"):
        calibration_source(own, num_questions=2)

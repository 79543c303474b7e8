"""Sweeps: their settings, shared answers, and results by setting."""

import json

import pytest
from helpers.evaluation_pipelines import ScriptedPipeline
from langchain_core.embeddings import DeterministicFakeEmbedding

from rapid_integrations.config import GenerationOptions
from rapid_integrations.engine.stats import RapidStats
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation import Setting, demo_tasks, evaluate, make_settings
from rapid_integrations.evaluation.methods.choice import METHOD_NAMES, make_method
from rapid_integrations.evaluation.methods.settings import asked_in, parse_sweeps
from rapid_integrations.retrieval import DrafterContext

TASKS = demo_tasks(context=512, num_questions=6, seed=2)
QUESTIONS = sum(len(task.questions) for task in TASKS)


def test_every_combination_is_one_setting():
    settings = make_settings(("natural", "missing"), {"transfer_strength": (1, 5), "tail_rule": ("none",)})
    assert [setting.label for setting in settings] == [
        "natural retrieval, transfer_strength=1, tail_rule=none",
        "natural retrieval, transfer_strength=5, tail_rule=none",
        "missing retrieval, transfer_strength=1, tail_rule=none",
        "missing retrieval, transfer_strength=5, tail_rule=none",
    ]
    assert make_settings("gold", {}) == (Setting("gold"),)
    assert len(set(settings)) == 4
    assert Setting("gold", {"num_draft_tokens": None}).label == "gold retrieval, num_draft_tokens=auto"
    assert Setting("gold", {"min_p": None, "temperature": 0.25}).label == "gold retrieval, min_p=none, temperature=0.25"  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("setting", make_settings("missing", {"transfer_strength": (5,), "top_k": (None, 3)}))
def test_settings_go_through_json(setting):
    again = Setting.from_dict(json.loads(json.dumps(setting.as_dict())))
    assert again == setting
    assert hash(again) == hash(setting)


def test_sweeps_are_written_as_names_and_values():
    texts = ["transfer_strength=1,2.5", "adaptive-transfer=true,false", "num_draft_tokens = auto, 4"]
    texts += ["tail_rule=none,target", "retrieval_max_tokens=none,64", "acceptance=lossless,augmented"]
    assert parse_sweeps(texts) == {
        "transfer_strength": (1, 2.5),
        "adaptive_transfer": (True, False),
        "num_draft_tokens": (None, 4),
        "tail_rule": ("none", "target"),
        "retrieval_max_tokens": (None, 64),
        "acceptance": ("lossless", "augmented"),
    }


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["transfer_strength"], r"'transfer_strength' is not allowed: write NAME=VALUE,VALUE,…"),
        (["=3"], "write NAME=VALUE"),
        (["eta=1,2"], "'eta' cannot be swept: allowed are acceptance, adaptive_transfer"),
        (["max_new_tokens=1,2"], "'max_new_tokens' cannot be swept"),
        (["transfer_strength=1,much"], "transfer_strength='much' is not allowed: .* must be a number >= 0"),
        (["transfer_strength=1,-1"], "transfer_strength=-1 is not allowed"),
        (["transfer_strength=nan"], "transfer_strength=nan is not allowed"),
        (["num_draft_tokens=1,,2"], "num_draft_tokens='' is not allowed"),
        (["top_k=1", "top_k=2"], "top_k is swept twice"),
        (["retriever=bm25,google"], "retriever='google' is not allowed: it is one of bm25, dense"),
    ],
)
def test_invalid_sweeps_are_errors(texts, message):
    with pytest.raises(ConfigurationError, match=message):
        parse_sweeps(texts)


@pytest.mark.parametrize(
    ("retrieval", "sweep", "message"),
    [
        ("bad", {}, "retrieval=bad is not allowed: name one or more of natural, gold"),
        ((), {}, r"retrieval=\(none\) is not allowed"),
        (("gold", "gold"), {}, "retrieval has 'gold' twice"),
        ("gold", {"top_k": ()}, "the sweep of top_k has no values"),
        ("gold", {"top_k": (1, 2, 1)}, "top_k has 1 twice"),
        ("gold", {"top_k": (0,)}, "top_k=0 is not allowed"),
        ("gold", {"stop": ("a",)}, "'stop' cannot be swept"),
        ("gold", {"num_draft_tokens": (4, 0)}, "num_draft_tokens=0 is plain decoding, but rapid drafts"),
    ],
)
def test_invalid_settings_are_errors_before_any_answer(retrieval, sweep, message):
    pipeline = ScriptedPipeline(lambda call: "")
    with pytest.raises(ConfigurationError, match=message):
        evaluate(pipeline, TASKS, ["rapid"], retrieval=retrieval, sweep=sweep)
    assert pipeline.calls == []


def distinct(method: str, **sweep: tuple[object, ...]) -> int:
    """Number of settings with answers of their own, for a sweep with two retrieval qualities."""
    settings = make_settings(("natural", "missing"), sweep)
    return len(set(asked_in([make_method(method)], settings, GenerationOptions()).values()))


@pytest.mark.parametrize(
    ("sweep", "expected"),
    [
        ({}, {"lc": 1, "generate": 1, "rag": 2, "sd": 2, "rapid": 2}),
        ({"transfer_strength": (1, 5)}, {"lc": 1, "generate": 1, "rag": 2, "sd": 2, "rapid": 4}),
        ({"num_draft_tokens": (2, 5)}, {"lc": 1, "generate": 1, "rag": 2, "sd": 4, "rapid": 4}),
        ({"retrieval_max_tokens": (64, 96)}, {"lc": 1, "generate": 1, "rag": 4, "sd": 4, "rapid": 4}),
        ({"retriever": ("bm25", "dense")}, {"lc": 1, "generate": 1, "rag": 3, "sd": 3, "rapid": 3}),
        ({"temperature": (0, 1)}, {"lc": 2, "generate": 2, "rag": 4, "sd": 4, "rapid": 4}),
        (
            {"acceptance": ("lossless", "paper"), "adaptive_transfer": (True, False)},
            {"lc": 1, "generate": 1, "rag": 2, "sd": 2, "rapid": 4},
        ),
        (
            {"acceptance": ("lossless", "augmented"), "transfer_strength": (1, 5, 9)},
            {"lc": 1, "generate": 1, "rag": 2, "sd": 2, "rapid": 8},
        ),
    ],
)
def test_settings_that_do_not_affect_a_method_share_its_answers(sweep, expected):
    assert {method: distinct(method, **sweep) for method in expected} == expected
    assert set(expected) <= set(METHOD_NAMES)


def test_shared_answers_count_in_every_setting():
    def stats(call):
        # The cost of an answer identifies its setting.
        return RapidStats(completion_tokens=2, rounds=1, verify_s=call.options.speculation.transfer_strength)

    pipeline = ScriptedPipeline(lambda call: "x", stats)
    sweep = {"transfer_strength": (1, 5)}
    report = evaluate(pipeline, TASKS, ["lc", "rapid"], retrieval=("gold", "missing"), sweep=sweep)
    calls = pipeline.measured_calls
    assert sum(call.plain for call in calls) == QUESTIONS
    assert len(calls) == len(report.answers) == QUESTIONS * 5
    settings = make_settings(("gold", "missing"), sweep)
    assert report.swept == settings
    assert [(r.setting, r.method) for r in report.results] == [
        (setting, method) for setting in settings for method in ("lc", "rapid")
    ]
    for setting in settings:
        lc, rapid = (report.result(method, 512, setting) for method in ("lc", "rapid"))
        assert (lc.asked_in, rapid.asked_in) == (settings[0], setting)
        assert lc.questions == rapid.questions == QUESTIONS
        assert (lc.evidence_found, rapid.evidence_found) == (None, float(setting.retrieval == "gold"))
        assert rapid.stats.verify_s == QUESTIONS * setting.options["transfer_strength"]
        assert {record.setting for record in report.answers_of(rapid)} == {setting}
        assert report.answers_of(lc) == tuple(r for r in report.answers if r.method == "lc")
    assert report.result("lc", 512) == report.result("lc", 512, settings[0])
    with pytest.raises(ConfigurationError, match=r"measured in several settings: name one\. There are: gold"):
        report.result("rapid", 512)
    with pytest.raises(ConfigurationError, match=r"not with natural retrieval\. There are: gold retrieval"):
        report.result("rapid", 512, Setting("natural"))
    data = json.loads(json.dumps(report.as_dict()))
    assert data["settings"]["retrieval"] == "gold,missing"
    assert data["settings"]["sweep"] == {"transfer_strength": [1, 5]}
    assert data["results"][3]["setting"] == {
        "retrieval": "gold",
        "options": {"transfer_strength": 5},
        "retriever": None,
    }


def test_retrievers_are_compared_where_retrieval_is_natural():
    pipeline = ScriptedPipeline(lambda call: "x")
    with pytest.raises(ConfigurationError, match="'dense' ranks passages by an embedding model, but"):
        evaluate(pipeline, TASKS, ["rag"], sweep={"retriever": ("bm25", "dense")})
    assert pipeline.calls == []
    embeddings = DeterministicFakeEmbedding(size=8)
    pipeline.drafter_context = DrafterContext(tokenizer=pipeline.tokenizer, embeddings=embeddings)
    sweep = {"retriever": ("bm25", "dense"), "retrieval_min_score": (-1,)}
    report = evaluate(pipeline, TASKS, ["rag"], retrieval=("natural", "gold"), sweep=sweep)
    assert [setting.label for setting in report.swept] == [
        f"{quality} retrieval, retriever={retriever}, retrieval_min_score=-1"
        for quality in ("natural", "gold")
        for retriever in ("bm25", "dense")
    ]
    used = [{record.stats.retriever for record in report.answers_of(result)} for result in report.results]
    assert used == [{"bm25"}, {"dense"}, {"gold"}, {"gold"}]
    assert report.results[2].stats == report.results[3].stats


def test_the_first_method_changes_from_question_to_question():
    report = evaluate(
        ScriptedPipeline(lambda call: "x"), TASKS[:1], ["lc", "rag"], retrieval=("gold", "missing")
    )
    asked = [(record.setting.retrieval, record.method) for record in report.answers]
    first = [("gold", "lc"), ("gold", "rag"), ("missing", "rag")]
    assert asked[:3] == first
    assert asked[3:6] == [*first[1:], first[0]]
    assert [(r.document, r.question_number) for r in report.answers[:6]] == [(0, 0)] * 3 + [(0, 1)] * 3


def test_methods_and_settings_share_a_retrieval(monkeypatch):
    from rapid_integrations.evaluation.methods.retrieval import TaskRetrieval

    found, find = [], TaskRetrieval.find

    def counting(self, task, question):
        found.append(question.question)
        return find(self, task, question)

    monkeypatch.setattr(TaskRetrieval, "find", counting)
    pipeline = ScriptedPipeline(lambda call: "x")
    sweep = {"transfer_strength": (1, 5), "retrieval_max_tokens": (64, 96)}
    evaluate(pipeline, TASKS[:1], ["rag", "sd", "rapid"], retrieval=("gold", "missing"), sweep=sweep)
    assert len(found) == len(TASKS[0].questions) * 4

"""The loop of an evaluation: order of questions, prompts, warm-up and pooled figures."""

import json

import pytest
from helpers.evaluation_pipelines import Call, ScriptedPipeline

from rapid_integrations.config import GenerationOptions
from rapid_integrations.engine.stats import RapidStats
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation import demo_tasks, evaluate
from rapid_integrations.events import Completion

TASKS = demo_tasks(context=512, num_questions=6, seed=2) + demo_tasks(context=768, num_questions=2, seed=2)
ANSWERS = {q.question: q.answers[0] for task in TASKS for q in task.questions}


def knows_it(call: Call) -> str:
    """Right over the whole document, wrong over retrieved chunks."""
    whole = any(call.prompt.context == task.document for task in TASKS)
    return ANSWERS[call.prompt.query] if whole else "No idea."


def test_every_method_answers_every_question_in_its_own_way():
    pipeline = ScriptedPipeline(knows_it)
    report = evaluate(pipeline, TASKS, ["lc", "rag", "sd", "rapid"])
    calls = pipeline.measured_calls
    assert len(calls) == 8 * 4
    rag = [call for call in calls if all(call.prompt.context != task.document for task in TASKS)]
    assert len(rag) == 8
    assert all(call.plain for call in rag)
    assert all(call.prompt.context == "\n\n".join(c.text for c in call.chunks) for call in rag)
    whole = [call for call in calls if call not in rag]
    assert sum(call.plain for call in whole) == 8
    speculating = [call for call in whole if not call.plain]
    acceptances = [call.options.speculation.acceptance for call in speculating]
    assert sorted(acceptances) == ["augmented"] * 8 + ["lossless"] * 8
    lossless = [c for c in speculating if c.options.speculation.acceptance == "lossless"]
    assert all(call.options.speculation.effective_strength == 0 for call in lossless)
    assert {(r.method, r.context): r.accuracy.value for r in report.results} == {
        (method, context): 0.0 if method == "rag" else 1.0
        for context in (512, 768)
        for method in ("lc", "rag", "sd", "rapid")
    }


def test_methods_are_compared_question_by_question():
    pipeline = ScriptedPipeline(knows_it)
    report = evaluate(pipeline, TASKS, ["lc", "rag", "sd"])
    asked = [(r.document, r.question_number) for r in report.answers if r.method == "rag"]
    assert asked == [(i, j) for i, task in enumerate(TASKS) for j in range(len(task.questions))]
    better = report.difference("lc", "rag", 512)
    assert (better.value, better.high) == (1, 1)
    assert 0.5 < better.low < 1
    equal = report.difference("sd", "lc", 512)
    assert equal.value == 0
    assert -equal.low == equal.high > 0
    with pytest.raises(ConfigurationError, match="no result for 'rapid' at 512"):
        report.difference("rapid", "lc", 512)


def test_methods_take_turns_on_one_question_after_the_other():
    pipeline = ScriptedPipeline(knows_it)
    report = evaluate(pipeline, TASKS[:1], ["lc", "rapid"])
    asked = [record.question for record in report.answers]
    assert asked == [q.question for q in TASKS[0].questions for _ in range(2)]
    assert [record.method for record in report.answers] == ["lc", "rapid", "rapid", "lc"] * 2


@pytest.mark.parametrize("methods", [["lc", "rapid"], ["lc", "rag", "sd", "rapid"]])
def test_every_method_reads_some_documents_first(methods):
    report = evaluate(ScriptedPipeline(knows_it), [*TASKS, *TASKS], methods)
    firsts = {
        record.document: record.method for record in reversed(report.answers) if record.question_number == 0
    }
    assert [firsts[document] for document in range(len(methods))] == methods


def test_the_prompt_is_the_template_with_document_and_question():
    pipeline = ScriptedPipeline(knows_it)
    evaluate(pipeline, TASKS[:1], ["lc"], prompt_template="Read {context}! Now: {question}")
    question = TASKS[0].questions[0].question
    call = pipeline.measured_calls[0]
    assert call.prompt.text == f"Read {TASKS[0].document}! Now: {question}"
    assert (call.prompt.context, call.prompt.query) == (TASKS[0].document, question)
    with pytest.raises(ConfigurationError, match=r"must hold \{context\} and then \{question\}"):
        evaluate(pipeline, TASKS[:1], ["lc"], prompt_template="{question} {context}")


def test_warming_up_is_short_and_counts_nowhere():
    pipeline = ScriptedPipeline(knows_it)
    report = evaluate(pipeline, TASKS, ["lc", "sd"])
    warm_up = [call for call in pipeline.calls if call.options.sampling.max_new_tokens == 8]
    assert len(warm_up) == 2
    assert all(len(call.prompt.context) <= 1000 for call in warm_up)
    assert len(report.answers) == len(pipeline.measured_calls) == 16


def test_figures_are_pooled_over_tokens_and_seconds():
    costs = [
        RapidStats(completion_tokens=10, rounds=2, drafted_tokens=10, accepted_tokens=8, decode_s=1.0),
        RapidStats(completion_tokens=30, rounds=8, drafted_tokens=30, accepted_tokens=12, decode_s=3.0),
    ]
    costs[1].forced_tokens, costs[1].drafter_passes = 5, 7
    stats = iter([RapidStats(), *costs])
    answers = iter(["", ANSWERS[TASKS[-1].questions[0].question], "wrong"])
    pipeline = ScriptedPipeline(lambda call: next(answers), lambda call: next(stats))
    report = evaluate(pipeline, TASKS[-1:], ["rapid"])
    row = report.result("rapid", 768).as_dict()
    expected = {
        "method": "rapid",
        "context": 768,
        "questions": 2,
        "accuracy": 0.5,
        "accuracy_low": 0,
        "accuracy_high": 1,
        "acceptance_rate": 0.5,
        "tokens_per_round": 4.0,
        "decode_tokens_per_s": 10.0,
        "completion_tokens": 40,
        "drafted_tokens": 40,
        "accepted_tokens": 20,
        "forced_tokens": 5,
        "drafter_passes": 7,
        "correct": 1,
    }
    assert {name: row[name] for name in expected} == expected
    assert [record.as_dict()["stats"]["forced_tokens"] for record in report.answers] == [0, 5]


def test_a_method_that_drafts_nothing_has_no_acceptance():
    plain = RapidStats(completion_tokens=4, rounds=4, decode_s=0.5)
    report = evaluate(ScriptedPipeline(knows_it, lambda call: plain), TASKS[:1], ["lc"])
    assert report.results[0].acceptance_rate is None
    assert report.results[0].stats.tokens_per_round == 1.0


def test_the_retrieval_quality_reaches_drafter_and_rag_alike():
    for quality, found in (("gold", 1.0), ("missing", 0.0), ("unrelated", 0.0)):
        pipeline = ScriptedPipeline(knows_it)
        report = evaluate(pipeline, TASKS[:1], ["rag", "rapid"], retrieval=quality)
        assert [result.evidence_found for result in report.results] == [found, found]
        assert report.settings["retrieval"] == quality
        calls = pipeline.measured_calls
        for first, second in zip(calls[::2], calls[1::2], strict=True):
            assert first.chunks == second.chunks
            text = " ".join(" ".join(chunk.text for chunk in first.chunks).split())
            question = next(q for q in TASKS[0].questions if q.question == first.prompt.query)
            sentences = [" ".join(TASKS[0].document[a:b].split()) for a, b in question.evidence]
            assert all((sentence in text) is (quality == "gold") for sentence in sentences)


def test_callbacks_see_every_event_and_every_answer():
    events, answers = [], []
    pipeline = ScriptedPipeline(knows_it)
    report = evaluate(
        pipeline,
        TASKS[:1],
        ["lc", "sd"],
        on_event=lambda method, case, event: events.append((method.name, case.question, event)),
        on_answer=answers.append,
    )
    assert answers == list(report.answers)
    completed = [(name, question) for name, question, event in events if isinstance(event, Completion)]
    assert completed == [
        (record.method, next(q for q in TASKS[0].questions if q.question == record.question))
        for record in report.answers
    ]


def test_the_report_is_json_data_with_the_settings_of_the_run():
    pipeline = ScriptedPipeline(knows_it)
    options = pipeline.options.override(transfer_strength=3.0)
    report = evaluate(pipeline, TASKS, ["lc", "rapid"], options=options)
    data = json.loads(json.dumps(report.as_dict()))
    assert [(row["method"], row["context"]) for row in data["results"]] == [
        ("lc", 512),
        ("rapid", 512),
        ("lc", 768),
        ("rapid", 768),
    ]
    assert data["settings"]["options"]["transfer_strength"] == 3.0
    assert data["settings"]["target"] == "scripted"
    assert data["settings"]["drafter"] == "drafter"
    assert {"python", "torch", "transformers"} <= data["versions"].keys()
    assert len(data["answers"]) == 16
    assert data["answers"][0]["answer"] == ANSWERS[data["answers"][0]["question"]]
    with pytest.raises(ConfigurationError, match="there is no result for 'sd' at 512 tokens"):
        report.result("sd", 512)


def test_the_same_run_gives_the_same_answers():
    def run():
        tasks = demo_tasks(context=512, num_questions=4, seed=9)
        report = evaluate(ScriptedPipeline(lambda c: c.prompt.context[:40]), tasks, ["rag", "rapid"])
        records = [record.as_dict() for record in report.answers]
        for record in records:
            assert record["stats"].pop("retrieval_s") > 0
        return records

    assert run() == run()


@pytest.mark.parametrize(
    ("methods", "changes", "message"),
    [
        ([], {}, "there is no method to evaluate"),
        (["lc", "foo"], {}, "no method 'foo': allowed are lc, rag, sd, streaming, rapid,"),
        (["lc", "sd", "lc"], {}, "the method lc is named twice"),
        (["lc", "sd"], {"num_draft_tokens": 0}, "num_draft_tokens=0 is plain decoding, but sd drafts"),
    ],
)
def test_invalid_arguments_are_errors_before_any_answer(methods, changes, message):
    pipeline = ScriptedPipeline(knows_it)
    with pytest.raises(ConfigurationError, match=message):
        evaluate(pipeline, TASKS, methods, options=pipeline.options.override(**changes))
    assert pipeline.calls == []


def test_no_task_is_an_error():
    with pytest.raises(ConfigurationError, match="nothing to evaluate"):
        evaluate(ScriptedPipeline(knows_it), [], ["lc"])


def test_a_custom_method_can_be_measured():
    class Echo:
        name, label, speculates, uses_retrieval = "echo", "an echo", False, False

        def in_force(self, options):
            return GenerationOptions()

        def stream(self, pipeline, case, options):
            text = case.question.answers[0]
            yield Completion(text, "stop", RapidStats(completion_tokens=1, decode_s=1.0), (1,))

    class Mute(Echo):
        name = "mute"

        def stream(self, pipeline, case, options):
            yield from ()

    sweep = {"temperature": (0.5, 1)}
    report = evaluate(ScriptedPipeline(knows_it), TASKS[:1], [Echo(), "rag"], sweep=sweep)
    assert report.result("echo", 512).accuracy.value == 1.0
    assert [record.method for record in report.answers].count("echo") == len(TASKS[0].questions)
    with pytest.raises(ConfigurationError, match="'mute' ended without a completion"):
        evaluate(ScriptedPipeline(knows_it), TASKS[:1], [Mute()])

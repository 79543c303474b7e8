"""The methods on small random models: their outputs against each other and against transformers."""

import pytest
from helpers.evaluation_pipelines import ScriptedPipeline, random_pipeline

from rapid_integrations.errors import ConfigurationError, ContextLengthError
from rapid_integrations.evaluation.methods.choice import METHOD_NAMES, make_method
from rapid_integrations.evaluation.methods.engine_methods import sinks_and_window
from rapid_integrations.evaluation.methods.generate import TransformersGenerate
from rapid_integrations.evaluation.methods.method import Case
from rapid_integrations.evaluation.methods.retrieval import TaskRetrieval
from rapid_integrations.evaluation.running.asking import answer
from rapid_integrations.evaluation.tasks.prompts import question_prompt
from rapid_integrations.evaluation.tasks.task import demo_tasks
from rapid_integrations.events import Completion, PrefillProgress, TextDelta


@pytest.fixture(scope="module")
def pipeline():
    pipeline = random_pipeline()
    yield pipeline
    pipeline.close()


@pytest.fixture(scope="module")
def cases(pipeline):
    retrieval = TaskRetrieval(pipeline, pipeline.options.retrieval, "natural")
    return [
        Case(
            task,
            question,
            question_prompt("Context: {context} Question: {question} Answer:", context=task.document,
                            question=question.question),
            retrieval.find(task, question),
        )
        for task in demo_tasks(context=400, num_questions=6)
        for question in task.questions
    ]  # fmt: skip


def test_generate_plain_decoding_and_plain_speculation_give_the_same_tokens(pipeline, cases):
    generate = TransformersGenerate()
    for case in cases:
        theirs = answer(pipeline, generate, case, pipeline.options)
        plain = answer(pipeline, make_method("lc"), case, pipeline.options)
        speculated = answer(pipeline, make_method("sd"), case, pipeline.options)
        assert theirs.token_ids == plain.token_ids == speculated.token_ids
        assert theirs.text == plain.text == speculated.text
        assert theirs.finish_reason == plain.finish_reason == speculated.finish_reason
        assert theirs.stats.completion_tokens == plain.stats.completion_tokens
        assert theirs.stats.token_sources == plain.stats.token_sources
        assert set(plain.stats.token_sources) == {"t"}
        assert len(speculated.stats.token_sources) == speculated.stats.completion_tokens
        assert theirs.stats.prompt_tokens == plain.stats.prompt_tokens
        assert plain.stats.drafted_tokens == theirs.stats.drafted_tokens == 0


def test_retrieved_only_reads_what_the_drafter_reads(pipeline, cases):
    for case in cases:
        retrieved = answer(pipeline, make_method("rag"), case, pipeline.options)
        rapid = answer(pipeline, make_method("rapid"), case, pipeline.options)
        assert retrieved.stats.prompt_tokens == rapid.stats.drafter_prompt_tokens
        assert rapid.stats.prompt_tokens > 2 * retrieved.stats.prompt_tokens
        assert rapid.stats.retriever == "bm25"
        found = [chunk.text for chunk in case.found.retrieved.chunks]
        assert [chunk.text for chunk in rapid.stats.retrieved_chunks] == found


@pytest.mark.parametrize(
    ("length", "window", "wanted"),
    [
        (10, 3, [0, 1, 2, 3, 7, 8, 9]),
        (10, 6, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (10, 8, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (3, 8, [0, 1, 2]),
        (5, 1, [0, 1, 2, 3, 4]),
    ],
)
def test_a_streaming_drafter_keeps_the_first_four_tokens_and_the_last_ones(length, window, wanted):
    assert sinks_and_window(range(length), window=window) == wanted


def test_streaming_is_lossless_and_its_drafter_reads_no_more_than_its_window(pipeline, cases):
    options = pipeline.options.override(num_draft_tokens=3)
    for case in cases:
        streaming = answer(pipeline, make_method("streaming"), case, options)
        assert streaming.token_ids == answer(pipeline, make_method("lc"), case, pipeline.options).token_ids
        assert streaming.stats.drafter_prompt_tokens == 4 + 96
        assert streaming.stats.drafted_tokens > 0
        assert streaming.stats.retrieved_chunks == ()
        assert streaming.stats.retriever == ""


def test_each_speculating_method_runs_with_its_fixed_options():
    scripted = ScriptedPipeline(lambda call: "Yes.")
    task = demo_tasks(context=400, num_questions=1)[0]
    retrieval = TaskRetrieval(scripted, scripted.options.retrieval, "natural")
    question = task.questions[0]
    prompt = question_prompt("{context} {question}", context=task.document, question=question.question)
    case = Case(task, question, prompt, retrieval.find(task, question))
    options = scripted.options.override(transfer_strength=3.0, mixture_weight=0.25)
    rules = {}
    for name in ("sd", "rapid", "rapid-fixed", "rapid-paper", "mixture"):
        method = make_method(name)
        answer(scripted, method, case, options)
        speculation = scripted.calls[-1].options.speculation
        rules[name] = (speculation.acceptance, speculation.adaptive_transfer)
        assert (speculation.transfer_strength, speculation.mixture_weight) == (3.0, 0.25)
        assert scripted.calls[-1].chunks
    assert rules == {
        "sd": ("lossless", True),
        "rapid": ("augmented", True),
        "rapid-fixed": ("augmented", False),
        "rapid-paper": ("paper", True),
        "mixture": ("mixture", True),
    }


def test_generate_reads_a_document_once(pipeline, cases):
    generate = TransformersGenerate()
    first, second = cases[0], cases[1]
    assert first.task is second.task
    other = cases[-1]
    assert other.task is not first.task
    document = pipeline.count_tokens(first.task.document)
    stats = [
        answer(pipeline, generate, case, pipeline.options).stats for case in (first, second, other, first)
    ]
    assert stats[0].reused_prefix_tokens == 0
    assert stats[1].reused_prefix_tokens > document
    assert stats[2].reused_prefix_tokens < 20
    assert stats[3].reused_prefix_tokens < 20


def test_generate_reports_progress_and_ends_with_its_completion(pipeline, cases):
    *reading, delta, completion = TransformersGenerate().stream(pipeline, cases[0], pipeline.options)
    assert reading
    assert all(isinstance(event, PrefillProgress) for event in reading)
    assert reading[-1].done_tokens == reading[-1].total_tokens == completion.stats.prompt_tokens - 1
    assert isinstance(delta, TextDelta)
    assert isinstance(completion, Completion)
    assert delta.text == completion.text


@pytest.mark.parametrize(
    "changes", [{"temperature": 1.0}, {"repetition_penalty": 1.1}, {"stop": ["x"]}, {"ignore_eos": True}]
)
def test_generate_supports_only_greedy_decoding(pipeline, cases, changes):
    with pytest.raises(ConfigurationError, match="'generate' only decodes greedily"):
        answer(pipeline, TransformersGenerate(), cases[0], pipeline.options.override(**changes))


def test_generate_refuses_a_prompt_that_does_not_fit(pipeline, cases):
    options = pipeline.options.override(max_new_tokens=2000)
    with pytest.raises(ContextLengthError, match="Shorten the context"):
        answer(pipeline, TransformersGenerate(), cases[0], options)


def test_names_and_methods_belong_together():
    methods = [make_method(name) for name in METHOD_NAMES]
    assert [method.name for method in methods] == list(METHOD_NAMES)
    plain = [method.name for method in methods if not method.speculates]
    assert plain == ["lc", "rag", "generate"]
    assert len({method.label for method in methods}) == len(methods)
    assert make_method("generate") is not make_method("generate")

"""The transformers baselines on small random models."""

import dataclasses
import sys

import pytest
from helpers.evaluation_pipelines import demo_tokenizer
from helpers.tiny_models import reference_generate, tiny_model

from rapid_integrations.benchmark.transformers_runtime import TransformersRuntime
from rapid_integrations.benchmark.work import Run
from rapid_integrations.demo import PROMPT_TEMPLATE
from rapid_integrations.errors import ConfigurationError, ContextLengthError
from rapid_integrations.evaluation.tasks.prompts import question_prompt
from rapid_integrations.evaluation.tasks.task import demo_tasks
from rapid_integrations.prompts import encode_prompt

TOKENIZER = demo_tokenizer()
SHAPE = {"vocab_size": len(TOKENIZER), "eos_token_id": TOKENIZER.eos_token_id}
HOSTS = {"hf-pipeline": "langchain_huggingface", "hf-llm": "llama_index.llms.huggingface"}


def make(drafter_seed: int | None = 1, **more) -> TransformersRuntime:
    drafter = None if drafter_seed is None else tiny_model("llama", drafter_seed, **SHAPE)
    return TransformersRuntime(
        tiny_model("llama", 0, **SHAPE), drafter, TOKENIZER, **{"max_new_tokens": 12, **more}
    )


@pytest.fixture(scope="module")
def runtime():
    return make()


@pytest.fixture(scope="module")
def task():
    (task,) = demo_tasks(context=256, num_questions=3, questions_per_document=3, seed=3)
    return task


@pytest.fixture(scope="module")
def expected(task):
    answers = []
    for question in task.questions:
        prompt = question_prompt(PROMPT_TEMPLATE, context=task.document, question=question.question)
        tokens = reference_generate(tiny_model("llama", 0, **SHAPE), encode_prompt(prompt, TOKENIZER), 12)
        end = TOKENIZER.eos_token_id
        answers.append(tuple(tokens[: tokens.index(end)] if end in tokens else tokens))
    return answers


@pytest.mark.parametrize("baseline", ["generate", "assisted", "lookup"])
def test_answers_equal_generate_with_and_without_a_cached_prompt(runtime, task, expected, baseline):
    for cold in (True, False, False):
        outcome = runtime.run(Run(baseline, task, cold=cold))
        assert [answer.token_ids for answer in outcome.answers] == expected
        assert 0 < outcome.first_token_s[0] < outcome.wall_s
        assert outcome.stats.completion_tokens >= sum(map(len, expected))
        assert (outcome.stats.rounds == outcome.stats.completion_tokens) or baseline != "generate"


def test_a_good_drafter_saves_rounds(task, expected):
    outcome = make(drafter_seed=0).run(Run("assisted", task, cold=True))
    assert [answer.token_ids for answer in outcome.answers] == expected
    assert outcome.stats.rounds < outcome.stats.completion_tokens * 0.7


def test_a_cached_prompt_is_not_read_again(runtime, task):
    single = dataclasses.replace(task, questions=task.questions[:1])
    cold = runtime.run(Run("generate", single, cold=True))
    for baseline in ("generate", "assisted", "lookup", "generate"):
        warm = runtime.run(Run(baseline, single))
        assert warm.stats.reused_prefix_tokens == cold.stats.prompt_tokens - 1
    assert cold.stats.reused_prefix_tokens == 0
    bytes_per_token = 3 * 2 * 2 * 16 * 4  # layers, keys and values, heads, their size, float32
    assert cold.kv_bytes == (cold.stats.prompt_tokens - 1) * bytes_per_token


def test_a_padded_batch_gives_the_answers_of_single_questions(runtime, task, expected):
    for _ in range(2):
        outcome = runtime.run(Run("generate", task, together=True))
        assert [answer.token_ids for answer in outcome.answers] == expected
        assert len(outcome.first_token_s) == 3
    assert outcome.stats.reused_prefix_tokens > 3 * 256


@pytest.mark.parametrize("baseline", ["hf-pipeline", "hf-llm"])
def test_the_host_classes_give_the_same_answers(runtime, task, baseline):
    pytest.importorskip(HOSTS[baseline])
    texts = [answer.text.strip() for answer in runtime.run(Run("generate", task)).answers]
    outcome = runtime.run(Run(baseline, task, cold=True))
    assert outcome.same_prompt
    assert [answer.text.strip() for answer in outcome.answers] == texts
    assert all(answer.token_ids is None for answer in outcome.answers)


@pytest.mark.parametrize(
    ("baseline", "module", "package"),
    [
        ("hf-pipeline", "langchain_huggingface", "langchain-huggingface"),
        ("hf-llm", "llama_index.llms.huggingface", "llama-index-llms-huggingface"),
    ],
)
def test_a_missing_host_package_names_the_extra(monkeypatch, task, baseline, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigurationError, match=rf"{baseline}.*{package}.*rapid-integrations\[bench\]"):
        make().run(Run(baseline, task))


def test_assisted_generation_without_a_drafter_is_an_error(task):
    with pytest.raises(ConfigurationError, match="needs a drafter"):
        make(drafter_seed=None).run(Run("assisted", task))


@pytest.mark.parametrize("baseline", ["generate", "hf-llm"])
def test_a_prompt_that_does_not_fit_is_an_error(task, baseline):
    pytest.importorskip("llama_index.llms.huggingface")
    with pytest.raises(ContextLengthError, match=r"a prompt has 2\d\d tokens; the target accepts 48"):
        make(max_new_tokens=2000).run(Run(baseline, task))


def test_a_sliding_window_that_cannot_be_cropped_is_read_again(task):
    tokenizer_shape = {**SHAPE, "sliding_window": 24}
    model = tiny_model("mistral", 0, **tokenizer_shape)
    runtime = TransformersRuntime(model, None, TOKENIZER, max_new_tokens=6)
    first = runtime.run(Run("generate", task, cold=True))
    assert runtime.run(Run("generate", task)).answers == first.answers

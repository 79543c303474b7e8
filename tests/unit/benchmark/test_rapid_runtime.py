"""Our baselines on small random models."""

import dataclasses

import pytest
from helpers.evaluation_pipelines import demo_tokenizer, random_pipeline
from helpers.tiny_models import tiny_model

from rapid_integrations import GenerationOptions, RapidPipeline
from rapid_integrations.benchmark.rapid_runtime import RapidRuntime
from rapid_integrations.benchmark.work import Run
from rapid_integrations.evaluation.tasks.task import demo_tasks


@pytest.fixture(scope="module")
def runtime():
    pipeline = random_pipeline(num_draft_tokens=3)
    target, drafter = (model.model for model in (pipeline.engine.target, pipeline.engine.drafter))

    def load() -> RapidPipeline:
        return RapidPipeline.from_pretrained(
            target, drafter, tokenizer=pipeline.tokenizer, options=pipeline.options
        )

    return RapidRuntime(load)


@pytest.fixture(scope="module")
def task():
    (task,) = demo_tasks(context=256, num_questions=2, questions_per_document=2, seed=3)
    return task


def test_lossless_baselines_give_the_same_answers_with_any_drafter(runtime, task):
    plain = runtime.run(Run("plain", task, cold=True))
    for run in (
        Run("lossless", task, retrieval="gold"),
        Run("lossless", task, retrieval="unrelated"),
        Run("plain", task, together=True),
        Run("lossless", task, together=True, retrieval="gold"),
        Run("rapid-langchain", task, cold=True),
        Run("rapid-llamaindex", task, cold=True),
    ):
        outcome = runtime.run(run)
        assert outcome.answers == plain.answers, run
        assert len(outcome.first_token_s) == 2
        assert 0 < outcome.first_token_s[0] < outcome.wall_s
        assert (outcome.stats.drafted_tokens > 0) == (run.baseline != "plain")


def test_a_cold_run_reads_everything_and_reports_its_kv_bytes(runtime, task):
    one = dataclasses.replace(task, questions=task.questions[:1])
    runtime.run(Run("plain", one))
    cold = runtime.run(Run("plain", one, cold=True))
    warm = runtime.run(Run("plain", one))
    assert cold.stats.reused_prefix_tokens == 0
    assert warm.stats.reused_prefix_tokens == warm.stats.prompt_tokens - 1
    bytes_per_token = 3 * 2 * 2 * 16 * 4  # layers, keys and values, heads, their size, float32
    assert cold.kv_bytes is not None
    assert cold.kv_bytes >= cold.stats.prompt_tokens * bytes_per_token
    assert warm.kv_bytes is None
    assert cold.peak_bytes is None or cold.peak_bytes >= cold.rest_bytes > 0


def test_the_retrieval_quality_decides_the_drafter_s_context(runtime, task):
    prompts = {}
    for quality in ("gold", "natural"):
        prompts[quality] = runtime.run(Run("rapid", task, cold=True, retrieval=quality)).stats
        assert 0 < prompts[quality].drafter_prompt_tokens < prompts[quality].prompt_tokens
    assert runtime.run(Run("plain", task, retrieval="gold")).stats.drafter_prompt_tokens == 0


def test_it_drafts_for_itself_without_a_drafter(task):
    tokenizer = demo_tokenizer()
    model = tiny_model("llama", 0, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    options = GenerationOptions().override(
        retrieval_chunk_tokens=32, retrieval_min_tokens=96, max_new_tokens=12
    )
    runtime = RapidRuntime(lambda: RapidPipeline.from_pretrained(model, tokenizer=tokenizer, options=options))
    assert runtime.run(Run("self", task, retrieval="gold")).stats.drafted_tokens > 0

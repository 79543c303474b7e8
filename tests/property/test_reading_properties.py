"""Requests that are submitted together against the same requests alone, over random prompts and chunks."""

from typing import Any

import hypothesis.strategies as st
import pytest
from helpers.table_models import TableModel, random_table
from helpers.tiny_models import run, run_all
from helpers.token_caches import texts
from hypothesis import given, settings

from rapid_integrations.config import EngineLimits, SamplingParams, SpeculationParams
from rapid_integrations.engine.engine import Engine
from rapid_integrations.engine.requests import Request

VOCAB = 12
TARGET, DRAFTER = random_table(VOCAB, 1), random_table(VOCAB, 2)

prompts = st.lists(st.tuples(texts, texts), min_size=1, max_size=6)


def engine_of(**limits: int) -> Engine:
    return Engine(TableModel(TARGET), TableModel(DRAFTER), limits=EngineLimits(**limits))  # type: ignore[arg-type]


def request(target: list[int], drafter: list[int], seed: int) -> Request:
    sampling = SamplingParams(max_new_tokens=5, temperature=1.0, seed=seed)
    # Both prompts end alike, so the question agreement is measured on the same tokens.
    return Request([*target, 3, 4], [*drafter, 3, 4], sampling, SpeculationParams(num_draft_tokens=2))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(prompts, st.integers(1, 60), st.sampled_from([0, 2**20]))
def test_a_batch_changes_neither_answers_nor_question_agreements(
    wanted: Any, chunk: int, cache_bytes: int
) -> None:
    requests = [request(*both, seed) for seed, both in enumerate(wanted)]
    together = engine_of(prefill_chunk_tokens=chunk, prefix_cache_bytes=cache_bytes)
    found = [(tokens, finished.stats.question_agreement) for tokens, finished in run_all(together, requests)]
    together.close()
    for single, (tokens, question_agreement) in zip(requests, found, strict=True):
        alone = engine_of()
        expected, stats = run(alone, single)
        alone.close()
        assert tokens == expected
        assert question_agreement == pytest.approx(stats.question_agreement)

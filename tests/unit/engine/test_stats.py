"""Rates are derived from counts, and everything is data that JSON can hold."""

import json

import pytest

from rapid_integrations.engine.stats import RapidStats, RetrievedChunk


def test_rates_are_derived_from_counts() -> None:
    stats = RapidStats(completion_tokens=30, rounds=10, drafted_tokens=40, accepted_tokens=20, decode_s=1.5)
    assert stats.acceptance_rate == 0.5
    assert stats.tokens_per_round == 3
    assert stats.decode_tokens_per_s == 20


def test_rates_of_nothing_are_zero() -> None:
    stats = RapidStats()
    assert (stats.acceptance_rate, stats.tokens_per_round, stats.decode_tokens_per_s) == (0, 0, 0)


def test_pooled_stats_are_sums_and_their_rates_those_of_the_sums() -> None:
    one = RapidStats(completion_tokens=10, rounds=2, drafted_tokens=10, decode_s=1.0, retriever="bm25")
    one.token_sources = "dfdtdfdtdt"
    other = RapidStats(completion_tokens=30, rounds=8, drafted_tokens=30, accepted_tokens=8, decode_s=3.0)
    pooled = RapidStats.pooled([one, other])
    assert pooled == RapidStats(
        completion_tokens=40, rounds=10, drafted_tokens=40, accepted_tokens=8, decode_s=4.0
    )
    assert (pooled.acceptance_rate, pooled.tokens_per_round, pooled.decode_tokens_per_s) == (0.2, 4, 10)
    assert RapidStats.pooled([]) == RapidStats()


def test_everything_survives_json() -> None:
    stats = RapidStats(rounds=2, retriever="bm25", retrieved_chunks=(RetrievedChunk("a", 3, 0.5),))
    data = json.loads(json.dumps(stats.as_dict()))
    assert data["retrieved_chunks"] == [{"text": "a", "position": 3, "score": 0.5}]
    assert data["rounds"] == 2
    assert {"acceptance_rate", "tokens_per_round", "decode_tokens_per_s"} < data.keys()
    assert data["retrieval_fallback"] is None
    with pytest.raises(AttributeError):
        stats.typo = 1  # type: ignore[attr-defined]

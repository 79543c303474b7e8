from collections.abc import Iterator

import pytest

from rapid_integrations import RapidPipeline
from rapid_integrations.demo.documents import generate_documents
from rapid_integrations.demo.evaluate_formats import FORMATS, Enums, FormatResult, evaluate, is_valid, table
from rapid_integrations.engine.stats import RapidStats


@pytest.fixture(scope="module")
def pipeline() -> Iterator[RapidPipeline]:
    pipeline = RapidPipeline.demo()
    yield pipeline
    pipeline.close()


@pytest.mark.parametrize(
    ("asked", "text", "valid"),
    [
        ({}, "", True),
        ({"regex": "a+"}, "aa", True),
        ({"regex": "a+"}, "aab", False),
        ({"choices": ["yes", "no"]}, "no", True),
        ({"choices": ["yes", "no"]}, "n", False),
        ({"json_schema": Enums}, '{"kind": "mill", "found": "in part"}', True),
        ({"json_schema": Enums}, '{"kind": "mill", "found": "maybe"}', False),
        ({"json_schema": Enums}, '{"kind": "mill"', False),
    ],
)
def test_validity_of_answers(asked: dict, text: str, valid: bool) -> None:
    assert is_valid(text, asked) is valid


def test_the_table_leaves_forced_tokens_out_of_the_last_column() -> None:
    stats = RapidStats(
        completion_tokens=30, rounds=10, drafted_tokens=20, accepted_tokens=10, forced_tokens=10
    )
    rows = table({"x": FormatResult([True, False], [True], stats)}).splitlines()
    assert rows[2] == "| x | 0.50 (2) | 1.00 (1) | 15.0 | 5.0 | 0.50 | 3.00 | 2.00 |"


def test_answers_that_end_follow_their_format(pipeline: RapidPipeline) -> None:
    documents = list(generate_documents(num_tokens=512, num_documents=3, questions_per_document=1, seed=1))
    for name, asked in FORMATS.items():
        result = evaluate(pipeline, asked, documents, num_draft_tokens=6)
        assert len(result.ended) == 3
        assert any(result.ended), name
        assert all(result.valid), name
        assert result.stats.tokens_per_round > 1, name
        assert (result.stats.forced_tokens > 0) == (name != "text"), name

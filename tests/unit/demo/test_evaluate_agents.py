from collections.abc import Iterator

import pytest

from rapid_integrations import RapidPipeline
from rapid_integrations.demo.documents import generate_documents
from rapid_integrations.demo.evaluate_agents import AGENTS, DocumentSearch, Outcome, evaluate, table


@pytest.fixture(scope="module")
def pipeline() -> Iterator[RapidPipeline]:
    pipeline = RapidPipeline.demo()
    yield pipeline
    pipeline.close()


def test_the_search_finds_what_a_question_names() -> None:
    (document,) = generate_documents(num_tokens=8192, num_documents=1, questions_per_document=20, seed=3)
    found = []
    for question in document.questions:
        search = DocumentSearch(document)
        result = search.search(question.question)
        assert search.queries == [question.question]
        assert search.results == [result]
        assert result.endswith(f"\n\n{question.question}")
        assert len(result) < len(document.text) / 4
        found.append(search.has_found(question))
    assert sum(found) > 5
    assert not DocumentSearch(document).has_found(document.questions[0])


def test_only_the_expected_answer_counts() -> None:
    def knows_the_first(search: DocumentSearch, question: str) -> str:
        search.search(question)
        first = search.document.questions[0]
        return f" {first.answer}\n" if question == first.question else "No idea."

    outcomes = evaluate(knows_the_first, num_tokens=1024, num_questions=6, per_document=3, seed=1)
    assert [outcome.right for outcome in outcomes] == [True, False, False] * 2
    assert all(outcome.num_calls == 1 for outcome in outcomes)


def test_the_table_shows_shares_and_numbers() -> None:
    outcomes = [Outcome("single", 1, True, True), Outcome("describe", 0, False, False)]
    assert table({"x": outcomes}).splitlines()[2:] == [
        "| x | all | 0.50 (2) | 0.50 (2) | 0.50 (2) | 1.00 (1) |",
        "| x | single | 1.00 (1) | 1.00 (1) | 1.00 (1) | 1.00 (1) |",
        "| x | describe | 0.00 (1) | 0.00 (1) | 0.00 (1) | - |",
    ]


@pytest.mark.slow
# LlamaIndex's workflows look at every attribute of an agent, deprecated ones of pydantic among them.
@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning")
@pytest.mark.parametrize("framework", AGENTS)
def test_an_agent_looks_up_and_answers(framework: str, pipeline: RapidPipeline) -> None:
    agent = AGENTS[framework](pipeline)
    outcomes = evaluate(agent, num_tokens=4096, num_questions=12, per_document=6, seed=5)
    assert all(outcome.num_calls > 0 for outcome in outcomes)
    assert sum(outcome.right for outcome in outcomes) >= 10

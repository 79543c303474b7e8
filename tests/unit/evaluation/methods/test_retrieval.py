"""Retrieval of each quality."""

from dataclasses import replace

import pytest
from helpers.evaluation_pipelines import ScriptedPipeline

from rapid_integrations.config import RetrievalParams
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation.methods.retrieval import GivenChunks, TaskRetrieval, holds_evidence
from rapid_integrations.evaluation.tasks.retrieval_quality import RETRIEVAL_QUALITIES
from rapid_integrations.evaluation.tasks.task import Task, TaskQuestion, demo_tasks
from rapid_integrations.retrieval import DrafterContext

PARAMS = RetrievalParams(chunk_tokens=32, min_tokens=96)
TASKS = demo_tasks(context=1024, num_questions=24, seed=11)
CASES = [(task, question) for task in TASKS for question in task.questions]


@pytest.fixture(scope="module")
def pipeline():
    return ScriptedPipeline(lambda call: "")


def evidence(task, question):
    return [" ".join(task.document[a:b].split()) for a, b in question.evidence]


def found_text(found):
    return " ".join(found.retrieved.text.split())


def test_gold_holds_the_whole_evidence_of_every_question(pipeline):
    retrieval = TaskRetrieval(pipeline, PARAMS, "gold")
    for task, question in CASES:
        found = retrieval.find(task, question)
        assert all(sentence in found_text(found) for sentence in evidence(task, question))
        assert found.holds_evidence is True


def test_missing_holds_none_of_it_and_yet_fills_the_budget(pipeline):
    retrieval = TaskRetrieval(pipeline, PARAMS, "missing")
    for task, question in CASES:
        found = retrieval.find(task, question)
        assert not any(sentence in found_text(found) for sentence in evidence(task, question))
        assert found.holds_evidence is False
        assert found.retrieved.fallback is None
        assert all(chunk.text in task.document for chunk in found.retrieved.chunks)
        assert 48 < pipeline.count_tokens(found.retrieved.text) <= 96


def test_adversarial_puts_a_contradiction_in_the_place_of_the_evidence(pipeline):
    retrieval = TaskRetrieval(pipeline, PARAMS, "adversarial")
    for task, question in CASES:
        found = retrieval.find(task, question)
        assert found.holds_evidence is False
        assert not any(sentence in found_text(found) for sentence in evidence(task, question))
        assert found.retrieved.fallback is None
        passage, *others = reversed(found.retrieved.chunks)
        assert passage.text == question.contradiction, "whole, and right before the question"
        assert all(chunk.text in task.document for chunk in others)
        assert pipeline.count_tokens(found.retrieved.text) <= found.max_tokens


def test_a_long_contradiction_raises_the_budget(pipeline):
    task, question = CASES[0]
    long = replace(question, contradiction="It is not so. " * 40)
    found = TaskRetrieval(pipeline, PARAMS, "adversarial").find(task, long)
    assert found.max_tokens > 96
    assert found.retrieved.chunks[-1].text == long.contradiction.strip()


def test_unrelated_takes_everything_from_the_other_document(pipeline):
    retrieval = TaskRetrieval(pipeline, PARAMS, "unrelated")
    for task, question in CASES:
        found = retrieval.find(task, question)
        assert found.retrieved.chunks
        assert all(chunk.text in task.other_document for chunk in found.retrieved.chunks)
        assert not any(chunk.text in task.document for chunk in found.retrieved.chunks)
        assert found.holds_evidence is False


def test_natural_is_what_the_pipeline_finds_by_itself(pipeline):
    retrieval = TaskRetrieval(pipeline, PARAMS, "natural")
    hits = 0
    for task, question in CASES:
        found = retrieval.find(task, question)
        by_itself = DrafterContext(tokenizer=pipeline.tokenizer).find(
            question.question, task.document, PARAMS
        )
        assert found.retrieved.text == by_itself.text
        assert found.retrieved.retriever == "bm25"
        in_it = all(sentence in found_text(found) for sentence in evidence(task, question))
        assert found.holds_evidence is in_it
        hits += in_it
    assert 0 < hits < len(CASES)


@pytest.mark.parametrize("quality", RETRIEVAL_QUALITIES)
def test_given_back_to_a_pipeline_the_chunks_make_the_same_context(pipeline, quality):
    retrieval = TaskRetrieval(pipeline, PARAMS, quality)
    for task, question in CASES[:8]:
        found = retrieval.find(task, question)
        budget = RetrievalParams(chunk_tokens=32, max_tokens=found.max_tokens)
        again = DrafterContext(tokenizer=pipeline.tokenizer).find(
            question.question, task.document, budget, retriever=GivenChunks.of(found.retrieved)
        )
        assert again.text == found.retrieved.text


def test_gold_raises_the_budget_only_where_the_evidence_needs_it(pipeline):
    tight = RetrievalParams(chunk_tokens=32, min_tokens=48)
    budgets = {TaskRetrieval(pipeline, tight, "gold").find(*case).max_tokens for case in CASES}
    assert min(budgets) == 48
    assert 48 < max(budgets) <= 3 * 34
    ample = RetrievalParams(chunk_tokens=32, min_tokens=600)
    assert {TaskRetrieval(pipeline, ample, "gold").find(*case).max_tokens for case in CASES} == {600}


def test_a_document_within_the_budget_still_loses_its_evidence(pipeline):
    ample = RetrievalParams(chunk_tokens=32, min_tokens=5000)
    found = TaskRetrieval(pipeline, ample, "missing").find(*CASES[0])
    assert found.holds_evidence is False
    assert pipeline.count_tokens(found.retrieved.text) > 512


def test_a_quality_without_its_data_is_an_error(pipeline):
    question = TaskQuestion("Where is it?", ("There.",))
    for quality in ("gold", "missing", "adversarial"):
        with pytest.raises(ConfigurationError, match=f"retrieval='{quality}' needs the position"):
            TaskRetrieval(pipeline, PARAMS, quality).find(Task("It is there.", (question,), 4), question)
    with pytest.raises(ConfigurationError, match="give every task an other_document"):
        TaskRetrieval(pipeline, PARAMS, "unrelated").find(Task("It is there.", (question,), 4), question)
    known = TaskQuestion("Where is it?", ("There.",), ((0, 12),))
    with pytest.raises(
        ConfigurationError, match=r"needs a passage that contradicts the document, .* no contradiction"
    ):
        TaskRetrieval(pipeline, PARAMS, "adversarial").find(Task("It is there.", (known,), 4), known)
    everywhere = TaskQuestion("Where is it?", ("There.",), ((0, 12),))
    with pytest.raises(ConfigurationError, match="leaves no chunk, because every chunk"):
        TaskRetrieval(pipeline, PARAMS, "missing").find(Task("It is there.", (everywhere,), 4), everywhere)
    with pytest.raises(ConfigurationError, match=r"'good'.*natural, gold, missing, unrelated, adversarial"):
        TaskRetrieval(pipeline, PARAMS, "good")


def test_unknown_evidence_is_neither_there_nor_missing(pipeline):
    question = TaskQuestion("Where is it?", ("There.",))
    task = Task("It is there.", (question,), 4)
    found = TaskRetrieval(pipeline, PARAMS, "natural").find(task, question)
    assert found.holds_evidence is None
    assert holds_evidence(found.retrieved, task, question) is None

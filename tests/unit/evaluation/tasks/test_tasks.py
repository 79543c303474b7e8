"""Generated tasks."""

import pytest

from rapid_integrations.demo import generate_documents
from rapid_integrations.demo.domains import DOMAINS
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation.tasks.sources import DemoSource
from rapid_integrations.evaluation.tasks.task import Task, TaskQuestion, demo_task, demo_tasks


@pytest.mark.parametrize(("context", "number"), [(256, 1), (256, 7), (1024, 8), (1024, 9), (2048, 23)])
def test_there_are_exactly_as_many_questions_as_asked_for(context, number):
    tasks = demo_tasks(context=context, num_questions=number, seed=3)
    assert sum(len(task.questions) for task in tasks) == number
    assert all(task.questions for task in tasks)
    assert {task.context for task in tasks} == {context}
    assert len({task.document for task in tasks}) == len(tasks)


def test_documents_are_shared_by_several_questions():
    tasks = demo_tasks(context=2048, num_questions=23)
    assert [len(task.questions) for task in tasks] == [10, 10, 3]
    assert [len(task.questions) for task in demo_tasks(context=512, num_questions=6)] == [4, 2]
    fewer = demo_tasks(context=2048, num_questions=5, questions_per_document=2)
    assert [len(task.questions) for task in fewer] == [2, 2, 1]


def test_the_seed_decides():
    assert demo_tasks(context=512, num_questions=4, seed=1) == demo_tasks(
        context=512, num_questions=4, seed=1
    )
    assert demo_tasks(context=512, num_questions=4, seed=1) != demo_tasks(
        context=512, num_questions=4, seed=2
    )


def test_the_other_document_is_another_one_that_lacks_the_answers():
    for task in demo_tasks(context=512, num_questions=10):
        assert task.other_document
        assert task.other_document != task.document
        for question in task.questions:
            for start, end in question.evidence:
                assert task.document[start:end] not in task.other_document


def test_questions_keep_answer_evidence_and_kind():
    (document,) = generate_documents(num_tokens=512, num_documents=1, questions_per_document=3, seed=5)
    task = demo_task(document, context=512)
    assert task == Task(
        document.text,
        tuple(
            TaskQuestion(
                q.question,
                (q.answer,),
                q.evidence,
                f"handbook, {q.kind}",
                contradiction=q.contradiction,
            )
            for q in document.questions
        ),
        512,
    )
    assert all(q.evidence for q in task.questions)


@pytest.mark.parametrize("domain", DOMAINS)
def test_kinds_and_domains_reach_the_generator(domain):
    tasks = demo_tasks(context=1024, num_questions=8, kinds=["two_hop"], domain=domain)
    assert {question.kind for task in tasks for question in task.questions} == {f"{domain}, two_hop"}


def test_a_source_goes_through_lengths_and_domains():
    source = DemoSource((256, 512), 3, seed=1, subsets=("legal", "medical"))
    asked = [(task.context, q.kind.split(", ")[0]) for task in source.tasks(None) for q in task.questions]
    assert asked == [
        (context, name) for context in (256, 512) for name in ("legal", "medical") for _ in "123"
    ]
    assert source.num_questions == len(asked)
    assert source.settings()["subsets"] == ["legal", "medical"]


@pytest.mark.parametrize("subsets", [(), ("handbook", "naval")])
def test_unknown_domains_are_named(subsets):
    with pytest.raises(ConfigurationError, match="one or more of handbook, legal, medical, financial"):
        DemoSource((256,), 3, seed=1, subsets=subsets)


def test_no_question_is_an_error():
    with pytest.raises(ConfigurationError, match="num_questions=0"):
        demo_tasks(context=512, num_questions=0)

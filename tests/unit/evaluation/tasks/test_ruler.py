"""RULER's tasks: hidden sentences, evidence, and lengths of prompts."""

import re

import pytest
from helpers.evaluation_pipelines import ScriptedPipeline

from rapid_integrations.errors import ConfigurationError, ContextLengthError
from rapid_integrations.evaluation import RULER_TASKS, RulerSource, evaluate, question_prompt, ruler_task

PIPELINE = ScriptedPipeline(lambda call: "")
NEEDLE = re.compile(r"One of the special magic numbers for (\S+) is: (\d{7})\.")
ASSIGNMENT = re.compile(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.")


def made(subset, context=1024, **options):
    task = ruler_task(PIPELINE, subset, context=context, **options)
    (question,) = task.questions
    return task, question, [task.document[a:b] for a, b in question.evidence]


@pytest.mark.parametrize("subset", RULER_TASKS)
@pytest.mark.parametrize("context", [1024, 4096])
def test_prompt_and_answer_fill_the_length_and_no_more(subset, context):
    task, question, _ = made(subset, context)
    prompt = question_prompt(
        task.format.prompt_template,
        context=task.document,
        question=question.question,
        answer_start=question.answer_start,
    )
    total = len(PIPELINE.encode(prompt)) + task.format.max_new_tokens
    # The prompt is shorter by less than one sentence, or three repetitions of a word.
    assert context - 70 < total <= context
    assert task.context == context
    assert task.format.metric == "contains-all"
    assert question.kind == subset


@pytest.mark.parametrize(
    ("subset", "hidden", "wanted"),
    [("single", 1, 1), ("multi-key", 4, 1), ("multi-value", 4, 4), ("multi-query", 4, 4)],
)
def test_needles_are_hidden_and_the_evidence_is_what_is_asked_for(subset, hidden, wanted):
    task, question, evidence = made(subset, seed=3)
    needles = NEEDLE.findall(task.document)
    assert len(needles) == hidden
    assert len({number for _, number in needles}) == hidden
    asked = [key for key in dict.fromkeys(key for key, _ in needles) if key in question.question]
    right = [number for key, number in needles if key in asked]
    assert sorted(question.answers) == sorted(right)
    assert len(right) == wanted
    assert [NEEDLE.fullmatch(text).group(2) for text in evidence] == right
    assert all(key in question.answer_start for key in asked)
    assert not NEEDLE.search(task.other_document)


@pytest.mark.parametrize("subset", ["single", "multi-key", "multi-value", "multi-query"])
@pytest.mark.parametrize("seed", range(3))
def test_contradictions_have_other_numbers_for_the_same_keys(subset, seed):
    _, question, evidence = made(subset, seed=seed)
    right, wrong = NEEDLE.findall(" ".join(evidence)), NEEDLE.findall(question.contradiction)
    assert [key for key, _ in wrong] == [key for key, _ in right]
    assert not {number for _, number in wrong} & {number for _, number in right}


def test_a_contradicting_chain_assigns_the_value_to_other_variables():
    _, question, evidence = made("variable-tracking", seed=5)
    right, wrong = ASSIGNMENT.findall(" ".join(evidence)), ASSIGNMENT.findall(question.contradiction)
    assert len(wrong) == len(right)
    assert wrong[0][1] == right[0][1]
    assert [source for _, source in wrong[1:]] == [name for name, _ in wrong[:-1]]
    assert not {name for name, _ in wrong} & {name for name, _ in right}


def test_variables_form_a_chain_in_order():
    task, question, evidence = made("variable-tracking", seed=5)
    chain = ASSIGNMENT.findall(task.document)
    assert [name for name, _ in chain] == list(question.answers)
    assert [source for _, source in chain[1:]] == [name for name, _ in chain[:-1]]
    assert chain[0][1] in question.question
    assert [ASSIGNMENT.fullmatch(text).groups() for text in evidence] == chain
    assert len(chain) == 5


@pytest.mark.parametrize(("context", "often", "seldom"), [(1024, 6, 1), (4096, 30, 3)])
def test_the_common_words_are_the_most_frequent_ones(context, often, seldom):
    task, question, evidence = made("common-words", context)
    numbers, words = zip(*re.findall(r"(\d+)\. (\w+)", task.document), strict=True)
    assert [int(number) for number in numbers] == list(range(1, len(words) + 1))
    counts = {word: words.count(word) for word in words}
    assert sorted(word for word, count in counts.items() if count == often) == sorted(question.answers)
    assert set(counts.values()) == {often, seldom}
    assert len(question.answers) == 10
    assert evidence == []


def test_the_seed_and_the_number_make_the_task():
    assert made("single", seed=1) == made("single", seed=1)
    assert made("single", seed=1)[0].document != made("single", seed=2)[0].document
    assert made("single", number=0)[1].answers != made("single", number=1)[1].answers


def test_a_source_goes_through_lengths_and_subsets():
    source = RulerSource((512, 1024), 2, 0, ("single", "variable-tracking"))
    tasks = list(source.tasks(PIPELINE))
    assert len(tasks) == source.num_questions == 8
    assert [task.context for task in tasks] == [512] * 4 + [1024] * 4
    assert [task.questions[0].kind for task in tasks[:4]] == ["single", "variable-tracking"] * 2
    shorter = RulerSource((512,), 1, 0, ("single",), max_new_tokens=20)
    assert next(shorter.tasks(PIPELINE)).format.max_new_tokens == 20


def test_a_run_with_good_and_with_missing_retrieval():
    def reads_it(call):
        wanted = re.search(r"for (\S+) mentioned", call.prompt.query).group(1)
        return " ".join(number for key, number in NEEDLE.findall(call.prompt.context) if key == wanted)

    scores = {}
    for quality in ("gold", "missing", "unrelated"):
        pipeline = ScriptedPipeline(reads_it)
        source = RulerSource((2048,), 3, 0, ("multi-value",))
        # Chunks longer than a needle: the demo's tokenizer spells unknown words.
        options = pipeline.options.override(retrieval_chunk_tokens=128, retrieval_min_tokens=256)
        tasks = source.tasks(pipeline)
        report = evaluate(pipeline, tasks, ["lc", "rag"], retrieval=quality, options=options)
        assert report.result("lc", 2048).accuracy.value == 1
        assert report.result("rag", 2048).evidence_found == (quality == "gold")
        scores[quality] = report.result("rag", 2048).accuracy.value
        starts = {call.prompt.answer_start[0].text.split(" for ")[0] for call in pipeline.calls[2:]}
        assert starts == {"The special magic numbers"}
    assert scores == {"gold": 1, "missing": 0, "unrelated": 0}


def test_impossible_lengths_are_errors():
    with pytest.raises(
        ConfigurationError, match="the subsets single, needle are not allowed: name one or more of"
    ):
        RulerSource((512,), 1, 0, ("single", "needle"))
    with pytest.raises(ConfigurationError, match="no RULER task 'needle'"):
        made("needle")
    with pytest.raises(ConfigurationError, match="with 320 tokens: the hidden sentences are longer"):
        made("multi-value", 320)
    with pytest.raises(ContextLengthError, match="128 tokens leave no room"):
        made("single", 128)
    with pytest.raises(ContextLengthError, match="reads 40,960 tokens, not 65,536: lower --contexts"):
        made("single", 65_536)

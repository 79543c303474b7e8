"""The user's own questions: the file, its tasks, and a run with them."""

import json

import pytest
from helpers.evaluation_pipelines import ScriptedPipeline

from rapid_integrations.errors import ConfigurationError, ContextLengthError, DocumentError
from rapid_integrations.evaluation import evaluate
from rapid_integrations.evaluation.tasks.own_data import OwnData

SEA = "The sea is wide. The mill is old. " * 8
HILL = "The hill is steep. The road is long. " * 20
TEMPLATE = "Read {context} and say: {question}"


def read(path, metric="exact", **options):
    return OwnData.read(path, metric=metric, prompt_template=TEMPLATE, **options)


def write(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def row(**fields):
    return {"document": SEA, "question": "What is wide?", "answer": "The sea.", **fields}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "hill.txt").write_text(HILL, encoding="utf-8")
    return tmp_path


def test_rows_about_one_document_are_one_task(folder):
    file = write(
        folder / "mine.jsonl",
        row(id=7, kind="easy", evidence=[[0, 16]]),
        {"document_file": "hill.txt", "question": "How is it?", "answers": ["Steep.", "Long."]},
        row(question="What is old?", answer="The mill.\u2028"),
    )
    data = read(file, metric="f1")
    pipeline = ScriptedPipeline(lambda call: "")
    tasks = list(data.tasks(pipeline))
    assert [task.document for task in tasks] == [SEA, HILL]
    assert [task.other_document for task in tasks] == [HILL, SEA]
    lengths = [pipeline.count_tokens(text) for text in (SEA, HILL)]
    assert {task.context for task in tasks} == {round(sum(lengths) / 2)}
    assert {(task.format.metric, task.format.prompt_template) for task in tasks} == {("f1", TEMPLATE)}
    first, second = tasks[0].questions
    assert (first.question, first.answers, first.kind) == ("What is wide?", ("The sea.",), "easy")
    assert (first.question_id, first.evidence) == ("7", ((0, 16),))
    assert (second.question, second.answers, second.question_id) == ("What is old?", ("The mill.\u2028",), "")
    assert tasks[1].questions[0].answers == ("Steep.", "Long.")
    assert data.num_questions == 3
    assert data.settings()["documents"] == 2
    assert read(file, max_questions=1).num_questions == 1


def test_a_run_scores_with_the_metric_and_keeps_the_ids(folder):
    file = write(folder / "mine.jsonl", row(id="a"), row(question="What is old?", answer="The mill.", id="b"))
    pipeline = ScriptedPipeline(lambda call: "the sea" if "wide" in call.prompt.query else "an old mill")
    report = evaluate(pipeline, read(file, metric="f1").tasks(pipeline), ["lc", "rapid"])
    scores = {(r.question_id, r.method): (r.score, r.correct) for r in report.answers}
    assert scores["a", "lc"] == (1, True)
    assert scores["b", "rapid"] == (pytest.approx(2 / 3), False)
    assert report.results[0].accuracy.value == pytest.approx(5 / 6)
    assert report.settings["metrics"] == ["f1"]
    assert pipeline.calls[-1].prompt.text == f"Read {SEA} and say: What is old?"


BAD = {
    "not JSON": ("{", "line 1: this is not JSON"),
    "later line": (json.dumps(row()) + "\n\n[1]\n", r"line 3: a JSON object is expected, not \[1\]"),
    "nothing": ("\n \n", "has no questions"),
    "unknown": (row(awnser="x"), "line 1: awnser is unknown: allowed are document, document_file"),
    "no question": ({"document": SEA, "answer": "x"}, "line 1: 'question' must be text .* not missing"),
    "blank": (row(question=" "), "line 1: 'question' must be text that is not blank"),
    "both answers": (row(answers=["x"]), "give either 'answer' or 'answers'"),
    "no document": ({"question": "x", "answer": "x"}, "give either 'document' or 'document_file'"),
    "no such file": (
        {"document_file": "no.txt", "question": "x", "answer": "x"},
        r"line 1: '.*no.txt' does not exist",
    ),
    "answers": ({"document": SEA, "question": "x", "answers": []}, "'answers' must be a list of texts"),
    "an answer": ({"document": SEA, "question": "x", "answers": ["a", 3]}, "'answers' holds 3"),
    "evidence": (row(evidence=[[5, 5]]), r"evidence \[5, 5\] is no span of the document"),
    "evidence end": (row(evidence=[[0, 9999]]), "0 <= start < end <= 272 characters"),
    "contradiction": (row(contradiction=" "), "'contradiction' must be text that is not blank"),
    "evidence kind": (row(evidence=[0, 3]), "evidence 0 is no span"),
    "evidence list": (row(evidence="x"), "'evidence' must be a list"),
    "id": (row(id=[1]), "'id' must be text or a whole number"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_errors_name_file_and_line(folder, name):
    content, message = BAD[name]
    file = folder / "bad.jsonl"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    with pytest.raises(DocumentError, match=message) as caught:
        read(file)
    assert str(file) in str(caught.value)


def test_an_id_is_given_once(folder):
    file = write(folder / "bad.jsonl", row(id="a"), row(id="a", question="And?"))
    with pytest.raises(DocumentError, match=r"line 2: the id 'a' is also that of .*line 1"):
        read(file)


def test_missing_files_and_metrics_are_errors(folder):
    with pytest.raises(DocumentError, match="cannot be read: No such file"):
        read(folder / "no.jsonl")
    (folder / "binary.jsonl").write_bytes(b"\xff\xfe{")
    with pytest.raises(DocumentError, match="is not UTF-8 text"):
        read(folder / "binary.jsonl")
    with pytest.raises(ConfigurationError, match="no metric 'bleu'"):
        read(folder / "no.jsonl", metric="bleu")


def test_retrieval_qualities_need_evidence_or_a_second_document(folder):
    file = write(folder / "mine.jsonl", row(evidence=[[0, 16]]), row(question="And?"))
    with pytest.raises(DocumentError, match="line 2: retrieval 'gold' needs the position of the answer"):
        read(file, retrievals=("gold", "natural"))
    with pytest.raises(DocumentError, match="has one document: retrieval 'unrelated' needs two or more"):
        read(file, retrievals=("unrelated",))
    assert read(file, retrievals=("gold",), max_questions=1).num_questions == 1
    with pytest.raises(DocumentError, match=r"line 1: .*'adversarial' needs .* add 'contradiction'"):
        read(file, retrievals=("natural", "adversarial"))
    file = write(folder / "mine.jsonl", row(evidence=[[0, 16]], contradiction="The sea is narrow."))
    ((question,),) = read(file, retrievals=("adversarial",)).questions
    assert question.contradiction == "The sea is narrow."


def test_a_document_that_does_not_fit_is_an_error_before_any_answer(folder):
    file = write(folder / "mine.jsonl", row(), row(document=HILL))
    pipeline = ScriptedPipeline(lambda call: "")
    room = pipeline.count_tokens(HILL)
    pipeline.context_window = room + pipeline.options.sampling.max_new_tokens
    with pytest.raises(
        ContextLengthError, match=rf"line 2: the document has {room:,} tokens; 'scripted' takes"
    ):
        list(read(file).tasks(pipeline))
    pipeline.context_window += 40
    assert len(list(read(file).tasks(pipeline))) == 2

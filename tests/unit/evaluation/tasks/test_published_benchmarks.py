"""∞Bench and LongBench v2 from small files in the published formats."""

import json

import pytest
from helpers.evaluation_pipelines import ScriptedPipeline

from rapid_integrations.errors import ConfigurationError, ContextLengthError, DocumentError
from rapid_integrations.evaluation import InfiniteBench, LongBenchV2, evaluate, group_rows
from rapid_integrations.evaluation.tasks import records as records_module
from rapid_integrations.evaluation.tasks.prompt_budget import truncate_middle

BOOK = "The old miller sold the boat. " * 60
OPTIONS = ["The boat.", "The mill.", "A goat.", "Nothing."]


@pytest.fixture
def infinitebench(tmp_path):
    shared = {"context": BOOK, "options": []}
    files = {
        "longbook_qa_eng": [
            {"id": 0, **shared, "input": "Who sold the boat?", "answer": ["the old miller", "a miller"]},
            {"id": 1, **shared, "input": "What was sold?", "answer": ["the boat"]},
        ],
        "longbook_choice_eng": [
            {"id": 0, **shared, "input": "What was sold?", "answer": ["The boat."], "options": OPTIONS},
            {"id": 1, **shared, "input": "And then?", "answer": ["Nothing.", "D"], "options": OPTIONS},
        ],
        "longbook_sum_eng": [
            {"id": 0, **shared, "input": "", "answer": ["A boat is sold.\nThe miller is old."]}
        ],
    }
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path


def test_infinitebench_reads_each_book_once_a_subset(infinitebench):
    bench = InfiniteBench.read(infinitebench)
    tasks = list(bench.tasks(ScriptedPipeline(lambda call: "")))
    assert [[q.kind for q in task.questions] for task in tasks] == [["en.qa"] * 2, ["en.mc"] * 2, ["en.sum"]]
    assert [task.format.metric for task in tasks] == ["f1", "choice", "rouge-lsum"]
    assert [task.format.max_new_tokens for task in tasks] == [40, 40, 1200]
    assert {task.document for task in tasks} == {BOOK}
    assert {task.context for task in tasks} == {40_960}
    choice = tasks[1].questions
    assert choice[0].question == "What was sold?\nA. The boat.\nB. The mill.\nC. A goat.\nD. Nothing."
    assert [question.answers for question in choice] == [("A", "The boat."), ("D", "Nothing.")]
    assert bench.settings()["questions"] == {"en.qa": 2, "en.mc": 2, "en.sum": 1}
    one = InfiniteBench.read(infinitebench, subsets=("en.mc",), max_questions=1, contexts=(512, 1024))
    assert one.num_questions == 2
    assert [task.context for task in one.tasks(ScriptedPipeline(lambda call: ""))] == [512, 1024]


def test_infinitebench_is_scored_by_subset(infinitebench):
    answers = {
        "Who sold the boat?": "It was the old miller.",
        "What was sold?": "A",
        "And then?": "B",
        "Summary:": "The miller is old.",
    }
    pipeline = ScriptedPipeline(lambda call: answers[call.prompt.query.split("\n")[0]])
    report = evaluate(pipeline, InfiniteBench.read(infinitebench).tasks(pipeline), ["lc"])
    scores = {row["group"]: (row["questions"], row["score"]) for row in group_rows(report.answers)}
    # "it was old miller" has 2 of 4 tokens right, both of them: F1 2/3; "A" is an article, no token.
    assert scores["en.qa"] == (2, pytest.approx((2 / 3 + 0) / 2))
    assert scores["en.mc"] == (2, 0.5)
    # One of two lines, 4 of 8 tokens.
    assert scores["en.sum"] == (1, pytest.approx(2 / 3))
    assert scores["all"][0] == 5
    text = pipeline.calls[-1].prompt.text
    assert text == f"Summarize the book below.\n\n{BOOK}\n\nSummary:"


def question(number, difficulty, length, **fields):
    return {
        "_id": f"id{number}",
        "domain": "Single-Document QA",
        "sub_domain": "Literary",
        "difficulty": difficulty,
        "length": length,
        "question": f"Question {number}?",
        **{f"choice_{letter}": f"choice {letter}" for letter in "ABCD"},
        "answer": "B",
        "context": f" {BOOK}\n",
        **fields,
    }


ROWS = [
    question(0, "easy", "short"),
    question(1, "hard", "short", context=BOOK),
    question(2, "hard", "long", context=BOOK * 4),
]


@pytest.fixture(params=["json", "jsonl"])
def longbench(tmp_path, request):
    file = tmp_path / f"data.{request.param}"
    text = json.dumps(ROWS) if request.param == "json" else "\n".join(map(json.dumps, ROWS))
    file.write_text(text, encoding="utf-8")
    return file


def test_longbench_is_reported_by_difficulty_and_length(longbench):
    pipeline = ScriptedPipeline(
        lambda call: f"The correct answer is ({'B' if 'Question 1' in call.prompt.query else 'C'})."
    )
    bench = LongBenchV2.read(longbench)
    report = evaluate(pipeline, bench.tasks(pipeline), ["lc"])
    scores = {row["group"]: (row["questions"], row["score"]) for row in group_rows(report.answers)}
    assert scores == {
        "all": (3, pytest.approx(1 / 3)),
        "easy": (1, 0),
        "hard": (2, 0.5),
        "short": (2, 0.5),
        "long": (1, 0),
    }
    assert report.result("lc", 40_960).accuracy.successes == 1
    assert [record.question_id for record in report.answers] == ["id0", "id1", "id2"]
    assert pipeline.calls[1].prompt.text == (
        f"Please read the following text and answer the question below.\n\n<text>\n{BOOK.strip()}\n</text>"
        "\n\nWhat is the correct answer to this question: Question 0?\nChoices:\n(A) choice A\n(B) choice B\n"
        "(C) choice C\n(D) choice D\n\n"
        'Format your response as follows: "The correct answer is (insert answer here)".'
    )
    # One text, two questions: one task.
    assert [len(task.questions) for task in bench.tasks(pipeline)] == [2, 1]


def test_longbench_with_chain_of_thought_asks_for_the_choice_afterwards(longbench):
    def think(call):
        return " The miller {question}. " if call.prompt.context else "The correct answer is (B)"

    pipeline = ScriptedPipeline(think)
    bench = LongBenchV2.read(longbench, thinking=True, max_questions=1)
    report = evaluate(pipeline, bench.tasks(pipeline), ["rapid"])
    (record,) = report.answers
    assert record.score == 1
    assert record.answer == " The miller {question}. \n\nThe correct answer is (B)"
    first, second = pipeline.calls[-2:]
    assert first.prompt.text.endswith("(D) choice D\n\nLet’s think step by step:")
    assert first.options.sampling.max_new_tokens == 1024
    assert second.prompt.text.startswith(
        "Please read the following text and answer the questions below.\n\n"
        "The text is too long and omitted here.\n\nWhat is the correct answer to this question: Question 0?\n"
    )
    assert "Let’s think step by step: The miller {question}.\n\nBased on the above" in second.prompt.text
    assert (second.plain, second.options.sampling.max_new_tokens) == (True, 128)


def test_long_texts_lose_their_middle_and_fit(longbench):
    pipeline = ScriptedPipeline(lambda call: "")
    pipeline.context_window = 800
    _, task = LongBenchV2.read(longbench, max_new_tokens=50).tasks(pipeline)
    whole = (BOOK * 4).strip()
    assert len(task.document) < len(whole)
    assert whole.startswith(task.document[:500])
    assert whole.endswith(task.document[-500:])
    report = evaluate(pipeline, [task], ["lc"])
    call = pipeline.calls[-1]
    assert report.results[0].context == 800
    assert 800 - 50 - 20 < len(pipeline.encode(call.prompt)) <= 800 - 50
    with pytest.raises(ContextLengthError, match="reads 800 tokens, not 1,024"):
        next(LongBenchV2.read(longbench, contexts=(1024,)).tasks(pipeline))


@pytest.mark.parametrize("most", [1, 2, 7, 50, 10_000])
def test_middle_truncation_keeps_both_ends(most):
    pipeline = ScriptedPipeline(lambda call: "")
    text = "".join(f"word{i} " for i in range(40))
    cut = truncate_middle(text, most, pipeline)
    assert pipeline.count_tokens(cut) <= most or most == 1
    half = len(cut) // 3
    assert text.startswith(cut[:half])
    assert text.endswith(cut[-half:] if half else "")
    assert (cut == text) == (most >= pipeline.count_tokens(text))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"answer": "E"}, "entry 1: 'E' is not allowed: it is one of A, B, C, D"),
        ({"difficulty": "medium"}, "'medium' is not allowed: it is one of easy, hard"),
        ({"length": 3}, "'length' must be text"),
        ({"choice_C": " "}, "'choice_C' must be text that is not blank"),
        ({"context": None}, "'context' must be text"),
    ],
)
def test_entries_in_another_format_are_named(tmp_path, fields, message):
    file = tmp_path / "data.json"
    file.write_text(json.dumps([{**ROWS[0], **fields}]), encoding="utf-8")
    with pytest.raises(DocumentError, match=message):
        LongBenchV2.read(file)


def test_infinitebench_files_that_cannot_be_used(infinitebench):
    with pytest.raises(
        ConfigurationError, match=r"subsets en\.xy are not allowed: name one or more of en\.qa"
    ):
        InfiniteBench.read(infinitebench, subsets=("en.xy",))
    file = infinitebench / "longbook_choice_eng.jsonl"
    with pytest.raises(
        ConfigurationError, match=r"not a folder: give the folder with longbook_qa_eng\.jsonl"
    ):
        InfiniteBench.read(file)
    row = {"id": 0, "context": BOOK, "input": "What?", "answer": ["A boat."], "options": OPTIONS}
    for changed, message in (
        ({}, "line 1: the answer 'A boat.' is none of the options"),
        ({"options": OPTIONS[:3]}, "'options' must be four texts, not 3"),
    ):
        file.write_text(json.dumps({**row, **changed}), encoding="utf-8")
        with pytest.raises(DocumentError, match=message):
            InfiniteBench.read(infinitebench, subsets=("en.mc",))
    file.unlink()
    with pytest.raises(DocumentError, match=r"longbook_choice_eng\.jsonl' cannot be read: No such file"):
        InfiniteBench.read(infinitebench)


def test_without_data_the_files_come_from_the_hub(monkeypatch, infinitebench, longbench):
    asked = []

    def fetch(dataset, name, *, repo_type):
        asked.append((dataset, name, repo_type))
        return str(longbench if "LongBench" in dataset else infinitebench / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    assert LongBenchV2.read(max_questions=1).num_questions == 1
    assert InfiniteBench.read(subsets=("en.sum",)).num_questions == 1
    assert asked == [
        ("zai-org/LongBench-v2", "data.json", "dataset"),
        ("xinrongzhang2022/InfiniteBench", "longbook_sum_eng.jsonl", "dataset"),
    ]

    def unreachable(*arguments, **options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(ConfigurationError, match=r"cannot be fetched from the hub \(no route\).*with --data"):
        records_module.hub_file("a/b", "c.json")

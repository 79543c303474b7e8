"""The page shows the figures of the report, and text from documents cannot change its structure."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers.evaluation_pipelines import Call, ScriptedPipeline

from rapid_integrations import RapidPipeline
from rapid_integrations.engine.stats import RapidStats, RetrievedChunk
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation import (
    AnswerRecord,
    EvaluationReport,
    Task,
    TaskQuestion,
    demo_tasks,
    evaluate,
)
from rapid_integrations.evaluation.page import check_page, questions, write_page, writing
from rapid_integrations.evaluation.page.questions import Answer, Run
from rapid_integrations.evaluation.page.summary import Summary
from rapid_integrations.evaluation.tables import context_label, method_label

HOSTILE = "<script>alert(1)</script> </details> \"'&amp; {{ 7 * 7 }} {% raw %} 龙 😀 \x00\x1b \ud800 é"
SHOWN = HOSTILE.replace("\x00", "\ufffd").replace("\x1b", "\ufffd").replace("\ud800", "\ufffd")
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """A strict parser of pages: tags must be closed in order, attributes and identifiers must be unique."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.path = path
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._table: list[list[str]] | None = None
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._table = self.tables.setdefault(dict(attrs)["class"] or "", [])
        elif tag == "tr" and self._table is not None:
            self._table.append([])
        elif tag in ("td", "th") and self._table is not None:
            self._table[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "table":
            self._table = None

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open and self.open[-1] == "script" else self.text).append(data)
        if self._table and {"td", "th"} & set(self.open):
            self._table[-1][-1] += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    def check(self) -> None:
        """Check that all links lead to files in the same folder, and that scripts are inline."""
        names = [attrs["id"] for _, attrs in self.tags if "id" in attrs]
        assert len(names) == len(set(names))
        for name in [attrs["href"] for attrs in self.of("a")] + [attrs["src"] for attrs in self.of("img")]:
            assert name is not None
            assert re.fullmatch(r"[\w.-]+", name)
            assert (self.path.parent / name).is_file()
        assert not self.of("link")
        assert all("src" not in attrs for attrs in self.of("script"))
        assert not any(name.startswith("on") for _, attrs in self.tags for name in attrs)
        assert len(self.scripts) <= 1
        assert "://" not in self.path.read_text(encoding="utf-8").split("</style>")[0]


def scripted(
    contexts: tuple[int, ...] = (1024, 4096),
    methods: tuple[str, ...] = ("lc", "rag", "sd", "rapid"),
    document: str = "The sea is wide. The house is old. " * 30,
    names: tuple[str, ...] = ("one", "two", "three", "four"),
    **options: object,
) -> EvaluationReport:
    """Two documents per context. Long context knows half of the answers, RAPID all except the last."""

    def stats(call: Call) -> RapidStats:
        if call.plain:
            return RapidStats(completion_tokens=20, rounds=20, decode_s=0.2, prefill_s=0.5, prompt_tokens=99)
        return RapidStats(
            completion_tokens=20,
            rounds=4,
            drafted_tokens=40,
            accepted_tokens=16,
            decode_s=0.05,
            prefill_s=0.7,
            prompt_tokens=99,
        )

    def script(call: Call) -> str:
        name = call.prompt.query.removeprefix("What is ").removesuffix("?")
        known = names[: len(names) // 2] if call.plain else names[:-1]
        return name if name in known else "No idea. " + HOSTILE.replace("\ud800", "")

    tasks = [
        Task(document, tuple(TaskQuestion(f"What is {name}?", (name,)) for name in names), context, document)
        for context in contexts
        for _ in range(2)
    ]
    return evaluate(ScriptedPipeline(script, stats), tasks, methods, **options)  # type: ignore[arg-type]


def written(report: EvaluationReport, folder: Path) -> Page:
    path = write_page(report, folder)
    assert path == folder / "report.html"
    page = Page(path)
    page.check()
    return page


def test_the_table_has_the_reports_values(tmp_path):
    report = scripted()
    rows = [row for row in written(report, tmp_path).tables["results"][1:] if row]
    assert len(rows) == len(report.results) == 8
    for row, result in zip(rows, report.results, strict=True):
        if result.method == "lc":
            assert row.pop(0) == context_label(result.context)
        accuracy, stats = result.accuracy, result.stats
        rate = result.acceptance_rate
        plain = report.result("lc", result.context).stats.decode_tokens_per_s
        assert row == [
            method_label(result.method),
            str(result.questions),
            f"{accuracy.value * 100:.1f} % [{accuracy.low * 100:.0f}–{accuracy.high * 100:.0f}]",
            "–" if rate is None else f"{rate * 100:.0f} %",
            f"{stats.tokens_per_round:.1f}",
            f"{stats.prefill_s / result.questions:.2f}",
            f"{stats.prefill_s / result.questions:.2f}",
            f"{stats.decode_tokens_per_s:.1f}",
            f"{stats.decode_tokens_per_s / plain:.2f}×",
        ]


def test_every_plot_is_a_png_that_the_page_shows(tmp_path):
    page = written(scripted(), tmp_path)
    shown = {attrs["src"] for attrs in page.of("img")}
    names = {"accuracy-1.png", "acceptance-1.png", "speed-1.png", "split-1.png"}
    assert shown == names == {path.name for path in tmp_path.glob("*.png")}
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)
    assert all(attrs["alt"] for attrs in page.of("img"))


@pytest.mark.parametrize("methods", [("lc",), ("rag",), ("rapid",), ("lc", "rag"), ("sd", "rapid")])
def test_parts_without_measurements_are_left_out(tmp_path, methods):
    page = written(scripted((512,), methods), tmp_path)
    assert "changes" not in page.tables
    assert "split" not in page.tables
    speculates = bool({"sd", "rapid"} & set(methods))
    assert (tmp_path / "acceptance-1.png").exists() == speculates
    assert (tmp_path / "speed-1.png").exists() == (methods == ("lc", "rag"))
    assert not (tmp_path / "split-1.png").exists()


def test_text_from_documents_questions_and_answers_is_escaped(tmp_path):
    names = (HOSTILE, "b" + HOSTILE, "c")
    report = scripted(
        (1024,), document=("The sea is " + HOSTILE.replace("\ud800", "") + ". ") * 30, names=names
    )
    report = dataclasses.replace(
        report, settings={**report.settings, "target": HOSTILE, HOSTILE: {"x": HOSTILE}}
    )
    page = written(report, tmp_path)
    source = page.path.read_text(encoding="utf-8")
    assert "<script>alert" not in source
    assert source.count("<script>") == 1
    text = "".join(page.text)
    assert f"What is {SHOWN}?" in text
    assert f"b{SHOWN}" in text


def test_the_split_counts_questions_by_outcome(tmp_path):
    report = scripted(methods=("lc", "rag", "rapid"))
    # Long context and the retrieved chunks know the same here: of four names a document two, RAPID three.
    groups = {group.name: group for group in Summary(report).split(report.swept[0], [1024, 4096])}
    assert {name: group.questions for name, group in groups.items()} == {
        "both right": 8,
        "only long context right": 0,
        "only retrieved right": 0,
        "both wrong": 8,
    }
    assert groups["both right"].right["rapid"].value == 1
    assert (groups["both wrong"].right["rapid"].successes, groups["both wrong"].right["rapid"].total) == (
        4,
        8,
    )
    assert groups["only retrieved right"].right == {}
    rows = written(report, tmp_path).tables["split"]
    assert rows[-4] == ["all", "both right", "8", "100.0 % [68–100]"]
    assert rows[-1] == ["both wrong", "8", "50.0 % [22–78]"]


def test_groups_of_questions_have_a_table_where_there_are_several(tmp_path):
    report = scripted((1024,), methods=("lc", "rapid"))
    kinds = {0: "legal, single", 1: "legal, describe", 2: "medical, single", 3: "medical, describe"}
    answers = tuple(dataclasses.replace(r, kind=kinds[r.question_number]) for r in report.answers)
    assert written(dataclasses.replace(report, answers=answers), tmp_path).tables["groups"] == [
        ["context", "group", "questions", "long context", "RAPID"],
        ["1k", "all", "8", "50.0 %", "75.0 %"],
        ["legal", "4", "100.0 %", "100.0 %"],
        ["medical", "4", "0.0 %", "50.0 %"],
        ["single", "4", "50.0 %", "100.0 %"],
        ["describe", "4", "50.0 %", "50.0 %"],
    ]
    same = tuple(dataclasses.replace(r, kind=f"legal, {r.question_number}") for r in report.answers)
    assert "groups" not in written(dataclasses.replace(report, answers=same), tmp_path).tables


def test_the_split_separates_all_four_outcomes():
    report = scripted((1024,), methods=("lc", "rag", "rapid"))
    flipped = tuple(
        dataclasses.replace(record, correct=record.question_number in (1, 2))
        if record.method == "rag"
        else record
        for record in report.answers
    )
    groups = Summary(dataclasses.replace(report, answers=flipped)).split(report.swept[0], [1024])
    assert [group.questions for group in groups] == [2, 2, 2, 2]
    assert [group.right["rapid"].value for group in groups] == [1, 1, 1, 0]


def speeds(report: EvaluationReport, tokens_per_s: dict[int, float]) -> EvaluationReport:
    """The report with other decoding speeds of RAPID by context; long context has 100."""
    results = tuple(
        dataclasses.replace(
            result,
            stats=dataclasses.replace(
                result.stats,
                decode_s=result.stats.completion_tokens
                / (tokens_per_s[result.context] if result.method == "rapid" else 100),
            ),
        )
        for result in report.results
    )
    return dataclasses.replace(report, results=results)


@pytest.mark.parametrize(
    ("tokens_per_s", "expected", "line"),
    [
        ((150, 200, 300), 1024, "RAPID decodes faster than long context throughout."),
        ((150, 90, 300), 4096, "RAPID decodes faster than long context from 4k on."),
        ((50, 110, 120), 2048, "RAPID decodes faster than long context from 2k on."),
        ((150, 150, 99), None, "RAPID does not decode faster than long context at 4k."),
    ],
)
def test_the_page_says_from_which_context_on_rapid_is_faster(tmp_path, tokens_per_s, expected, line):
    contexts = (1024, 2048, 4096)
    report = speeds(scripted(contexts, ("lc", "rapid")), dict(zip(contexts, tokens_per_s, strict=True)))
    assert Summary(report).faster_from(report.swept[0], "rapid") == expected
    assert line in "".join(written(report, tmp_path).text)


def test_settings_have_sections_and_a_table_of_changes(tmp_path):
    report = scripted((1024,), retrieval=("natural", "unrelated"), sweep={"transfer_strength": (5.0, 20.0)})
    page = written(report, tmp_path)
    assert len(list(tmp_path.glob("accuracy-*.png"))) == 4
    assert sum(attrs.get("class") == "setting" for attrs in page.of("details")) == 4
    header, *rows = page.tables["changes"]
    assert header[2:5] == ["retrieval", "η", "change, points"]
    # η does not affect plain speculation, so both settings share its answers.
    assert [row[1:4] for row in rows] == [
        ["plain speculation", "natural", "–"],
        ["plain speculation", "unrelated", "–"],
        ["RAPID", "natural", "5"],
        ["RAPID", "natural", "20"],
        ["RAPID", "unrelated", "5"],
        ["RAPID", "unrelated", "20"],
    ]
    for row, change in zip(rows, Summary(report).changes(), strict=True):
        difference = change.difference
        # Three of four right instead of two.
        assert difference.value == 0.25
        assert row[4:] == [
            "+25.0",
            f"{difference.low * 100:+.1f} to {difference.high * 100:+.1f}",
            "40 %",
            "4.00×",
        ]


def test_a_tuned_method_is_shown_with_its_own_eta():
    report = scripted(
        (1024,), ("lc", "rapid", "rapid-fixed", "mixture", "sd"), retrieval=("natural", "unrelated")
    )
    matched = {"rapid-fixed": {"transfer_strength": 1.5}, "mixture": {"mixture_weight": 0.7}}
    options = {"acceptance": "augmented", "transfer_strength": 5.0}
    report = dataclasses.replace(report, settings={**report.settings, "options": options, "matched": matched})
    shown = {
        change.row.result.method: change.options["transfer_strength"] for change in Summary(report).changes()
    }
    assert shown == {"rapid": 5, "rapid-fixed": 1.5, "mixture": None, "sd": None}


def test_one_setting_changes_nothing():
    assert Summary(scripted()).changes() == []


def record_of(pieces: tuple[str, ...], sources: str, answer: str | None = None) -> AnswerRecord:
    template = scripted((512,), ("lc",)).answers[0]
    stats = RapidStats(token_sources=sources, prompt_tokens=9)
    return dataclasses.replace(
        template, pieces=pieces, stats=stats, answer="".join(pieces) if answer is None else answer
    )


def test_an_answers_tokens_have_their_sources():
    answer = Answer.of(record_of(("a", " b", "c", "", "d"), "ddtfft", "a bcd\n\nfollowed up"))
    assert answer.runs == (
        Run("drafted", ("a", " b")),
        Run("own", ("c",)),
        Run("forced", ("", "d")),
    )
    assert answer.ending == "own"
    assert answer.rest == "\n\nfollowed up"
    assert answer.counts == {"drafted": 2, "forced": 2, "own": 2}


def test_tokens_of_unknown_source_are_shown_plainly():
    unknown = Answer.of(record_of((), "dt", "some text"))
    assert (unknown.runs, unknown.rest, unknown.ending) == ((), "some text", "")
    longer = Answer.of(record_of(("a", "b"), "d"))
    assert [run.source for run in longer.runs] == ["drafted", "unknown"]


def test_tokens_of_real_answers_are_coloured_and_join_to_them(tmp_path):
    tasks = demo_tasks(context=512, num_questions=3, seed=4)
    report = evaluate(RapidPipeline.demo(), tasks, ["lc", "sd", "rapid", "generate"])
    for record in report.answers:
        assert "".join(record.pieces) == record.answer
        assert len(record.stats.token_sources) - len(record.pieces) in (0, 1)
        assert AnswerRecord.from_dict(json.loads(json.dumps(record.as_dict()))) == record
    page = written(report, tmp_path)
    spans = [str(attrs.get("class")).split() for attrs in page.of("span")]
    shown = [classes[1] for classes in spans if classes[0] == "token" and "ending" not in classes][3:]
    letters = "".join(
        source
        for question in questions.questions_of(report)
        for answer in question.answers
        for piece, source in zip(answer.record.pieces, answer.record.stats.token_sources, strict=False)
        if piece
    )
    assert [questions.SOURCES[letter] for letter in letters] == shown
    assert {"drafted", "own"} <= set(shown)


def test_many_questions_go_to_pages_of_their_own(tmp_path, monkeypatch):
    report = scripted()
    monkeypatch.setattr(writing, "_MAX_CHARACTERS", 1000)
    monkeypatch.setattr(questions, "_PAGE_CHARACTERS", 1500)
    (tmp_path / "questions-99-1.html").write_text("of an earlier report")
    page = written(report, tmp_path)
    pages = sorted(tmp_path.glob("questions-*.html"))
    assert len(pages) > 2
    assert {path.name for path in pages} == {attrs["href"] for attrs in page.of("a")} - {
        attrs["src"] for attrs in page.of("img")
    }
    assert not any(attrs.get("class") == "question" for attrs in page.of("details"))
    asked = []
    for path in pages:
        part = Page(path)
        part.check()
        asked += [attrs["id"] for attrs in part.of("details") if attrs.get("class") == "question"]
    assert sorted(asked) == sorted({f"q{r.document}-{r.question_number}" for r in report.answers})


def test_questions_can_be_filtered_by_correct_methods(tmp_path):
    page = written(scripted((1024,)), tmp_path)
    marks = [attrs for attrs in page.of("details") if attrs.get("class") == "question"]
    assert [(m["data-right"], m["data-wrong"]) for m in marks] == [
        ("lc rag sd rapid", ""),
        ("lc rag sd rapid", ""),
        ("sd rapid", "lc rag"),
        ("", "lc rag sd rapid"),
    ] * 2
    assert [attrs["data-method"] for attrs in page.of("select")] == ["lc", "rag", "sd", "rapid"]


def test_equal_retrieved_chunks_are_shown_once(tmp_path):
    chunk = RetrievedChunk("Chunk of the sea.", 3, 0.25)
    report = scripted((1024,), ("rag", "rapid"))
    answers = tuple(
        dataclasses.replace(r, stats=dataclasses.replace(r.stats, retrieved_chunks=(chunk,)))
        for r in report.answers
    )
    page = written(dataclasses.replace(report, answers=answers), tmp_path)
    assert "".join(page.text).count("Chunk of the sea.") == 8
    assert "position 3 score 0.25" in "".join(page.text)


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigurationError, match=r"--report needs matplotlib.*rapid-integrations\[eval\]"):
        check_page()
    with pytest.raises(ConfigurationError, match="matplotlib"):
        write_page(scripted((512,), ("lc",)), tmp_path / "none")
    assert not (tmp_path / "none").exists()

"""Every README: its Python runs or compiles, its links lead somewhere, and it stays short."""

from __future__ import annotations

import gc
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import pytest
from llama_index.core import Settings

from rapid_integrations.demo import sample_documents

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "rapid_integrations"
README = ROOT / "README.md"
FOLDERS = ("rapid_integrations", "tests", "notebooks")
PAGES = [README, *sorted((ROOT / ".github").glob("*.md"))] + [
    page for folder in FOLDERS for page in sorted((ROOT / folder).rglob("README.md"))
]
LONG_TEXT = ("create_rapid_chain", "RapidQueryEngine")  # each has one example in the root README


class Example(NamedTuple):
    page: Path
    line: int
    source: str

    @property
    def runs(self) -> bool:
        """Whether the example runs as printed, on the bundled models."""
        return ".demo()" in self.source

    def code(self) -> Any:
        """The compiled example; line numbers in errors are those of the page."""
        return compile("\n" * self.line + self.source, str(self.page), "exec", dont_inherit=True)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def examples_of(page: Path) -> list[Example]:
    text = page.read_text(encoding="utf-8")
    blocks = re.finditer(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [Example(page, text.count("\n", 0, block.start()) + 1, block[1]) for block in blocks]


EXAMPLES = [example for page in PAGES for example in examples_of(page)]
RUNNABLE = [example for example in EXAMPLES if example.runs]


def answers_from_a_long_text(example: Example) -> bool:
    return example.page == README and any(name in example.source for name in LONG_TEXT)


def example_name(example: Example) -> str:
    return f"{name_of(example.page)}:{example.line}"


def run(example: Example) -> None:
    """Run an example as a script, and let go of its models and settings afterwards."""
    try:
        exec(example.code(), {"__name__": "__main__"})
    finally:
        Settings._llm = None
        gc.collect()


@pytest.fixture
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples may write files."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_own_folder")
class TestExamples:
    def test_the_root_has_examples_of_both_frameworks(self) -> None:
        runnable = [example.source for example in RUNNABLE if example.page == README]
        assert len(runnable) >= 3
        assert any("langchain" in source for source in runnable)
        assert any("llama_index" in source for source in runnable)

    @pytest.mark.parametrize(
        "example", [e for e in RUNNABLE if not answers_from_a_long_text(e)], ids=example_name
    )
    def test_it_runs_as_printed(self, example: Example, capsys: pytest.CaptureFixture[str]) -> None:
        run(example)
        printed = capsys.readouterr().out
        assert len(printed.split()) > 3 or "print(" not in example.source

    @pytest.mark.parametrize("name", LONG_TEXT)
    def test_one_of_at_most_15_lines_answers_from_a_long_text(
        self, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (example,) = (e for e in RUNNABLE if answers_from_a_long_text(e) and name in e.source)
        assert len([line for line in example.source.splitlines() if line.strip()]) <= 15
        (question,) = (q for q in sample_documents()[0].questions if q.question in example.source)
        run(example)
        answer, *sources = capsys.readouterr().out.splitlines()
        # Only the subject and the verb: whether the value is right depends on the models, at 4k tokens.
        assert answer.split()[:3] == question.answer.split()[:3]
        assert len(sources) > 1

    def test_the_others_are_python(self) -> None:
        for example in EXAMPLES:
            example.code()

    def test_the_commands_of_the_root_are_the_two_that_everything_relies_on(self) -> None:
        commands = re.findall(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert commands[0] == "pip install . && rapid demo\n"
        assert commands[1] == "pip install '.[test]' && pytest\n"


def prose_of(page: Path) -> str:
    """The text of a page without its code, in which brackets are no links and ``#`` begins no heading."""
    text = re.sub(r"^ *(`{3,}).*?^ *\1", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", lambda code: code[0].translate(str.maketrans("[]()<>", "      ")), text)


def links_of(page: Path) -> list[str]:
    prose = prose_of(page)
    inline = re.findall(r"\]\(\s*<?([^\s)>]+)", prose)
    references = re.findall(r"^\[[^\]]+\]:\s*(\S+)", prose, flags=re.MULTILINE)
    html = re.findall(r"<(?:a|img)\b[^>]*?\b(?:href|src)=\"([^\"]+)\"", prose)
    return [link for link in inline + references + html if not re.match(r"[a-z]+:", link)]


def anchors_of(page: Path) -> set[str]:
    """The names that GitHub gives the headings of a page."""
    anchors: set[str] = set()
    seen: Counter[str] = Counter()
    text = re.sub(r"^ *(`{3,}).*?^ *\1", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", text, flags=re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        anchors.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return anchors


class TestLinks:
    @pytest.mark.parametrize("page", PAGES, ids=name_of)
    def test_each_leads_to_a_file_or_a_heading(self, page: Path) -> None:
        broken = []
        for link in links_of(page):
            path, _, anchor = unquote(link).partition("#")
            target = (page.parent / path).resolve() if path else page
            inside = target.is_relative_to(ROOT) and target.exists()
            if not inside or (anchor and target.suffix == ".md" and anchor not in anchors_of(target)):
                broken.append(link)
        assert not broken, f"{name_of(page)} links to {', '.join(broken)}"

    def test_the_root_links_to_files_of_the_repository(self) -> None:
        links = links_of(README)
        assert "LICENSE" in links
        assert "rapid_integrations/langchain/README.md" in links

    def test_all_kinds_are_seen(self, tmp_path: Path) -> None:
        page = tmp_path / "page.md"
        page.write_text(
            "# A `head[x]` of (two), parts\n## Twice\n## Twice\n[a](b.md#twice-1) ![c](d.png)\n[e]: f.md\n"
            '<img width="3" src="g.png">\n`[no](h)` [web](https://example.org) [mail](mailto:a@b.org)\n'
            "```python\n# no heading\nx[0](y)\n```\n",
            encoding="utf-8",
        )
        assert links_of(page) == ["b.md#twice-1", "d.png", "f.md", "g.png"]
        assert anchors_of(page) == {"a-headx-of-two-parts", "twice", "twice-1"}


def folders_with_python() -> list[Path]:
    return sorted({path.parent for path in PACKAGE.rglob("*.py")})


class TestPages:
    @pytest.mark.parametrize("page", [p for p in PAGES if p.name == "README.md"], ids=name_of)
    def test_it_is_short(self, page: Path) -> None:
        lines = page.read_text(encoding="utf-8").count("\n")
        assert lines <= (200 if page == README else 150)

    @pytest.mark.parametrize("folder", folders_with_python(), ids=name_of)
    def test_a_folder_of_python_files_has_one(self, folder: Path) -> None:
        assert (folder / "README.md").is_file(), f"{name_of(folder)} has no README.md"

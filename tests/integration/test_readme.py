"""The README's Python examples run as printed; those that name real models are checked for syntax."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from llama_index.core import Settings

from rapid_integrations.demo import sample_documents

README = Path(__file__).parents[2] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
RUNNABLE = [example for example in EXAMPLES if ".demo()" in example]
LONG_TEXT = ("create_rapid_chain", "RapidQueryEngine")


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    yield
    Settings._llm = None


def test_the_readme_has_examples_of_both_frameworks() -> None:
    assert len(RUNNABLE) >= 3
    assert any("langchain" in example for example in RUNNABLE)
    assert any("llama_index" in example for example in RUNNABLE)


@pytest.mark.parametrize(
    "example",
    [example for example in RUNNABLE if not any(name in example for name in LONG_TEXT)],
    ids=lambda example: example.splitlines()[0],
)
def test_example_prints_an_answer(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(example, str(README), "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert len(printed.split()) > 3


@pytest.mark.parametrize("name", LONG_TEXT)
def test_a_newcomers_file_answers_from_a_long_text(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = (example for example in RUNNABLE if name in example)
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    (question,) = (q for q in sample_documents()[0].questions if q.question in example)
    exec(compile(example, str(README), "exec"), {"__name__": "__main__"})
    answer, *sources = capsys.readouterr().out.splitlines()
    # The subject and the verb: the value is the models' affair, at 4k tokens.
    assert answer.split()[:3] == question.answer.split()[:3]
    assert len(sources) > 1


def test_other_examples_are_python() -> None:
    for example in EXAMPLES:
        compile(example, str(README), "exec")


def test_the_commands_are_the_two_that_everything_relies_on() -> None:
    commands = re.findall(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert commands[0] == "pip install . && rapid demo\n"
    assert commands[1] == "pip install '.[test]' && pytest\n"

"""The README's Python examples run as printed; those that name real models are checked for syntax."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
RUNNABLE = [example for example in EXAMPLES if ".demo()" in example]


def test_the_readme_has_examples_of_both_frameworks() -> None:
    assert len(RUNNABLE) >= 3
    assert any("langchain" in example for example in RUNNABLE)
    assert any("llama_index" in example for example in RUNNABLE)


@pytest.mark.parametrize("example", RUNNABLE, ids=lambda example: example.splitlines()[0])
def test_example_prints_an_answer(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(example, str(README), "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert len(printed.split()) > 3


def test_other_examples_are_python() -> None:
    for example in EXAMPLES:
        compile(example, str(README), "exec")


def test_the_commands_are_the_two_that_everything_relies_on() -> None:
    commands = re.findall(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert commands[0] == "pip install . && rapid demo\n"
    assert commands[1] == "pip install '.[test]' && pytest\n"

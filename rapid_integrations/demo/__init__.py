"""A small pair of language models, their documents and their questions, to try everything without downloads.

Importing this package loads neither torch nor transformers.
"""

from pathlib import Path

from rapid_integrations.demo.documents import DemoDocument, DemoQuestion, generate_documents, sample_documents
from rapid_integrations.demo.prompts import PROMPT_TEMPLATE, SYSTEM_MESSAGE

TARGET_PATH = Path(__file__).parent / "assets" / "target"
DRAFTER_PATH = Path(__file__).parent / "assets" / "drafter"

__all__ = [
    "DRAFTER_PATH",
    "PROMPT_TEMPLATE",
    "SYSTEM_MESSAGE",
    "TARGET_PATH",
    "DemoDocument",
    "DemoQuestion",
    "generate_documents",
    "sample_documents",
]

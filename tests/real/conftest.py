"""The model, its LLMs, embeddings and texts. Each test file runs in one process, which loads them once."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.real_models import EMBEDDINGS, FETCH, MODEL, OPTIONS, MiniLM, folder_named_by, passages
from helpers.small_tokenizers import HERMES_TOOLS
from transformers import AutoTokenizer

from rapid_integrations import ChatRapid, RapidLLM


def _folder(variable: str) -> Path:
    if not os.environ.get(variable):
        pytest.skip(f"{variable} is not set: {FETCH} makes the folder that it has to name")
    return folder_named_by(variable)


@pytest.fixture(scope="session")
def model_folder() -> Path:
    return _folder(MODEL)


@pytest.fixture(scope="session")
def llm(model_folder: Path) -> Iterator[RapidLLM]:
    llm = RapidLLM.from_pretrained(model_folder, **OPTIONS)
    yield llm
    llm.pipeline.close()


@pytest.fixture(scope="session")
def chat(model_folder: Path, llm: RapidLLM) -> ChatRapid:
    """The same engine as ``llm``'s, with a chat template that takes tools."""
    tokenizer = copy.deepcopy(AutoTokenizer.from_pretrained(model_folder))
    tokenizer.chat_template = HERMES_TOOLS
    return ChatRapid.from_pretrained(model_folder, tokenizer=tokenizer, **OPTIONS)


@pytest.fixture(scope="session")
def embeddings() -> MiniLM:
    return MiniLM(_folder(EMBEDDINGS))


@pytest.fixture(scope="session")
def notes() -> list[str]:
    """Paragraphs of a document of about 1,100 tokens."""
    return passages(18)


@pytest.fixture(scope="session")
def document(notes: list[str]) -> str:
    return "\n\n".join(notes)

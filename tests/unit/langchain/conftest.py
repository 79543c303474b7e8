from typing import Any

import pytest
from helpers.fake_pipeline import FakePipeline
from helpers.langchain_calls import MODEL_CLASSES, PEOPLE_DOCUMENTS, RecordingRetriever

from rapid_integrations import ChatRapid, RapidLLM


@pytest.fixture
def pipeline() -> FakePipeline:
    return FakePipeline()


@pytest.fixture
def llm(pipeline: FakePipeline) -> RapidLLM:
    return RapidLLM(pipeline)


@pytest.fixture
def chat(pipeline: FakePipeline) -> ChatRapid:
    return ChatRapid(pipeline)


@pytest.fixture(params=MODEL_CLASSES)
def model_class(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def retriever() -> RecordingRetriever:
    """Returns the second and the third person, the best match first."""
    return RecordingRetriever(find=lambda: [PEOPLE_DOCUMENTS[2], PEOPLE_DOCUMENTS[1]])

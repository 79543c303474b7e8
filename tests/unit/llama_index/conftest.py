from collections.abc import Iterator

import pytest
from helpers.fake_pipeline import FakePipeline
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index_instrumentation import get_dispatcher

from rapid_integrations import RapidLLM


@pytest.fixture
def pipeline() -> FakePipeline:
    return FakePipeline()


@pytest.fixture
def llm(pipeline: FakePipeline) -> RapidLLM:
    return RapidLLM(pipeline)


@pytest.fixture
def spans() -> Iterator[SimpleSpanHandler]:
    """Records LlamaIndex's spans during a test."""
    root, handler = get_dispatcher(), SimpleSpanHandler()
    root.add_span_handler(handler)
    yield handler
    root.span_handlers.remove(handler)

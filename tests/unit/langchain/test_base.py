"""Behaviour that both models inherit from ``LangChainModel`` and ``RapidBase``."""

import asyncio
from typing import Any

import pytest
from helpers.asynchronous import eventually
from helpers.fake_pipeline import PROMPT, FakePipeline


class TestCancellation:
    def test_closing_a_stream_cancels_the_request(self, model_class: Any, pipeline: FakePipeline) -> None:
        stream = model_class(pipeline).stream(PROMPT)
        next(stream)
        stream.close()
        assert (pipeline.finished, pipeline.cancelled) == (0, 1)

    async def test_closing_an_async_stream_cancels_the_request(
        self, model_class: Any, pipeline: FakePipeline
    ) -> None:
        stream = model_class(pipeline).astream(PROMPT)
        await anext(stream)
        await stream.aclose()
        assert await eventually(lambda: pipeline.cancelled == 1)
        assert pipeline.finished == 0

    @pytest.mark.parametrize("entry", ["ainvoke", "abatch"])
    async def test_cancelling_the_task_cancels_the_requests(
        self, model_class: Any, pipeline: FakePipeline, entry: str
    ) -> None:
        pipeline.hold = True
        prompts = 1 if entry == "ainvoke" else 3
        method = getattr(model_class(pipeline), entry)
        task = asyncio.create_task(method(PROMPT if prompts == 1 else [PROMPT] * prompts))
        assert await eventually(lambda: len(pipeline.requests) == prompts)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (pipeline.finished, pipeline.cancelled) == (0, prompts)

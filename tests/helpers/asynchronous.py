"""Reading streams, and observing the event loop."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

_Result = TypeVar("_Result")


async def collect(stream: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in stream]


async def ticks_during(awaitable: Awaitable[_Result]) -> tuple[_Result, int]:
    """The result of ``awaitable``, and how often another coroutine ran meanwhile."""
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0)
            ticks += 1

    ticking = asyncio.create_task(tick())
    result = await awaitable
    ticking.cancel()
    return result, ticks


async def eventually(condition: Callable[[], bool]) -> bool:
    """Whether ``condition`` becomes true while the event loop finalizes abandoned generators."""
    for _ in range(10_000):
        if condition():
            return True
        await asyncio.sleep(0.001)
    return False

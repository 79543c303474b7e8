"""Shared reading against plain lists, over random prompts, turns and departures."""

from collections import deque
from typing import Any

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings
from token_caches import TOKEN_BYTES, filled, read, shared, texts

from rapid_integrations.engine.kv import PrefixStore, SequenceKV
from rapid_integrations.engine.shared_prefill import Reader, SharedPrefill
from rapid_integrations.engine.speculation import Track

SETTINGS = settings(max_examples=100, deadline=None, derandomize=True, database=None)

# Of each request: its prompts for the two models; after how many of its turns it goes, if before it is read;
# and whether its caches may be used on then.
requests = st.lists(
    st.tuples(texts, texts, st.none() | st.integers(0, 4), st.booleans()), min_size=1, max_size=6
)


def reader(model: Any, prompt: list[int]) -> Reader:
    return Reader(model, Track([*prompt, 9], SequenceKV(len(prompt) + 1)), np.asarray(prompt))


def read_on(reading: Reader, chunk: int) -> int:
    """What a forward pass does with the next chunk; how many tokens it has."""
    new = reading.prompt[reading.position :][:chunk].tolist()
    ((_, keys, values),) = filled(new, len(new)).layers()
    reading.track.cache.write(0, keys, values)
    reading.track.cache.length += len(new)
    return len(new)


@SETTINGS
@given(requests, st.integers(1, 40), st.integers(0, 300), st.booleans())
def test_everybody_s_prompts_are_read_and_little_twice(
    wanted: Any, chunk: int, budget: int, self_drafting: bool
) -> None:
    store = PrefixStore(budget * TOKEN_BYTES)
    sharing = SharedPrefill(store)
    models: Any = ("target", "target" if self_drafting else "drafter")
    waiting: deque[tuple[list[Reader], int | None, bool]] = deque()
    for *prompts, turns, keep in wanted:
        readers = [reader(model, prompt) for model, prompt in zip(models, prompts, strict=True)]
        sharing.join(readers)
        waiting.append((readers, turns, keep))
    answering = []
    num_read = 0
    while waiting:
        for _ in range(len(waiting)):
            if not sharing.must_wait(waiting[0][0]):
                break
            waiting.rotate(-1)
        else:
            raise AssertionError("everybody waits for somebody")
        readers, turns, keep = waiting.popleft()
        for reading in readers:
            before = reading.position
            assert sharing.catch_up(reading) == reading.position - before
            if reading.num_unread:
                num_read += read_on(reading, chunk)
                break
        for reading in readers:
            assert read(reading.track.cache) == reading.prompt[: reading.position].tolist()
        if turns == 0:
            sharing.leave(readers, keep=keep)
        elif any(reading.num_unread for reading in readers):
            waiting.append((readers, None if turns is None else turns - 1, keep))
        else:
            answering.append(readers)
    for readers in answering:
        sharing.leave(readers, keep=True)
    assert not sharing._left
    assert store.num_bytes <= budget * TOKEN_BYTES
    if len(answering) == len(wanted):
        prompts = {model: [] for model in models}
        for *both, _, _ in wanted:
            for model, prompt in zip(models, both, strict=True):
                prompts[model].append(prompt)
        least = sum(map(distinct_prefixes, prompts.values()))
        # What is too little to be copied is read again.
        assert least <= num_read <= least + SharedPrefill.MIN_TOKENS * 2 * len(wanted)


def distinct_prefixes(prompts: list[list[int]]) -> int:
    """The fewest tokens that have to be read."""
    return sum(
        len(prompt) - max((shared(prompt, other) for other in prompts[:index]), default=0)
        for index, prompt in enumerate(prompts)
    )

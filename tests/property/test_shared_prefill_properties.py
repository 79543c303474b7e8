"""Shared prefill and loading against plain lists, over random prompts, files, turns and cancellations."""

import random
from collections import deque
from concurrent.futures import Future
from typing import Any

import hypothesis.strategies as st
import numpy as np
from helpers.token_caches import TOKEN_BYTES, filled, read, shared, texts
from hypothesis import given, settings

from rapid_integrations.engine.cache.model_state import ModelState
from rapid_integrations.engine.cache.prefix_cache import PrefixCache
from rapid_integrations.engine.cache.sequence_kv import SequenceKV
from rapid_integrations.engine.cache.shared_prefill import Load, Reader, SharedPrefill

SETTINGS = settings(max_examples=100, deadline=None, derandomize=True, database=None)

# For each request: its prompts for the two models; the number of turns after which it is removed, None if it
# completes; and whether its caches may be used after that.
requests = st.lists(
    st.tuples(texts, texts, st.none() | st.integers(0, 4), st.booleans()), min_size=1, max_size=6
)


def reader(model: Any, prompt: list[int]) -> Reader:
    return Reader(model, ModelState([*prompt, 9], SequenceKV(len(prompt) + 1)), np.asarray(prompt))


def read_on(reading: Reader, chunk: int) -> int:
    """Compute the next chunk, as a forward pass does; returns its number of tokens."""
    new = reading.prompt[reading.position :][:chunk].tolist()
    ((_, keys, values),) = filled(new, len(new)).layers()
    reading.state.cache.write(0, keys, values)
    reading.state.cache.length += len(new)
    return len(new)


@SETTINGS
@given(requests, st.integers(1, 40), st.integers(0, 300), st.booleans())
def test_all_prompts_are_computed_and_few_tokens_twice(
    wanted: Any, chunk: int, budget: int, self_drafting: bool
) -> None:
    store = PrefixCache(budget * TOKEN_BYTES)
    sharing = SharedPrefill(store)
    models: Any = ("target", "target" if self_drafting else "drafter")
    waiting: deque[tuple[list[Reader], int | None, bool]] = deque()
    for *prompts, turns, keep in wanted:
        readers = [reader(model, prompt) for model, prompt in zip(models, prompts, strict=True)]
        sharing.add(readers)
        waiting.append((readers, turns, keep))
    answering = []
    num_read = 0
    while waiting:
        for _ in range(len(waiting)):
            if not sharing.must_wait(waiting[0][0]):
                break
            waiting.rotate(-1)
        else:
            raise AssertionError("all requests wait for others")
        readers, turns, keep = waiting.popleft()
        for reading in readers:
            before = reading.position
            assert sharing.catch_up(reading) == reading.position - before
            if reading.num_unread:
                num_read += read_on(reading, chunk)
                break
        for reading in readers:
            assert read(reading.state.cache) == reading.prompt[: reading.position].tolist()
        if turns == 0:
            sharing.remove(readers, keep=keep)
        elif any(reading.num_unread for reading in readers):
            waiting.append((readers, None if turns is None else turns - 1, keep))
        else:
            answering.append(readers)
    for readers in answering:
        sharing.remove(readers, keep=True)
    assert not sharing._retained
    assert store.num_bytes <= budget * TOKEN_BYTES
    if len(answering) == len(wanted):
        prompts = {model: [] for model in models}
        for *both, _, _ in wanted:
            for model, prompt in zip(models, both, strict=True):
                prompts[model].append(prompt)
        least = sum(map(distinct_prefixes, prompts.values()))
        # Prefixes that are too short to be copied are computed again.
        assert least <= num_read <= least + SharedPrefill.MIN_TOKENS * 2 * len(wanted)


class Disk:
    """Files that are loaded when :meth:`work` is called, in the order of the requests."""

    def __init__(self, files: list[list[int]], rng: random.Random, reliable: bool) -> None:
        self.files = files
        self.rng = rng
        self.reliable = reliable
        self.loaded: list[tuple[Any, list[int]]] = []
        self._waiting: deque[tuple[Future[SequenceKV | None], Any, list[int]]] = deque()

    def order(self, reading: Reader, known: int) -> None:
        """Order loading a stored prefix of a prompt if it is long enough, as the engine does."""
        prompt = reading.prompt.tolist()
        length = max((shared(file, prompt) for file in self.files), default=0)
        if length >= known + SharedPrefill.MIN_TOKENS:
            reading.load = Load(length, Future())
            self._waiting.append((reading.load.cache, reading.model, prompt[:length]))

    def work(self) -> bool:
        """Load the prefix that was ordered first; false if there was none."""
        while self._waiting:
            future, model, tokens = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                outcome = "loaded" if self.reliable else self.rng.choice(["loaded", "nothing", "fails"])
                if outcome == "fails":
                    future.set_exception(OSError("no disk"))
                else:
                    self.loaded.append((model, tokens))
                    future.set_result(filled(tokens, len(tokens) + 1) if outcome == "loaded" else None)
                return True
        return False


@SETTINGS
@given(requests, st.lists(texts, max_size=3), st.integers(1, 40), st.booleans(), st.booleans(), st.integers())
def test_stored_prefixes_are_loaded_once_and_shared(
    wanted: Any, files: Any, chunk: int, self_drafting: bool, reliable: bool, seed: int
) -> None:
    store = PrefixCache(0)
    sharing = SharedPrefill(store)
    rng = random.Random(seed)
    disk = Disk(files, rng, reliable)
    models: Any = ("target", "target" if self_drafting else "drafter")
    upcoming = deque(wanted)
    running: deque[list[Reader]] = deque()
    # The number of turns after which each is removed, and whether its caches may be used after that.
    ends: dict[int, tuple[int | None, bool]] = {}
    answering = []
    num_removed = 0

    def remove(readers: list[Reader], keep: bool) -> None:
        nonlocal num_removed
        running.remove(readers)
        sharing.remove(readers, keep=keep)
        num_removed += 1

    def take_loaded() -> None:
        sharing.take_retained_loads()
        for readers in list(running):
            try:
                for reading in readers:
                    if reading.load_done:
                        reading.take_loaded()
            except OSError:
                remove(readers, keep=False)

    while upcoming or running:
        if upcoming and (not running or rng.random() < 0.5):
            *prompts, turns, keep = upcoming.popleft()
            readers = [reader(model, prompt) for model, prompt in zip(models, prompts, strict=True)]
            sharing.add(readers)
            for reading in readers:
                disk.order(reading, sharing.expected_tokens(reading))
            running.append(readers)
            ends[id(readers)] = turns, keep
        if rng.random() < 0.3:
            disk.work()
            take_loaded()
        for _ in range(len(running)):
            if not sharing.must_wait(running[0]):
                break
            running.rotate(-1)
        else:
            assert not running or disk.work(), "all requests wait, and nothing is being loaded"
            take_loaded()
        for readers in list(running):
            turns, keep = ends[id(readers)]
            if turns == 0:
                remove(readers, keep)
            ends[id(readers)] = None if turns is None else turns - 1, keep
        if not running or sharing.must_wait(running[0]):
            continue
        readers = running.popleft()
        for reading in readers:
            sharing.catch_up(reading)
            assert read(reading.state.cache) == reading.prompt[: reading.position].tolist()
            if reading.num_unread:
                read_on(reading, chunk)
                break
        (running if any(reading.num_unread for reading in readers) else answering).append(readers)
    for readers in answering:
        sharing.remove(readers, keep=True)
    while disk.work():
        sharing.take_retained_loads()
    sharing.take_retained_loads()
    assert not sharing._retained
    if reliable and not num_removed:
        # No prefix is loaded twice, not even in part.
        for index, (model, tokens) in enumerate(disk.loaded):
            for other, before in disk.loaded[:index]:
                assert model != other or shared(tokens, before) + SharedPrefill.MIN_TOKENS <= len(tokens)


def distinct_prefixes(prompts: list[list[int]]) -> int:
    """The minimum number of tokens to compute."""
    return sum(
        len(prompt) - max((shared(prompt, other) for other in prompts[:index]), default=0)
        for index, prompt in enumerate(prompts)
    )

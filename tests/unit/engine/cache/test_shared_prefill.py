"""Prompts with a common prefix that are submitted together: the prefix is computed once."""

import itertools
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers.table_models import TableModel, random_table
from helpers.tiny_models import collect, run

from rapid_integrations.config import EngineLimits, SamplingParams, SpeculationParams
from rapid_integrations.engine.cache.sequence_kv import SequenceKV
from rapid_integrations.engine.cache.shared_prefill import SharedPrefill
from rapid_integrations.engine.engine import Engine
from rapid_integrations.engine.model.batch_entry import Step
from rapid_integrations.engine.requests import Event, Finished, Prefilled, Request, RequestHandle
from rapid_integrations.errors import DeadlineExceededError, GenerationError

VOCAB = 40
PATIENCE_S = 60.0
DOCUMENT = [index % 17 for index in range(100)]
# Tails that differ in their first token.
TAILS = [[20 + index, *range(index, index + 5)] for index in range(4)]
CHUNK = 16


class Reading:
    """A model that records its prefill passes. Passes can be blocked or made to fail.

    ``read`` has the position and the tokens of every chunk of a prompt, ``together`` the number of chunks of
    each pass. The first pass waits for ``start``. A pass over the token ``poison`` fails.
    """

    def __init__(self, seed: int) -> None:
        self.model = TableModel(random_table(VOCAB, seed), before_pass=self._before)
        self.read: list[tuple[int, list[int]]] = []
        self.together: list[int] = []
        self.poison: int | None = None
        self.begun, self.start = threading.Event(), threading.Event()
        self.before_chunk: Callable[[int], None] = lambda number: None
        # The last tokens of prompts need logits, as in rounds; chunks up to this position belong to prompts.
        self.prompt_tokens = 0

    def _before(self, steps: Sequence[Step]) -> None:
        self.begun.set()
        assert self.start.wait(PATIENCE_S)
        if any(self.poison in step.tokens for step in steps):
            raise RuntimeError("poisoned")
        before = len(self.read)
        for step in steps:
            if not step.num_logits or step.cache.length + len(step.tokens) < self.prompt_tokens:
                self.before_chunk(len(self.read))
                self.read.append((step.cache.length, list(step.tokens)))
        self.together += [len(self.read) - before] * (len(self.read) > before)

    @property
    def num_read(self) -> int:
        return sum(len(tokens) for _, tokens in self.read)


@pytest.fixture
def target() -> Reading:
    return Reading(1)


@pytest.fixture
def drafter() -> Reading:
    return Reading(2)


@pytest.fixture
def make_engine():
    engines: list[Engine] = []

    def make(target: Reading, drafter: Reading | None = None, **limits: int) -> Engine:
        # No prefix cache: caches are shared between running requests only.
        limits = {"prefix_cache_bytes": 0, "prefill_chunk_tokens": CHUNK, **limits}
        models: Any = (target.model, None if drafter is None else drafter.model)
        engines.append(Engine(*models, limits=EngineLimits(**limits)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def request(
    prompt: Sequence[int], excerpt: Sequence[int] | None = None, *, seed: int = 0, **more: Any
) -> Request:
    sampling = SamplingParams(max_new_tokens=more.pop("max_new_tokens", 12), temperature=1.0, seed=seed)
    return Request(prompt, excerpt, sampling, SpeculationParams("lossless", num_draft_tokens=3), **more)


def submit(engine: Engine, wanted: Request) -> tuple[RequestHandle, queue.SimpleQueue[Event]]:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    return engine.submit(wanted, events.put), events


def alone(wanted: Request, *, with_drafter: bool = False) -> list[int]:
    """The answer of an engine with no other request."""
    models: Any = [Reading(1)] + [Reading(2)] * with_drafter
    for reading in models:
        reading.start.set()
    engine = Engine(models[0].model, models[1].model if with_drafter else None)
    tokens, _ = run(engine, wanted)
    engine.close()
    return tokens


def answers_of(
    submitted: Sequence[tuple[RequestHandle, queue.SimpleQueue[Event]]],
) -> list[tuple[list[int], Any]]:
    return [(tokens, finished.stats) for tokens, finished in (collect(events) for _, events in submitted)]


def test_a_common_prefix_is_computed_once(make_engine, target) -> None:
    wanted = [request(DOCUMENT + tail, seed=seed) for seed, tail in enumerate(TAILS)]
    engine = make_engine(target)
    submitted = [submit(engine, one) for one in wanted]
    target.start.set()
    answers = answers_of(submitted)
    assert [tokens for tokens, _ in answers] == [alone(one) for one in wanted]
    assert [stats.reused_prefix_tokens for _, stats in answers] == [0, 100, 100, 100]
    # The first round reads the last token of every tail.
    assert target.num_read == len(DOCUMENT) + sum(len(tail) - 1 for tail in TAILS)


def test_prompts_that_fit_into_a_chunk_share_a_pass(make_engine, target) -> None:
    wanted = [request(DOCUMENT + tail, seed=seed) for seed, tail in enumerate(TAILS)]
    wanted.append(request([30, 31, 32, 33, 34, 35], seed=9))
    engine = make_engine(target, prefill_chunk_tokens=22)
    submitted = [submit(engine, one) for one in wanted]
    target.start.set()
    answers = answers_of(submitted)
    assert [tokens for tokens, _ in answers] == [alone(one) for one in wanted]
    # 22 of the document at a time; the other document's five go beside its last 17, or when it is their turn;
    # then the three tails that waited, of five tokens each.
    assert target.together[-1] == 3
    ends = list(itertools.accumulate(target.together))
    passes = [target.read[end - count : end] for end, count in zip(ends, target.together, strict=True)]
    assert all(sum(len(tokens) for _, tokens in each) <= 22 for each in passes)
    assert all(stats.prefill_s > 0 for _, stats in answers)


@pytest.mark.parametrize("chunk", [16, 64])
def test_equal_prompts_that_fit_into_a_chunk_are_computed_once(make_engine, target, chunk) -> None:
    wanted = [request(DOCUMENT[:40], seed=seed) for seed in range(3)]
    engine = make_engine(target, prefill_chunk_tokens=chunk)
    submitted = [submit(engine, one) for one in wanted]
    target.start.set()
    answers = answers_of(submitted)
    assert [tokens for tokens, _ in answers] == [alone(one) for one in wanted]
    assert [stats.reused_prefix_tokens for _, stats in answers] == [0, 39, 39]
    assert target.num_read == 39


def submitted_at_once(
    engine: Engine, target: Reading, wanted: Sequence[Request]
) -> list[tuple[RequestHandle, queue.SimpleQueue[Event]]]:
    """Requests that arrive while the worker is busy, so that it admits them together."""
    submit(engine, request([36, 37, 38], max_new_tokens=1))
    assert target.begun.wait(PATIENCE_S)
    submitted = [submit(engine, one) for one in wanted]
    target.start.set()
    return submitted


def test_a_failing_prompt_does_not_fail_others_in_its_pass(make_engine, target) -> None:
    wanted = [request([index, *range(10, 14), index]) for index in range(3)]
    wanted[1] = request([1, *range(10, 13), 39, 1])
    target.poison = 39
    engine = make_engine(target)
    poisoned: list[int] = []
    forward = target.model.forward

    def recorded(steps):
        if any(target.poison in step.tokens for step in steps):
            poisoned.append(len(steps))
        return forward(steps)

    target.model.forward = recorded
    submitted = submitted_at_once(engine, target, wanted)
    with pytest.raises(GenerationError, match="poisoned"):
        collect(submitted[1][1])
    assert [collect(submitted[index][1])[0] for index in (0, 2)] == [alone(wanted[i]) for i in (0, 2)]
    assert poisoned == [3, 1], "all in one pass, and then by itself"


def test_a_pass_is_smaller_after_memory_ran_out(make_engine, target) -> None:
    wanted = [request([index, *range(10, 14), index]) for index in range(3)]
    engine = make_engine(target)
    sizes: list[int] = []
    forward = target.model.forward

    def short_of_memory(steps):
        sizes.append(sum(len(step.tokens) for step in steps))
        if sizes[-1] > 8:
            raise torch.OutOfMemoryError("no memory")
        return forward(steps)

    target.model.forward = short_of_memory
    submitted = submitted_at_once(engine, target, wanted)
    assert [tokens for tokens, _ in answers_of(submitted)] == [alone(one) for one in wanted]
    failed = sizes.index(15)
    assert sizes[failed + 1] == 8


def test_prompts_of_the_drafter_are_shared_too(make_engine, target, drafter) -> None:
    wanted = [request(DOCUMENT + tail, DOCUMENT[:60] + tail, seed=seed) for seed, tail in enumerate(TAILS)]
    engine = make_engine(target, drafter)
    drafter.prompt_tokens = 60 + len(TAILS[0])
    submitted = [submit(engine, one) for one in wanted]
    target.start.set()
    drafter.start.set()
    answers = answers_of(submitted)
    assert [tokens for tokens, _ in answers] == [alone(one, with_drafter=True) for one in wanted]
    assert [stats.reused_drafter_prefix_tokens for _, stats in answers] == [0, 60, 60, 60]
    assert [stats.reused_prefix_tokens for _, stats in answers] == [0, 100, 100, 100]
    assert drafter.num_read == 60 + sum(len(tail) - 1 for tail in TAILS)


def test_equal_prompts_are_computed_once(make_engine, target) -> None:
    engine = make_engine(target)
    submitted = [submit(engine, request(DOCUMENT)) for _ in range(3)]
    target.start.set()
    answers = answers_of(submitted)
    assert [stats.reused_prefix_tokens for _, stats in answers] == [0, 99, 99]
    assert [tokens for tokens, _ in answers] == [alone(request(DOCUMENT))] * 3
    assert target.num_read == 99


def test_a_self_drafting_target_computes_its_prompt_once(make_engine, target) -> None:
    engine = make_engine(target, target)
    submitted = submit(engine, request(DOCUMENT, DOCUMENT))
    target.start.set()
    ((tokens, stats),) = answers_of([submitted])
    assert (stats.reused_prefix_tokens, stats.reused_drafter_prefix_tokens) == (0, 99)
    assert target.num_read == 99
    assert len(tokens) == 12


def test_two_documents_are_computed_in_turn(make_engine, target) -> None:
    other = [token + 1 for token in DOCUMENT]
    wanted = [request(text + tail) for text in (DOCUMENT, other) for tail in TAILS[:2]]
    engine = make_engine(target)
    submitted = [submit(engine, one) for one in wanted]
    target.start.set()
    answers = answers_of(submitted)
    assert [stats.reused_prefix_tokens for _, stats in answers] == [0, 100, 0, 100]
    assert [tokens for tokens, _ in answers] == [alone(one) for one in wanted]
    order = "".join("ab"[tokens[0] != DOCUMENT[place]] for place, tokens in target.read if place < 80)
    assert (order.count("a"), order.count("b")) == (5, 5)
    assert "aaa" not in order
    assert "bbb" not in order


def test_prompts_share_no_more_than_their_common_prefix(make_engine, target) -> None:
    texts = [DOCUMENT[:40], DOCUMENT[:70], DOCUMENT[: SharedPrefill.MIN_TOKENS - 1]]
    wanted = [request(text + tail) for text, tail in zip([DOCUMENT, *texts], TAILS, strict=True)]
    engine = make_engine(target)
    submitted = [submit(engine, one) for one in wanted]
    target.start.set()
    answers = answers_of(submitted)
    assert [stats.reused_prefix_tokens for _, stats in answers] == [0, 40, 70, 0]
    assert [tokens for tokens, _ in answers] == [alone(one) for one in wanted]


def test_a_request_forks_the_prompt_of_one_that_is_decoding(make_engine, target) -> None:
    engine = make_engine(target)
    target.start.set()
    first, events = submit(engine, request(DOCUMENT + TAILS[0], max_new_tokens=3000))
    while isinstance(events.get(timeout=PATIENCE_S), Prefilled):
        pass
    tokens, stats = run(engine, request(DOCUMENT + TAILS[1]))
    assert stats.reused_prefix_tokens == 100
    assert tokens == alone(request(DOCUMENT + TAILS[1]))
    first.cancel()


@pytest.mark.parametrize("end", ["cancelled", "late"])
def test_waiting_requests_continue_the_prefill_of_one_that_ended(make_engine, target, end) -> None:
    wanted = [request(DOCUMENT + tail) for tail in TAILS]
    first = request(DOCUMENT + TAILS[0], timeout_s=600 if end == "late" else None)
    engine = make_engine(target)

    def end_first(number: int) -> None:
        if number == 3:
            if end == "cancelled":
                submitted[0][0].cancel()
            else:
                submitted[0][0].submitted -= 600

    target.before_chunk = end_first
    submitted = [submit(engine, one) for one in (first, *wanted[1:])]
    target.start.set()
    if end == "late":
        with pytest.raises(DeadlineExceededError):
            collect(submitted[0][1])
    answers = answers_of(submitted[1:])
    assert [tokens for tokens, _ in answers] == [alone(one) for one in wanted[1:]]
    # Four chunks were computed when the first request ended; the next one continues from there.
    assert sorted(stats.reused_prefix_tokens for _, stats in answers) == [4 * CHUNK, 100, 100]
    assert target.num_read == len(DOCUMENT) + sum(len(tail) - 1 for tail in TAILS[1:])


def test_a_failing_reader_does_not_fail_those_that_wait_for_it(make_engine, target) -> None:
    wanted = [request(DOCUMENT + tail) for tail in TAILS]
    engine = make_engine(target)
    failures = [RuntimeError("device-side assert")]

    def fail(number: int) -> None:
        if number == 3 and failures:
            raise failures.pop()

    target.before_chunk = fail
    submitted = [submit(engine, one) for one in wanted]
    target.start.set()
    with pytest.raises(GenerationError, match="device-side assert"):
        collect(submitted[0][1])
    answers = answers_of(submitted[1:])
    assert [tokens for tokens, _ in answers] == [alone(one) for one in wanted[1:]]
    # Its cache may have caused the failure: the next one starts again, and the others wait for that one.
    assert [stats.reused_prefix_tokens for _, stats in answers] == [0, 100, 100]


def test_the_cache_of_a_request_that_ends_early_is_retained(make_engine, target) -> None:
    # It ends before the others are prefilled.
    first = request(DOCUMENT + TAILS[0], max_new_tokens=1)
    wanted = [request(DOCUMENT + tail) for tail in TAILS[1:]]
    engine = make_engine(target)
    submitted = [submit(engine, one) for one in (first, *wanted)]
    target.start.set()
    answers = answers_of(submitted)
    assert [stats.reused_prefix_tokens for _, stats in answers] == [0, 100, 100, 100]
    assert [tokens for tokens, _ in answers] == [alone(one) for one in (first, *wanted)]


def test_a_waiting_request_emits_progress_when_it_advances(make_engine, target) -> None:
    engine = make_engine(target)
    submitted = [submit(engine, request(DOCUMENT + tail)) for tail in TAILS[:2]]
    target.start.set()
    events = []
    while not isinstance(event := submitted[1][1].get(timeout=PATIENCE_S), Finished):
        events.append(event)
    progress = [(event.done_tokens, event.total_tokens) for event in events if isinstance(event, Prefilled)]
    assert progress == [(105, 105)]


def test_a_copy_is_repeated_after_memory_ran_out(make_engine, target, monkeypatch) -> None:
    engine = make_engine(target)
    copy_prefix, failures = SequenceKV.copy_prefix, [torch.OutOfMemoryError("CUDA out of memory")]

    def short_of_memory(*args: Any) -> Any:
        if failures:
            raise failures.pop()
        return copy_prefix(*args)

    monkeypatch.setattr(SequenceKV, "copy_prefix", short_of_memory)
    wanted = [request(DOCUMENT + tail) for tail in TAILS]
    submitted = [submit(engine, one) for one in wanted]
    target.start.set()
    assert [tokens for tokens, _ in answers_of(submitted)] == [alone(one) for one in wanted]
    assert not failures


def test_caches_that_no_request_needs_go_to_the_prefix_cache(make_engine, target) -> None:
    engine = make_engine(target, prefix_cache_bytes=2**20)
    submitted = [submit(engine, request(DOCUMENT + tail)) for tail in TAILS]
    target.start.set()
    answers_of(submitted)
    _, stats = run(engine, request([*DOCUMENT, 39, 38]))
    assert stats.reused_prefix_tokens == 100
    assert len(engine.prefix_cache) > 0

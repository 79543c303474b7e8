"""Requests while a prefix is loaded from disk: they wait, share the file, or end."""

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.stored_prompts import request, text
from helpers.tiny_models import collect, run, tiny_model

from rapid_integrations.config import EngineLimits, SamplingParams
from rapid_integrations.engine.cache import disk_cache
from rapid_integrations.engine.engine import Engine
from rapid_integrations.engine.model.causal_model import CausalModel
from rapid_integrations.engine.requests import NewTokens, Prefilled, Request, RequestHandle
from rapid_integrations.errors import DeadlineExceededError, EngineClosedError, GenerationError

PATIENCE_S = 60.0


class SlowDisk:
    """Reading blocks until ``go_on`` is set, and then fails if there is an error.

    ``read`` has the names of the files in the order of reading. The first ``first_slow`` files do not block.
    """

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.read: list[str] = []
        self.first_slow = 0
        self.errors: list[BaseException] = []
        self._read = disk_cache.read_prefix

    def __call__(self, path: Path, *args: Any, **kwargs: Any) -> Any:
        self.read.append(path.name)
        self.begun.set()
        assert len(self.read) <= self.first_slow or self.go_on.wait(PATIENCE_S)
        if self.errors:
            raise self.errors.pop()
        return self._read(path, *args, **kwargs)


@pytest.fixture(scope="module")
def models() -> tuple[CausalModel, CausalModel]:
    return CausalModel(tiny_model("qwen3")), CausalModel(tiny_model("qwen3", seed=1, hidden_size=32))


@pytest.fixture(scope="module")
def fresh(models) -> list[int]:
    """The answer to the second question without a folder."""
    engine = Engine(*models)
    tokens, _ = run(engine, request(2))
    engine.close()
    return tokens


@pytest.fixture
def disk(monkeypatch) -> Iterator[SlowDisk]:
    disk = SlowDisk()
    monkeypatch.setattr(disk_cache, "read_prefix", disk)
    yield disk
    disk.go_on.set()


@pytest.fixture
def make_engine(models, tmp_path) -> Iterator[Callable[..., Engine]]:
    """Engines whose folder contains the prefixes of the first question."""
    first = Engine(*models, limits=EngineLimits(prefix_cache_dir=tmp_path))
    run(first, request(1))
    first.close()
    engines: list[Engine] = []

    def make(**limits: Any) -> Engine:
        engines.append(Engine(*models, limits=EngineLimits(prefix_cache_dir=tmp_path, **limits)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def submit(engine: Engine, wanted: Request) -> tuple[RequestHandle, queue.SimpleQueue[Any]]:
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    return engine.submit(wanted, events.put), events


def short(max_new_tokens: int = 20, timeout_s: float | None = None) -> Request:
    sampling = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True)
    return Request(text(7, 30), text(8, 20), sampling, timeout_s=timeout_s)


def test_other_requests_continue_while_a_prefix_is_loaded(make_engine, disk, fresh) -> None:
    engine = make_engine()
    _, running = submit(engine, short(max_new_tokens=1500))
    assert not isinstance(running.get(timeout=PATIENCE_S), NewTokens)
    _, loading = submit(engine, request(2))
    assert disk.begun.wait(PATIENCE_S)
    before = running.qsize()
    assert len(run(engine, short())[0]) == 20, "a later request completes during the load"
    assert running.qsize() > before
    assert loading.empty()
    assert engine.num_running == 2
    disk.go_on.set()
    tokens, finished = collect(loading)
    assert tokens == fresh
    assert finished.stats.reused_prefix_tokens == 1400
    assert finished.stats.reused_drafter_prefix_tokens == 1100


def test_closing_while_a_prefix_is_loaded_fails_all_requests_and_ends_all_threads(make_engine, disk) -> None:
    engine = make_engine(max_active_requests=2)
    waiting = [submit(engine, request(number))[1] for number in (2, 3, 4)]
    assert disk.begun.wait(PATIENCE_S)
    closer = threading.Thread(target=engine.close)
    closer.start()
    for events in waiting:
        with pytest.raises(EngineClosedError, match="closed while"):
            collect(events)
    assert closer.is_alive(), "closing waits for the file that is being read"
    disk.go_on.set()
    closer.join(PATIENCE_S)
    assert not closer.is_alive()
    assert engine.num_running == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rapid-")]


def test_a_queued_request_reaches_its_time_limit_while_a_prefix_is_loaded(make_engine, disk) -> None:
    engine = make_engine(max_active_requests=1)
    _, loading = submit(engine, request(2))
    assert disk.begun.wait(PATIENCE_S)
    _, queued = submit(engine, short(timeout_s=0.05))
    with pytest.raises(DeadlineExceededError):
        collect(queued, timeout_s=PATIENCE_S / 2)
    assert loading.empty()
    disk.go_on.set()
    assert len(collect(loading)[0]) == 16


def test_a_request_at_its_time_limit_makes_room_before_its_file_is_loaded(make_engine, disk) -> None:
    engine = make_engine(max_active_requests=1)
    _, loading = submit(engine, dataclasses.replace(request(2), timeout_s=0.3))
    _, queued = submit(engine, short())
    with pytest.raises(DeadlineExceededError):
        collect(loading, timeout_s=PATIENCE_S / 2)
    assert len(collect(queued)[0]) == 20
    assert not disk.go_on.is_set()


def test_a_request_that_is_cancelled_while_it_loads_emits_no_event(make_engine, disk, fresh) -> None:
    engine = make_engine()
    handle, events = submit(engine, request(3))
    assert disk.begun.wait(PATIENCE_S)
    handle.cancel()
    disk.go_on.set()
    assert run(engine, request(2))[0] == fresh
    assert events.empty()
    assert engine.num_running == 0


def test_the_worker_sleeps_while_all_requests_wait_for_a_file(make_engine, disk, monkeypatch) -> None:
    engine = make_engine(max_active_requests=1)
    turns = 0
    admit = engine._scheduler._admit

    def counted() -> bool:
        nonlocal turns
        turns += 1
        return admit()

    monkeypatch.setattr(engine._scheduler, "_admit", counted)
    waiting = [submit(engine, request(number))[1] for number in (2, 3)]
    assert disk.begun.wait(PATIENCE_S)
    threading.Event().wait(0.2)
    assert turns <= 4, "one for each request, and one that sleeps"
    disk.go_on.set()
    for events in waiting:
        collect(events)


def test_an_error_of_the_loader_fails_its_own_request_only(make_engine, disk, fresh) -> None:
    engine = make_engine()
    disk.errors.append(RuntimeError("a bug"))
    _, broken = submit(engine, request(2))
    assert disk.begun.wait(PATIENCE_S)
    _, other = submit(engine, short())
    disk.go_on.set()
    with pytest.raises(GenerationError, match="RuntimeError: a bug"):
        collect(broken)
    assert len(collect(other)[0]) == 20
    assert run(engine, request(2))[0] == fresh


def test_a_prefix_that_does_not_fit_into_memory_is_computed(make_engine, disk, fresh) -> None:
    engine = make_engine()
    disk.errors.append(torch.OutOfMemoryError("CUDA out of memory"))
    disk.go_on.set()
    tokens, stats = run(engine, request(2))
    assert (tokens, stats.reused_prefix_tokens) == (fresh, 0)


# Several requests for one file ----------------------------------------------------------------------------

# Their first tokens differ.
QUESTIONS = (2, 3, 5, 6)


class PromptsRead:
    """The number of prompt tokens that each of two models computes for requests."""

    def __init__(self, models: tuple[CausalModel, CausalModel], monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts = [0, 0]
        for index, model in enumerate(models):
            monkeypatch.setattr(model, "forward", self._counted(index, model.forward))

    def _counted(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def counted(steps: Any) -> Any:
            # Creating an engine has each model read a token, in another thread.
            if threading.current_thread().name == "rapid-engine":
                self.counts[index] += sum(len(step.tokens) for step in steps if not step.num_logits)
            return forward(steps)

        return counted


@pytest.fixture
def prompts_read(make_engine, models, monkeypatch) -> PromptsRead:
    """Counts that begin after the folder has been filled."""
    return PromptsRead(models, monkeypatch)


@pytest.fixture(scope="module")
def alone(models) -> dict[int, list[int]]:
    """Each question's answer without a folder, asked on its own."""
    engine = Engine(*models, limits=EngineLimits(prefix_cache_bytes=0))
    answers = {number: run(engine, request(number))[0] for number in QUESTIONS}
    engine.close()
    return answers


def reused(finished: Any) -> tuple[int, int]:
    return finished.stats.reused_prefix_tokens, finished.stats.reused_drafter_prefix_tokens


@pytest.mark.parametrize("budget", [0, 2**30])
@pytest.mark.parametrize("when", ["at once", "while it is loaded", "while the first one answers"])
def test_requests_for_one_file_load_it_once_and_share_it(
    make_engine, disk, alone, prompts_read, budget, when
) -> None:
    engine = make_engine(prefix_cache_bytes=budget)
    first, *others = QUESTIONS
    patient = dataclasses.replace(
        request(first), sampling=SamplingParams(max_new_tokens=500, ignore_eos=True)
    )
    handle, events = submit(engine, patient if when == "while the first one answers" else request(first))
    if when == "while it is loaded":
        assert disk.begun.wait(PATIENCE_S)
    if when == "while the first one answers":
        disk.go_on.set()
        while not isinstance(events.get(timeout=PATIENCE_S), NewTokens):
            pass
    waiting = {number: submit(engine, request(number))[1] for number in others}
    disk.go_on.set()
    found = {number: collect(each) for number, each in waiting.items()}
    if when == "while the first one answers":
        handle.cancel()
    else:
        found[first] = collect(events)
    assert {number: tokens for number, (tokens, _) in found.items()} == {n: alone[n] for n in found}
    assert {reused(finished) for _, finished in found.values()} == {(1400, 1100)}
    assert len(disk.read) == len(set(disk.read)) == 2, "the target's and the drafter's"
    assert prompts_read.counts == [11 * len(QUESTIONS)] * 2
    engine.close()


@pytest.mark.parametrize("length", [1412, 1301], ids=["further than the file", "within it"])
def test_a_request_waits_for_a_file_that_a_slower_request_ordered(
    make_engine, disk, models, prompts_read, length
) -> None:
    ahead = dataclasses.replace(request(3), target_tokens=request(3).target_tokens[:length])
    plain = Engine(*models)
    expected = run(plain, ahead)[0]
    plain.close()
    prompts_read.counts[:] = [0, 0]
    disk.first_slow = 1
    engine = make_engine(prefix_cache_bytes=0)
    _, slower = submit(engine, request(2))
    _, events = submit(engine, ahead)
    # The rest of its target prompt is computed while the drafter's file is loaded.
    assert isinstance(events.get(timeout=PATIENCE_S), Prefilled)
    assert len(run(engine, short())[0]) == 20
    disk.go_on.set()
    tokens, finished = collect(events)
    assert tokens == expected
    assert reused(finished) == (min(length - 1, 1400), 1100)
    collect(slower)
    assert len(disk.read) == 2
    assert prompts_read.counts[1] == 19 + 11 * 2


def test_a_shared_load_is_stored_and_counted_once(make_engine, disk, models) -> None:
    engine = make_engine(prefix_cache_bytes=2**30)
    caches: list[Any] = []
    remove = engine._scheduler._prefill.shared.remove

    def recorded(readers: Any, **options: Any) -> None:
        caches.append(readers[0].state.cache)
        remove(readers, **options)

    engine._scheduler._prefill.shared.remove = recorded  # type: ignore[method-assign]
    events = [submit(engine, request(number))[1] for number in QUESTIONS]
    disk.go_on.set()
    for each in events:
        collect(each)
    wanted = request(2)
    load_prefix = engine.prefix_cache._disk.load  # type: ignore[union-attr]
    alone = [
        load_prefix(model, torch.tensor(prompt).numpy(), known_tokens=0, capacity=len(prompt) + 16).num_bytes
        for model, prompt in zip(models, (wanted.target_tokens, wanted.drafter_tokens), strict=True)
    ]
    bases = {id(cache.base) for cache in caches if cache.base is not None}
    assert len(bases) == 1
    assert bases < {id(cache) for cache in caches}
    assert engine.prefix_cache.num_bytes < 1.5 * sum(alone)


def test_damaged_files_are_tried_once_and_the_document_is_computed_once(
    make_engine, disk, alone, prompts_read, tmp_path, caplog
) -> None:
    engine = make_engine(prefix_cache_bytes=0)
    files = list(tmp_path.iterdir())
    for path in files:
        path.write_bytes(path.read_bytes()[:-1000] + bytes(1000))
    events = [submit(engine, request(number))[1] for number in QUESTIONS]
    disk.go_on.set()
    found = [collect(each) for each in events]
    assert [tokens for tokens, _ in found] == list(alone.values())
    assert sorted(disk.read) == sorted(path.name for path in files)
    assert caplog.text.count("its checksum is wrong") == 2
    targets, drafters = zip(*(reused(finished) for _, finished in found), strict=True)
    assert (sorted(targets), sorted(drafters)) == ([0] + [1400] * 3, [0] + [1100] * 3)
    assert prompts_read.counts == [1400 + 11 * len(QUESTIONS), 1100 + 11 * len(QUESTIONS)]


def test_after_an_error_of_the_loader_one_other_request_computes_the_prefix(
    make_engine, disk, alone, prompts_read
) -> None:
    engine = make_engine(prefix_cache_bytes=0)
    disk.errors.append(RuntimeError("a bug"))
    broken, *events = [submit(engine, request(number))[1] for number in QUESTIONS]
    # All requests wait when this one is complete.
    run(engine, short(max_new_tokens=1))
    prompts_read.counts[:] = [0, 0]
    disk.go_on.set()
    with pytest.raises(GenerationError, match="RuntimeError: a bug"):
        collect(broken)
    found = [collect(each) for each in events]
    assert [tokens for tokens, _ in found] == [alone[number] for number in QUESTIONS[1:]]
    assert prompts_read.counts[0] == 1400 + 11 * 3, "once"


@pytest.mark.parametrize("who", ["the request that ordered it", "a request that waits for it"])
@pytest.mark.parametrize("end", ["cancelled", "late"])
def test_ending_one_of_several_requests_during_a_load_does_not_affect_the_others(
    make_engine, disk, alone, prompts_read, who, end
) -> None:
    engine = make_engine(prefix_cache_bytes=0)
    gone = 0 if who == "the request that ordered it" else 1
    submitted = [submit(engine, request(number)) for number in QUESTIONS]
    assert disk.begun.wait(PATIENCE_S)
    handle, events = submitted.pop(gone)
    if end == "cancelled":
        handle.cancel()
    else:
        handle.request = dataclasses.replace(handle.request, timeout_s=1e-3)
    # The worker removes the ended request while the file is still being loaded.
    assert len(run(engine, short())[0]) == 20
    if end == "late":
        with pytest.raises(DeadlineExceededError):
            collect(events)
    disk.go_on.set()
    found = [collect(each) for _, each in submitted]
    assert [tokens for tokens, _ in found] == [alone[n] for n in QUESTIONS if n != QUESTIONS[gone]]
    assert {reused(finished) for _, finished in found} == {(1400, 1100)}
    assert len(disk.read) == 2
    assert prompts_read.counts == [11 * 3 + 29, 11 * 3 + 19]
    assert engine.num_running == 0
    assert not engine._scheduler._prefill.shared._retained


def test_a_load_whose_requests_have_all_ended_serves_the_next_request(make_engine, disk, alone) -> None:
    engine = make_engine()
    handles = [submit(engine, request(number))[0] for number in QUESTIONS[:2]]
    assert disk.begun.wait(PATIENCE_S)
    for handle in handles:
        handle.cancel()
    assert len(run(engine, short())[0]) == 20
    assert engine.num_running == 0
    disk.go_on.set()
    tokens, stats = run(engine, request(5))
    assert (tokens, stats.reused_prefix_tokens) == (alone[5], 1400)
    # The target's file was being read; the drafter's load had not begun and was cancelled.
    assert len(disk.read) == 2


def test_a_self_drafting_target_loads_its_prompt_once(make_engine, disk, models) -> None:
    tokens = request(2).target_tokens
    self_drafting = dataclasses.replace(request(2), drafter_tokens=tokens)
    plain = Engine(models[0], models[0])
    expected = run(plain, self_drafting)[0]
    plain.close()
    make_engine().close()
    folder = Path(make_engine().limits.prefix_cache_dir or "")
    engine = Engine(models[0], models[0], limits=EngineLimits(prefix_cache_dir=folder))
    disk.go_on.set()
    found, stats = run(engine, self_drafting)
    engine.close()
    assert found == expected
    assert stats.reused_prefix_tokens == 1400
    assert stats.reused_drafter_prefix_tokens == len(tokens) - 1
    assert len(disk.read) == 1


def test_waiting_for_the_file_of_another_request_counts_as_queue_time(make_engine, disk) -> None:
    engine = make_engine()
    events = [submit(engine, request(number))[1] for number in QUESTIONS[:2]]
    assert disk.begun.wait(PATIENCE_S)
    threading.Event().wait(0.1)
    disk.go_on.set()
    assert all(collect(each)[1].stats.queue_s >= 0.1 for each in events)

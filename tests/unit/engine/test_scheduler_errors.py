"""Errors of models and listeners, and memory that runs out: only their own request fails."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers.table_models import TableModel, random_table
from helpers.table_requests import VOCAB, Gate, counting_table, long_prompt, request, submit
from helpers.tiny_models import collect, run

from rapid_integrations.engine.model.batch_entry import Step
from rapid_integrations.errors import (
    EngineClosedError,
    EngineMemoryError,
    GenerationError,
)

POISON = 9


def _raise_for_poison(steps: Sequence[Step]) -> None:
    if any(POISON in step.tokens for step in steps):
        raise RuntimeError("device-side assert")


@pytest.mark.parametrize("who", ["target", "drafter"])
@pytest.mark.parametrize("prompt", [(4, POISON, 1), (1, POISON)], ids=["prefill", "decode"])
def test_an_error_fails_its_own_request_only(make_engine, who, prompt) -> None:
    models = {
        name: TableModel(random_table(VOCAB - 3, seed)) for seed, name in enumerate(("target", "drafter"))
    }
    models = {
        name: TableModel(torch.nn.functional.pad(m.table, (0, 3, 0, 3, 0, 3), value=-30.0))
        for name, m in models.items()
    }
    engine = make_engine(models["target"], models["drafter"])
    good = [
        request((2, index), (index,), temperature=1.0, seed=index, max_new_tokens=30) for index in range(4)
    ]
    alone = [run(engine, wanted)[0] for wanted in good]
    models[who].before_pass = _raise_for_poison
    bad = request(prompt if who == "target" else (3, 1), prompt if who == "drafter" else (1,))
    all_events = [submit(engine, wanted) for wanted in (*good[:2], bad, *good[2:])]
    with pytest.raises(GenerationError, match="RuntimeError: device-side assert") as failure:
        collect(all_events.pop(2))
    assert isinstance(failure.value.__cause__, RuntimeError)
    assert [collect(events)[0] for events in all_events] == alone
    assert engine.num_running == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("acceptance", ["lossless", "augmented", "mixture", "paper"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_fail_the_request(make_engine, temperature, acceptance, broken) -> None:
    table = random_table(VOCAB, 3)
    table[:, 5] = broken
    engine = make_engine(TableModel(table), TableModel(random_table(VOCAB, 4)))
    kwargs = {"temperature": temperature, "acceptance": acceptance, "max_new_tokens": 200, "seed": 1}
    good = request((3, 1), (1,), **{**kwargs, "max_new_tokens": 1})
    bad_events, good_events = submit(engine, request((2, 5), (5,), **kwargs)), submit(engine, good)
    with pytest.raises(GenerationError, match=r"logits .* are not finite"):
        collect(bad_events)
    assert len(collect(good_events)[0]) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("max_new_tokens", [1, 8], ids=["bonus", "draft"])
def test_a_drafter_that_is_not_finite_never_decides_the_answer(
    make_engine, temperature, max_new_tokens
) -> None:
    engine = make_engine(
        TableModel(random_table(VOCAB, 3)), TableModel(torch.full((VOCAB,) * 3, float("nan")))
    )
    kwargs: dict[str, Any] = {"temperature": temperature, "max_new_tokens": max_new_tokens, "seed": 1}
    with pytest.raises(GenerationError, match=r"drafter's logits .* are not finite"):
        run(engine, request((3, 1), (1,), acceptance="augmented", **kwargs))
    tokens, stats = run(engine, request((3, 1), (1,), acceptance="lossless", **kwargs))
    assert len(tokens) == max_new_tokens
    if temperature:
        assert stats.accepted_tokens == 0


def test_a_stop_matcher_that_raises_fails_its_request(make_engine) -> None:
    engine = make_engine(TableModel(counting_table()))

    def broken(token: int) -> bool:
        raise ValueError("bad token")

    with pytest.raises(GenerationError, match="ValueError: bad token"):
        run(engine, request(stop_matcher=broken))
    assert len(run(engine, request())[0]) == 8


class OutOfMemory:
    """Raises as CUDA does, for the first ``times`` passes that have ``wanted`` steps."""

    def __init__(self, times: int, wanted: Callable[[Sequence[Step]], bool] = lambda steps: True) -> None:
        self.left = times
        self.wanted = wanted
        self.chunks: list[int] = []

    def __call__(self, steps: Sequence[Step]) -> None:
        self.chunks.append(len(steps[0].tokens))
        if self.left and self.wanted(steps):
            self.left -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")


def test_memory_that_runs_out_once_frees_the_prefix_cache_and_is_tried_again(make_engine) -> None:
    target = TableModel(counting_table())
    engine = make_engine(target, prefill_chunk_tokens=16)
    expected, _ = run(engine, request(long_prompt()))
    assert len(engine.prefix_cache) > 0
    memory = target.before_pass = OutOfMemory(1)
    tokens, stats = run(engine, request([5, *long_prompt()]))
    assert tokens == expected
    assert stats.reused_prefix_tokens == 0
    assert memory.chunks[:2] == [16, 8], "the chunk is halved"


def test_memory_that_runs_out_in_a_round_once_is_tried_again(make_engine) -> None:
    target = TableModel(counting_table())
    engine = make_engine(target)
    expected, _ = run(engine, request())
    memory = target.before_pass = OutOfMemory(1, lambda steps: steps[0].num_logits > 1)
    assert run(engine, request())[0] == expected
    assert memory.left == 0


def test_memory_that_runs_out_twice_fails_the_request_and_keeps_nothing_of_it(make_engine) -> None:
    target = TableModel(counting_table())
    engine = make_engine(target, prefill_chunk_tokens=16)
    target.before_pass = OutOfMemory(2, lambda steps: steps[0].cache.length >= 16)
    with pytest.raises(EngineMemoryError, match="out of memory, also after") as failure:
        run(engine, request(long_prompt()))
    assert isinstance(failure.value, MemoryError)
    assert len(engine.prefix_cache) == 0
    assert len(run(engine, request(long_prompt()))[0]) == 8


def test_memory_that_runs_out_while_a_prefix_is_taken_over_is_tried_again(make_engine, monkeypatch) -> None:
    engine = make_engine(TableModel(counting_table()))
    expected, _ = run(engine, request(long_prompt()))
    take = engine.prefix_cache.take
    failures = [torch.OutOfMemoryError("CUDA out of memory")]

    def short_of_memory(*args: Any, **kwargs: Any) -> Any:
        if failures:
            raise failures.pop()
        return take(*args, **kwargs)

    monkeypatch.setattr(engine.prefix_cache, "take", short_of_memory)
    assert run(engine, request(long_prompt()))[0] == expected
    assert not failures


def test_a_failed_request_leaves_no_prefix_behind(make_engine) -> None:
    target = TableModel(counting_table())
    engine = make_engine(target, prefill_chunk_tokens=20)
    target.before_pass = lambda steps: _raise_for_poison(steps)
    # The first chunk is read, the second raises. The first one may be the cause.
    with pytest.raises(GenerationError):
        run(engine, request([*[2] * 25, POISON, 1]))
    assert len(engine.prefix_cache) == 0


def test_a_broken_worker_fails_every_request(make_engine, monkeypatch) -> None:
    gate = Gate()
    engine = make_engine(TableModel(counting_table(), before_pass=gate))

    def broken(*args: Any) -> None:
        raise AttributeError("a bug")

    monkeypatch.setattr(engine.prefix_cache, "put", broken)
    first, second = submit(engine, request()), submit(engine, request(max_new_tokens=3000))
    gate.open.set()
    for events in (first, second):
        with pytest.raises(EngineClosedError, match="AttributeError: a bug"):
            collect(events, timeout_s=20)
    with pytest.raises(EngineClosedError):
        engine.submit(request(), lambda event: None)

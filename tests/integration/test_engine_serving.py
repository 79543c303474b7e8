"""The engine serving small real models: prefixes, batches, threads, seeds, and other users of the models."""

import queue
import random
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from helpers.tiny_models import VOCAB, collect, run, run_all, tiny_model

from rapid_integrations.config import EngineLimits, SamplingParams, SpeculationParams
from rapid_integrations.engine.engine import Engine
from rapid_integrations.engine.model.causal_model import CausalModel
from rapid_integrations.engine.requests import Event, NewTokens, Request

PATIENCE_S = 120.0
LIMITS = EngineLimits(prefill_chunk_tokens=64)


def text(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB) for _ in range(length)]


def request(
    target: Sequence[int],
    drafter: Sequence[int] | None = None,
    *,
    max_new_tokens: int = 16,
    num_draft_tokens: int | None = 4,
    acceptance: Any = "lossless",
    **sampling: Any,
) -> Request:
    return Request(
        target,
        drafter or target[-20:],
        SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True, **sampling),
        SpeculationParams(acceptance, num_draft_tokens=num_draft_tokens),
    )


@pytest.fixture(scope="module")
def models() -> tuple[CausalModel, CausalModel]:
    # A sliding window much shorter than the texts.
    return CausalModel(tiny_model("mistral")), CausalModel(tiny_model("mistral", seed=1, num_hidden_layers=1))


@pytest.fixture
def engine(models) -> Iterator[Engine]:
    made = Engine(*models, limits=LIMITS)
    yield made
    made.close()


def fresh(models: tuple[CausalModel, CausalModel], wanted: Request) -> list[int]:
    """The answer of an engine that has seen nothing else."""
    engine = Engine(*models, limits=LIMITS)
    tokens, _ = run(engine, wanted)
    engine.close()
    return tokens


# Prefixes ------------------------------------------------------------------------------------------------


def test_a_second_question_reuses_the_document_and_answers_the_same(models, engine) -> None:
    document, questions = text(1, 200), [text(seed, 9) for seed in (2, 3, 4)]
    excerpt = text(5, 50)
    for number, question in enumerate(questions):
        wanted = request(document + question, excerpt + question)
        tokens, stats = run(engine, wanted)
        assert tokens == fresh(models, wanted)
        # The earlier answer is cached too, after the document; only the common prefix counts.
        assert (200 if number else 0) <= stats.reused_prefix_tokens < 209
        assert (50 if number else 0) <= stats.reused_drafter_prefix_tokens < 59
        assert stats.prompt_tokens == 209
    assert engine.prefix_cache.num_bytes > 0


def test_asking_the_same_again_reads_nothing_but_the_last_token(models, engine) -> None:
    wanted = request(text(1, 150))
    tokens, _ = run(engine, wanted)
    again, stats = run(engine, wanted)
    assert again == tokens
    assert stats.reused_prefix_tokens == 149


def test_a_conversation_goes_on_from_its_own_answer(models, engine) -> None:
    first = text(1, 120)
    answer, _ = run(engine, request(first))
    wanted = request([*first, *answer, *text(2, 8)])
    tokens, stats = run(engine, wanted)
    assert stats.reused_prefix_tokens >= 120 + len(answer) - 1
    assert tokens == fresh(models, wanted)


def test_a_shared_preamble_is_copied_and_both_texts_stay(models, engine) -> None:
    preamble = text(1, 60)
    long, other = preamble + text(2, 140), preamble + text(3, 30)
    run(engine, request(long, text(9, 5)))
    tokens, stats = run(engine, request(other, text(8, 5)))
    assert stats.reused_prefix_tokens == 60
    assert tokens == fresh(models, request(other, text(8, 5)))
    _, stats = run(engine, request(long, text(9, 5)))
    assert stats.reused_prefix_tokens == 199


def test_a_cancelled_request_s_work_serves_the_next(models, engine) -> None:
    document = text(1, 300)
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    handle = engine.submit(request(document, max_new_tokens=1000), events.put)
    while not isinstance(events.get(timeout=PATIENCE_S), NewTokens):
        pass
    handle.cancel()
    tokens, stats = run(engine, request(document + text(2, 5)))
    assert stats.reused_prefix_tokens >= 300
    assert tokens == fresh(models, request(document + text(2, 5)))


def test_without_a_budget_nothing_is_kept(models) -> None:
    engine = Engine(*models, limits=EngineLimits(prefix_cache_bytes=0))
    for _ in range(2):
        _, stats = run(engine, request(text(1, 100)))
        assert stats.reused_prefix_tokens == 0
    assert engine.prefix_cache.num_bytes == 0
    engine.close()


# Company -------------------------------------------------------------------------------------------------


def mixed_requests() -> list[Request]:
    wanted = []
    for index in range(16):
        prompt = text(index % 5, 20 + 17 * (index % 7))
        sampled = {"temperature": 0.9, "seed": index} if index % 2 else {}
        acceptance = "augmented" if index % 3 else "lossless"
        wanted.append(
            request(prompt, num_draft_tokens=(None, 1, 3, 6)[index % 4], acceptance=acceptance, **sampled)
        )
    return wanted


def test_sixteen_threads_at_once_get_the_answers_they_get_alone(models, engine) -> None:
    wanted = mixed_requests()
    alone = [fresh(models, one) for one in wanted]
    barrier = threading.Barrier(len(wanted))
    found: dict[int, list[int]] = {}

    def ask(index: int) -> None:
        barrier.wait(PATIENCE_S)
        found[index] = run(engine, wanted[index])[0]

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(wanted))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert [found[index] for index in range(len(wanted))] == alone
    assert engine.num_running == 0


def test_requests_that_join_midway_change_nothing_for_those_who_run(models, engine) -> None:
    first = request(text(1, 80), max_new_tokens=60, num_draft_tokens=3)
    joining = [request(text(seed, 30), temperature=1.0, seed=seed) for seed in (2, 3)]
    alone = [fresh(models, one) for one in (first, *joining)]
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    joined: list[queue.SimpleQueue[Event]] = []

    def listen(event: Event) -> None:
        # In the worker, between two rounds of the first request.
        events.put(event)
        if isinstance(event, NewTokens) and len(joined) < len(joining):
            joined.append(queue.SimpleQueue())
            engine.submit(joining[len(joined) - 1], joined[-1].put)

    engine.submit(first, listen)
    assert collect(events)[0] == alone[0]
    assert [collect(one)[0] for one in joined] == alone[1:]


# Sampling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("acceptance", ["lossless", "augmented", "mixture"])
def test_a_seed_gives_the_same_tokens_whatever_is_drafted(engine, acceptance) -> None:
    prompt = text(1, 40)
    wanted = [
        request(
            prompt, acceptance=acceptance, num_draft_tokens=length, temperature=0.8, top_p=0.95, seed=seed
        )
        for seed in (1, 2, 3)
        for length in (None, 1, 2, 3, 4, 5)
    ]
    answers = [tokens for tokens, _ in run_all(engine, wanted)]
    by_seed = [answers[start : start + 6] for start in (0, 6, 12)]
    for same in by_seed:
        assert same == [same[0]] * 6
    assert len({tuple(same[0]) for same in by_seed}) == 3


def test_a_self_drafter_on_the_same_context_is_nearly_always_accepted(models) -> None:
    engine = Engine(models[0], models[0], limits=LIMITS)
    prompts = [text(seed, 30 + seed) for seed in range(8)]
    wanted = [
        request(prompt, prompt, num_draft_tokens=8, max_new_tokens=200, temperature=1.0, seed=seed)
        for seed, prompt in enumerate(prompts)
    ]
    finished = [finish.stats for _, finish in run_all(engine, wanted)]
    engine.close()
    drafted = sum(stats.drafted_tokens for stats in finished)
    assert drafted > 1000
    assert sum(stats.accepted_tokens for stats in finished) >= 0.999 * drafted


# The model's owner ---------------------------------------------------------------------------------------


def test_the_owner_may_use_the_model_while_the_engine_runs_on_it(models, engine) -> None:
    model = models[0].model
    prompt = torch.tensor([text(7, 30)])
    settings: dict[str, Any] = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": 10,
        "do_sample": False,
        "pad_token_id": 0,
    }
    expected = model.generate(prompt, **settings)
    wanted = request(text(1, 60), max_new_tokens=150, num_draft_tokens=2)
    alone = fresh(models, wanted)
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    engine.submit(wanted, events.put)
    while not isinstance(events.get(timeout=PATIENCE_S), NewTokens):
        pass
    assert torch.equal(model.generate(prompt, **settings), expected)
    tokens, finished = collect(events)
    assert finished.stats.completion_tokens == 150
    assert tokens == alone[len(alone) - len(tokens) :]

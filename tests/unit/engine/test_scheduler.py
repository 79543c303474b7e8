"""The scheduler on table models: ends, limits, fairness. Serving real models is tested apart."""

import queue
import threading

import pytest
import torch
from helpers.table_models import TableModel, random_table
from helpers.table_requests import (
    EOS,
    PATIENCE_S,
    VOCAB,
    Gate,
    counting_table,
    long_prompt,
    request,
    submit,
    wait_for,
)
from helpers.tiny_models import collect, run, run_all

from rapid_integrations.engine.engine import Engine
from rapid_integrations.engine.model.batch_entry import Step
from rapid_integrations.engine.requests import Event, Failed, Finished, NewTokens
from rapid_integrations.errors import (
    ContextLengthError,
    DeadlineExceededError,
    EngineClosedError,
    GenerationError,
    PromptError,
    QueueFullError,
    VocabularyMismatchError,
)

# Ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_draft_tokens", [None, *range(13)])
@pytest.mark.parametrize("acceptance", ["lossless", "augmented", "mixture", "paper"])
def test_max_new_tokens_is_met_exactly_and_nothing_is_drafted_beyond(
    make_engine, num_draft_tokens, acceptance
) -> None:
    target = TableModel(random_table(VOCAB, 1))
    engine = make_engine(target, TableModel(random_table(VOCAB, 2)))
    for limit in (1, 2, 7):
        longest = 2 + limit
        target.before_pass = lambda steps, longest=longest: [_within(step, longest) for step in steps]  # type: ignore[assignment]
        ((tokens, finished),) = run_all(
            engine,
            [request(max_new_tokens=limit, num_draft_tokens=num_draft_tokens, acceptance=acceptance)],
        )
        assert len(tokens) == finished.stats.completion_tokens == limit
        assert finished.reason == "length"


def _within(step: Step, longest: int) -> None:
    # The last token of an answer is never read.
    assert step.cache.length + len(step.tokens) < longest, "drafted beyond max_new_tokens"


@pytest.mark.parametrize("num_draft_tokens", [None, 0, 1, 2, 3, 4, 8])
@pytest.mark.parametrize("agreeing", [True, False])
def test_an_end_of_sequence_token_ends_the_answer_right_there(
    make_engine, num_draft_tokens, agreeing
) -> None:
    # 1 → 2 → … → 11 → 0: the drafter agrees up to the end, where its draft holds it, or never does.
    target = TableModel(counting_table(), eos=[EOS])
    engine = make_engine(target, TableModel(counting_table(1 if agreeing else 5)))
    ((tokens, finished),) = run_all(
        engine, [request(ignore_eos=False, max_new_tokens=40, num_draft_tokens=num_draft_tokens)]
    )
    assert tokens == list(range(2, VOCAB))
    assert finished.reason == "stop"
    assert finished.stats.completion_tokens == len(tokens) + 1, "the end-of-sequence token counts"
    assert len(finished.stats.token_sources) == finished.stats.completion_tokens
    if agreeing and num_draft_tokens:
        assert finished.stats.acceptance_rate == 1


def test_ignore_eos_goes_on_after_the_end(make_engine) -> None:
    engine = make_engine(TableModel(counting_table(), eos=[EOS]))
    tokens, _ = run(engine, request(ignore_eos=True, max_new_tokens=14))
    assert tokens == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0, 1, 2, 3]


@pytest.mark.parametrize("num_draft_tokens", [0, 1, 2, 3, 5, 8])
def test_a_stop_matcher_sees_every_token_once_and_cuts_inside_a_round(make_engine, num_draft_tokens) -> None:
    engine = make_engine(TableModel(counting_table()))
    seen: list[int] = []

    def six_seven(token: int) -> bool:  # spans two tokens, and so rounds
        seen.append(token)
        return seen[-2:] == [6, 7]

    ((tokens, finished),) = run_all(
        engine, [request(max_new_tokens=30, num_draft_tokens=num_draft_tokens, stop_matcher=six_seven)]
    )
    assert tokens == seen == [2, 3, 4, 5, 6, 7]
    assert finished.reason == "stop"
    assert finished.stats.completion_tokens == 6
    # 2 … 7 with a drafter that agrees: every (num_draft_tokens + 1)th token is the target's own.
    assert finished.stats.token_sources == (("d" * num_draft_tokens + "t") * 6)[:6]


# Statistics ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("acceptance", ["lossless", "augmented", "mixture", "paper"])
def test_counts_agree_with_each_other(make_engine, acceptance) -> None:
    engine = make_engine(TableModel(random_table(VOCAB, 1)), TableModel(random_table(VOCAB, 2)))
    wanted = [
        request(
            (5, 1), (1,), acceptance=acceptance, num_draft_tokens=gamma, max_new_tokens=17, temperature=1.0
        )
        for gamma in (0, 1, 4, 9)
    ]
    for gamma, (tokens, finished) in zip((0, 1, 4, 9), run_all(engine, wanted), strict=True):
        stats = finished.stats
        assert stats.completion_tokens == len(tokens) == 17
        assert 0 <= stats.accepted_tokens <= stats.drafted_tokens <= gamma * stats.rounds
        assert stats.completion_tokens == stats.accepted_tokens + stats.rounds
        assert len(stats.token_sources) == stats.completion_tokens
        assert stats.token_sources.count("t") == stats.rounds
        assert stats.tokens_per_round == stats.completion_tokens / stats.rounds
        assert (stats.prompt_tokens, stats.drafter_prompt_tokens) == (2, 1 if gamma else 0)
        assert 0 < stats.time_to_first_token_s <= stats.total_s
        assert 0 < stats.decode_s <= stats.total_s
        assert stats.verify_s > 0
        assert (stats.draft_s > 0) == (gamma > 0)


def test_a_round_that_failed_is_not_counted(make_engine) -> None:
    table = counting_table()
    table[:, 11] = float("nan")
    gate = Gate()
    target = TableModel(table, before_pass=gate)
    engine = make_engine(target, TableModel(counting_table()))
    dummy = submit(engine, request(max_new_tokens=1))
    assert gate.reached.wait(PATIENCE_S)
    # Both are admitted together and the good one is read first: its second round includes the bad one.
    good, bad = submit(engine, request(num_draft_tokens=1)), submit(engine, request((2, 11), (11,)))
    gate.open.set()
    with pytest.raises(GenerationError):
        collect(bad)
    tokens, finished = collect(good)
    collect(dummy)
    assert tokens == [2, 3, 4, 5, 6, 7, 8, 9]
    assert [2, 4] in target.passes, "the two were verified together"
    assert finished.stats.rounds == 4
    assert finished.stats.drafted_tokens == finished.stats.accepted_tokens == 4


# Refusals ------------------------------------------------------------------------------------------------


def test_an_empty_prompt_is_refused(make_engine) -> None:
    engine = make_engine(TableModel(counting_table()))
    with pytest.raises(PromptError, match="the prompt is empty"):
        engine.submit(request(()), lambda event: None)
    with pytest.raises(PromptError, match="the drafter's prompt is empty"):
        engine.submit(request((1,), ()), lambda event: None)


def test_a_prompt_that_does_not_fit_says_what_would(make_engine) -> None:
    target = TableModel(counting_table(), name="big", context_window=1_100)
    engine = make_engine(target, TableModel(counting_table(), name="small", context_window=50))
    wanted = r"the prompt has 1,093 tokens; 'big' takes 1,092 \(1,100 less max_new_tokens=8\)"
    with pytest.raises(ContextLengthError, match=wanted):
        engine.submit(request([1] * 1_093), lambda event: None)
    with pytest.raises(ContextLengthError, match="the drafter's prompt has 43 tokens; 'small' takes 42 "):
        engine.submit(request([1] * 43, [1] * 43), lambda event: None)
    tokens, _ = run(engine, request([1] * 1_092, [1] * 42))
    assert len(tokens) == 8


def test_models_of_plainly_different_vocabularies_are_refused() -> None:
    big = TableModel(torch.zeros(1, 1, 5_000), name="big")
    with pytest.raises(VocabularyMismatchError, match="target 'big' has 5,000 tokens, drafter 'table' 12"):
        Engine(big, TableModel(counting_table()))  # type: ignore[arg-type]


def test_a_full_queue_refuses_one_more(make_engine) -> None:
    gate = Gate()
    engine = make_engine(
        TableModel(counting_table(), before_pass=gate), max_active_requests=1, max_queued_requests=2
    )
    running = submit(engine, request())
    assert gate.reached.wait(PATIENCE_S)
    waiting = [submit(engine, request()) for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 requests wait"):
        engine.submit(request(), lambda event: None)
    gate.open.set()
    assert [len(collect(events)[0]) for events in (running, *waiting)] == [8, 8, 8]
    assert len(run(engine, request())[0]) == 8, "there is room again"


# Cancellation, deadlines, closing --------------------------------------------------------------------------


def test_cancelling_frees_the_request_and_silences_it(make_engine) -> None:
    engine = make_engine(TableModel(counting_table(), context_window=200_000))
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    handle = engine.submit(request(max_new_tokens=100_000), events.put)
    while not isinstance(events.get(timeout=PATIENCE_S), NewTokens):
        pass
    handle.cancel()
    handle.cancel()
    wait_for(lambda: engine.num_running == 0)
    while not events.empty():  # what was told before the cancellation took hold
        assert isinstance(events.get(), NewTokens)
    assert handle.sequence is None
    assert len(run(engine, request())[0]) == 8


def test_a_request_cancelled_while_it_waits_never_starts(make_engine) -> None:
    gate = Gate()
    target = TableModel(counting_table(), before_pass=gate)
    engine = make_engine(target, max_active_requests=1)
    running = submit(engine, request())
    assert gate.reached.wait(PATIENCE_S)
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    engine.submit(request(), events.put).cancel()
    last = submit(engine, request())
    gate.open.set()
    collect(running)
    collect(last)
    assert events.empty()


def test_a_listener_that_raises_ends_its_own_request_only(make_engine) -> None:
    engine = make_engine(TableModel(counting_table(), context_window=200_000))
    calls: list[Event] = []

    def gone(event: Event) -> None:
        calls.append(event)
        raise RuntimeError("Event loop is closed")

    other = submit(engine, request(max_new_tokens=200))
    engine.submit(request(max_new_tokens=100_000), gone)
    assert len(collect(other)[0]) == 200
    wait_for(lambda: engine.num_running == 0)
    assert len(calls) == 1


def test_a_request_past_its_deadline_fails_and_is_freed(make_engine) -> None:
    engine = make_engine(TableModel(counting_table(), context_window=200_000))
    with pytest.raises(DeadlineExceededError, match=r"past timeout_s=0\.05"):
        run(engine, request(max_new_tokens=100_000, timeout_s=0.05))
    assert engine.num_running == 0
    assert isinstance(DeadlineExceededError("x"), TimeoutError)


def test_a_request_past_its_deadline_fails_while_it_still_waits(make_engine) -> None:
    engine = make_engine(TableModel(counting_table(), context_window=20_000_000), max_active_requests=1)
    long = engine.submit(request(max_new_tokens=10_000_000), lambda event: None)
    with pytest.raises(DeadlineExceededError):
        collect(submit(engine, request(timeout_s=0.05)), timeout_s=20)
    assert not long.cancelled
    long.cancel()


def test_closing_fails_what_runs_and_what_waits(make_engine) -> None:
    gate = Gate()
    engine = make_engine(TableModel(counting_table(), before_pass=gate), max_active_requests=1)
    running, waiting = submit(engine, request()), submit(engine, request())
    assert gate.reached.wait(PATIENCE_S)
    closer = threading.Thread(target=engine.close)
    closer.start()
    gate.open.set()
    for events in (running, waiting):
        with pytest.raises(EngineClosedError, match="closed while"):
            collect(events)
    closer.join(PATIENCE_S)
    assert not closer.is_alive()
    with pytest.raises(EngineClosedError, match="make a new pipeline"):
        engine.submit(request(), lambda event: None)
    engine.close()
    assert engine.num_running == 0


def test_a_listener_may_close_the_engine(make_engine) -> None:
    engine = make_engine(TableModel(counting_table(), context_window=200_000))
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def listener(event: Event) -> None:
        events.put(event)
        engine.close()

    engine.submit(request(max_new_tokens=100_000), listener)
    with pytest.raises(EngineClosedError):
        collect(events)


# Events and fairness -------------------------------------------------------------------------------------


def test_prefill_events_count_both_models_chunk_by_chunk(make_engine) -> None:
    engine = make_engine(TableModel(counting_table()), TableModel(counting_table()), prefill_chunk_tokens=16)
    events = submit(engine, request(long_prompt(41), long_prompt(11)))
    told = []
    while not isinstance(event := events.get(timeout=PATIENCE_S), Finished):
        assert not isinstance(event, Failed)
        told.append(event)
    progress = [event for event in told if not isinstance(event, NewTokens)]
    assert [(event.done_tokens, event.total_tokens) for event in progress] == [
        (16, 50), (32, 50), (40, 50), (50, 50)
    ]  # fmt: skip
    assert told[: len(progress)] == progress
    assert all(event.token_ids for event in told[len(progress) :])


def test_decoding_goes_on_while_a_long_prompt_is_read(make_engine) -> None:
    target = TableModel(counting_table(), context_window=100_000)
    engine = make_engine(target, prefill_chunk_tokens=4)
    first: queue.SimpleQueue[Event] = queue.SimpleQueue()
    order: list[str] = []
    both_submitted = threading.Event()

    def on_short(event: Event) -> None:
        assert both_submitted.wait(10)
        order.append("short")
        first.put(event)

    engine.submit(request(max_new_tokens=60, num_draft_tokens=0), on_short)
    second: queue.SimpleQueue[Event] = queue.SimpleQueue()
    engine.submit(request(long_prompt(4000), None), lambda e: (order.append("long"), second.put(e)))
    both_submitted.set()
    collect(first)
    collect(second)
    done = len(order) - 1 - order[::-1].index("short")
    assert order.index("short") < order.index("long") < done
    assert order[done:].count("long") > 10, "the short answer ends while the long prompt is still read"


def test_no_more_requests_run_together_than_allowed(make_engine) -> None:
    target = TableModel(counting_table())
    engine = make_engine(target, max_active_requests=3)
    answers = run_all(engine, [request((index, 1), max_new_tokens=12) for index in range(8)])
    assert {tuple(tokens) for tokens, _ in answers} == {(2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0, 1)}
    assert max(len(counts) for counts in target.passes) == 3

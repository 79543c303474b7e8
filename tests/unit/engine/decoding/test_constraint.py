"""Constraints in rounds: on the drafter, at every verified position and at the bonus position."""

import dataclasses
import itertools
import queue
import random
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.table_models import TableModel, decode_all, decoding, random_table
from helpers.tiny_models import collect, run_all
from helpers.word_constraint import WordConstraint

from rapid_integrations.config import SamplingParams, SpeculationParams
from rapid_integrations.engine.decoding.draft_length import AcceptanceByConfidence, DraftLength
from rapid_integrations.engine.decoding.round import SpeculativeDecoder
from rapid_integrations.engine.decoding.sampling import Sampler
from rapid_integrations.engine.decoding.sequence import SequenceState
from rapid_integrations.engine.engine import Engine
from rapid_integrations.engine.requests import Request
from rapid_integrations.errors import EngineClosedError, GenerationError

VOCAB, EOS = 6, 5
TARGET = random_table(VOCAB, seed=21)
DRAFTER = TARGET + random_table(VOCAB, seed=22, scale=0.8)
PROMPT = (1, 2)
GREEDY = SamplingParams(max_new_tokens=12)
RULES = ("lossless", "augmented", "mixture", "paper")


def random_words(seed: int) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [(*(rng.randrange(EOS) for _ in range(rng.randint(0, 7))), EOS) for _ in range(rng.randint(1, 12))]


def made(
    words: Any,
    num_draft_tokens: int | None,
    *,
    acceptance: str = "lossless",
    sampling: SamplingParams = GREEDY,
    **changes: Any,
) -> SequenceState:
    speculation = SpeculationParams(acceptance, 4.0, num_draft_tokens, **changes)  # type: ignore[arg-type]
    drafter_prompt = None if num_draft_tokens == 0 else (0, *PROMPT)
    sequence = decoding(PROMPT, drafter_prompt, sampling, speculation, eos=[EOS])
    sequence.constraint = None if words is None else WordConstraint(words, VOCAB, EOS)
    return sequence


def submit_together(engine: Engine, requests: Sequence[Request]) -> list[queue.SimpleQueue[Any]]:
    """Submit requests so that they are admitted together; each turn brings the next to decoding."""
    queues: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in requests]
    # The worker admits no request before all of them wait.
    with engine._queue.changed:
        for request, events in zip(requests, queues, strict=True):
            engine.submit(request, events.put)
    return queues


def tables() -> SpeculativeDecoder:
    return SpeculativeDecoder(TableModel(TARGET), TableModel(DRAFTER))  # type: ignore[arg-type]


def best_word(words: list[tuple[int, ...]], eta: float) -> tuple[int, ...]:
    """The answer of a plain greedy loop over masked rows, written independently of the package."""
    answer: tuple[int, ...] = ()
    while not answer or answer[-1] != EOS:
        history = (*PROMPT, *answer)
        choices = sorted({word[len(answer)] for word in words if word[: len(answer)] == answer})
        z = TARGET[history[-2], history[-1]][choices]
        q = DRAFTER[history[-2], history[-1]][choices].softmax(-1)
        answer += (choices[int((z + eta * (q - z.softmax(-1))).argmax())],)
    return answer


@pytest.mark.parametrize("acceptance", ["lossless", "augmented"])
def test_greedy_answers_are_those_of_a_plain_masked_loop(acceptance: str) -> None:
    different = set()
    for seed in range(25):
        words = random_words(seed)
        expected = best_word(words, 0 if acceptance == "lossless" else 4)
        different.add(expected)
        batch = [
            made(words, length, acceptance=acceptance, adaptive_transfer=False)
            for length in (*range(1, 9), None)
        ]
        if acceptance == "lossless":
            batch.append(made(words, 0))
        assert {tuple(answer) for answer in decode_all(tables(), batch)} == {expected}
    assert len(different) > 15


@pytest.mark.parametrize("acceptance", RULES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_answer_is_allowed_alone_and_in_a_mixed_batch(acceptance: str, temperature: float) -> None:
    sampling = dataclasses.replace(GREEDY, temperature=temperature, seed=3)
    words = [random_words(seed) for seed in range(12)]
    lengths = itertools.cycle([None, 0, 1, 2, 5])
    free = [None, None]
    wanted = [*free, *words]
    chosen = [next(lengths) for _ in wanted]
    batch = [
        made(w, n, acceptance=acceptance, sampling=sampling) for w, n in zip(wanted, chosen, strict=True)
    ]
    answers = decode_all(tables(), batch)
    for answer, allowed in zip(answers[len(free) :], words, strict=True):
        assert tuple(answer) in allowed
    # Other requests in the batch change nothing, with or without a constraint.
    for answer, length in zip(answers, chosen[: len(free)], strict=False):
        alone = made(None, length, acceptance=acceptance, sampling=sampling)
        assert decode_all(tables(), [alone]) == [answer]


def test_warpers_choose_among_allowed_tokens() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    allowed = torch.tensor([[False, False, True, True]])
    sampler = Sampler(SamplingParams(temperature=1.0, top_k=1))
    assert sampler.process(logits, (), (), allowed).softmax(-1).tolist() == [[0, 0, 1, 0]]
    penalised = Sampler(SamplingParams(repetition_penalty=10.0))
    assert penalised.process(logits, (2,), (), allowed).tolist() == [
        [-torch.inf, -torch.inf, pytest.approx(0.3), 2.0]
    ]
    assert logits.tolist() == [[5.0, 4.0, 3.0, 2.0]]


def test_forced_tokens_need_no_drafter_and_are_accepted() -> None:
    decoder = tables()
    sequence = made([(0, 1, 2, 3, 4, EOS), (0, 1, 2, 3, 3, EOS)], 8)
    (answer,) = decode_all(decoder, [sequence])
    assert answer[:4] == [0, 1, 2, 3]
    assert decoder.drafter.passes == [[7]]  # type: ignore[union-attr] # the prompt and 4 forced tokens
    assert sequence.stats.forced_tokens >= 4


def test_forced_tokens_are_neither_drafted_nor_accepted() -> None:
    sequence = made([(0, 1, 2, 3, 4, 0, 1, EOS)], 3)
    (answer,) = decode_all(tables(), [sequence])
    stats = sequence.stats
    assert answer == [0, 1, 2, 3, 4, 0, 1, EOS]
    assert (stats.drafted_tokens, stats.accepted_tokens, stats.acceptance_rate) == (0, 0, 0)
    # Two drafts of three tokens, each followed by a token of the target's own.
    assert (stats.forced_tokens, stats.rounds, stats.tokens_per_round) == (6, 2, 4)
    assert stats.token_sources == "ffftffft"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("num_draft_tokens", [1, 2, 5])
def test_forced_tokens_ask_no_drafter_and_teach_nothing(
    num_draft_tokens: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    observed: list[tuple[float, float]] = []
    monkeypatch.setattr(DraftLength, "observe", lambda self, *one: observed.append(one))
    sampling = dataclasses.replace(GREEDY, temperature=temperature, seed=5)
    forced = (0, 1, 2, 3, 4, 0, 1)
    sequence = made(
        [(*forced, EOS)], num_draft_tokens, acceptance="augmented", sampling=sampling, tail_rule="target"
    )
    assert decode_all(tables(), [sequence]) == [[*forced, EOS]]
    assert (sequence.stats.drafter_passes, observed) == (0, [])
    words = [(*forced, last, EOS) for last in range(5)]
    sequence = made(words, num_draft_tokens, acceptance="augmented", sampling=sampling)
    decode_all(tables(), [sequence])
    assert (sequence.stats.drafter_passes, len(observed)) == (1, 1)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("num_draft_tokens", [1, 3, 6])
def test_counts_of_a_constrained_answer_agree(seed: int, num_draft_tokens: int) -> None:
    words = random_words(seed)
    sequence = made(words, num_draft_tokens)
    asked: list[int] = []
    decoder = tables()
    decoder.drafter.before_pass = lambda steps: asked.append(len(steps))  # type: ignore[union-attr]
    (answer,) = decode_all(decoder, [sequence])
    stats = sequence.stats
    assert stats.drafted_tokens == len(asked)
    assert 0 <= stats.accepted_tokens <= stats.drafted_tokens
    ends_in_draft = stats.accepted_tokens + stats.forced_tokens + stats.rounds - len(answer)
    assert ends_in_draft in (0, 1)
    assert stats.completion_tokens == len(answer)


def chances(acceptance: AcceptanceByConfidence) -> list[float]:
    return [acceptance.probability(place) for place in range(10)]


def test_a_constrained_request_does_not_teach_free_ones_how_much_to_draft() -> None:
    """Drafts are accepted under the constraint, which leaves little choice; free ones never are."""
    target, drafter = torch.zeros(VOCAB, VOCAB, VOCAB), torch.zeros(VOCAB, VOCAB, VOCAB)
    target[..., 0], drafter[..., 1] = 9, 9
    engine = Engine(TableModel(target, eos=[EOS]), TableModel(drafter, eos=[EOS]))  # type: ignore[arg-type]
    sampling = SamplingParams(max_new_tokens=12)
    speculation = SpeculationParams("lossless", num_draft_tokens=4)
    free = Request(PROMPT, PROMPT, sampling, speculation)
    words = [(2, 3, 2, 3, 2, 3, 2, EOS), (3, 2, 3, 2, 3, 2, 3, EOS)]
    constrained = dataclasses.replace(free, constraint=WordConstraint(words, VOCAB, EOS))
    try:
        run_all(engine, [free])
        learnt = chances(engine._scheduler._acceptance[False, None])
        assert min(learnt[5:]) < 0.5
        run_all(engine, [constrained] * 3)
        assert chances(engine._scheduler._acceptance[False, None]) == learnt
        untaught = chances(AcceptanceByConfidence())
        assert sum(chances(engine._scheduler._acceptance[True, None])) > sum(untaught)
        ((_, finished),) = run_all(engine, [free])
        assert (
            finished.stats.accepted_tokens
            == finished.stats.forced_tokens
            == 0
            < finished.stats.drafted_tokens
        )
    finally:
        engine.close()


def test_a_dead_end_that_only_the_drafter_enters_does_no_harm() -> None:
    """The drafter prefers the dead end, the target does not, and the target decides."""
    target, drafter = torch.zeros(VOCAB, VOCAB, VOCAB), torch.zeros(VOCAB, VOCAB, VOCAB)
    target[..., 0], drafter[..., 1] = 3, 3
    words = [(2, 0, 0, EOS), (2, 1)]
    for acceptance, length in itertools.product(RULES, range(1, 6)):
        decoder = SpeculativeDecoder(TableModel(target), TableModel(drafter))  # type: ignore[arg-type]
        sequence = made(words, length, acceptance=acceptance)
        sequence.speculation = dataclasses.replace(sequence.speculation, transfer_strength=1)
        assert decode_all(decoder, [sequence]) == [[2, 0, 0, EOS]]


@pytest.mark.parametrize("num_draft_tokens", [0, 1, 4, None])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_dead_end_fails_its_own_request_only(num_draft_tokens: int | None, temperature: float) -> None:
    target = TableModel(TARGET, eos=[EOS])
    engine = Engine(target, TableModel(DRAFTER, eos=[EOS]))  # type: ignore[arg-type]
    sampling = SamplingParams(max_new_tokens=48, temperature=temperature, seed=1)
    long = (3, 1, 2, 4) * 10
    speculation = SpeculationParams("lossless", num_draft_tokens=num_draft_tokens)

    def request(words: list[tuple[int, ...]]) -> Request:
        return Request(PROMPT, PROMPT, sampling, speculation, constraint=WordConstraint(words, VOCAB, EOS))

    try:
        good, dead, empty = submit_together(engine, [request([(*long, EOS)]), request([(3, 1)]), request([])])
        with pytest.raises(GenerationError, match="allows no token after the first 2 of the answer"):
            collect(dead)
        with pytest.raises(GenerationError, match="allows no token after the first 0 of the answer"):
            collect(empty)
        answer, finished = collect(good)
        assert (tuple(answer), finished.reason) == (long, "stop")
        assert max(map(len, target.passes)) > 1, "the good one has been in their company"
    finally:
        engine.close()


class PanicException(BaseException):
    """As pyo3 raises the panics of Rust code: no ``Exception``."""


class PanickingConstraint(WordConstraint):
    def allowed(self, tokens: Sequence[int], count: int) -> torch.Tensor:
        if len(tokens) >= 2:
            raise PanicException("index out of bounds")
        return super().allowed(tokens, count)


def test_a_panic_of_rust_code_fails_its_own_request_only() -> None:
    target = TableModel(TARGET, eos=[EOS])
    engine = Engine(target, TableModel(DRAFTER, eos=[EOS]))  # type: ignore[arg-type]
    endless = SamplingParams(max_new_tokens=40, ignore_eos=True)
    free = Request(PROMPT, PROMPT, endless, SpeculationParams("lossless", num_draft_tokens=2))
    words = random_words(3)

    def panic(token: int) -> bool:
        raise PanicException("index out of bounds")

    try:
        ((expected, _),) = run_all(engine, [free])
        good, *broken = submit_together(
            engine,
            [
                free,
                dataclasses.replace(free, constraint=PanickingConstraint(words, VOCAB, EOS)),
                dataclasses.replace(free, stop_matcher=panic),
            ],
        )
        for events in broken:
            with pytest.raises(GenerationError, match="PanicException: index out of bounds"):
                collect(events)
        assert collect(good)[0] == expected
        assert max(map(len, target.passes)) > 1, "the good one has been in their company"
        assert run_all(engine, [free])[0][0] == expected
    finally:
        engine.close()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_exit_ends_the_worker_and_fails_every_request(kind: type[BaseException]) -> None:
    def leave(token: int) -> bool:
        raise kind

    engine = Engine(TableModel(TARGET), None)  # type: ignore[arg-type]
    free = Request(PROMPT, None, GREEDY)
    waiting = submit_together(engine, [dataclasses.replace(free, stop_matcher=leave), free])
    for events in waiting:
        with pytest.raises(EngineClosedError, match=f"the engine stopped: {kind.__name__}"):
            collect(events)
    assert engine.closed
    engine.close()


def test_a_constraint_is_released_when_its_request_ends() -> None:
    engine = Engine(TableModel(TARGET, eos=[EOS]), None)  # type: ignore[arg-type]
    constraint = WordConstraint([(3, 1, EOS)], VOCAB, EOS)
    gone = threading.Event()
    weakref.finalize(constraint, gone.set)
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    handle = engine.submit(Request(PROMPT, None, GREEDY, constraint=constraint), events.put)
    del constraint
    try:
        _, finished = collect(events)
        assert gone.wait(30)
        assert handle.stats is finished.stats
    finally:
        engine.close()


def test_a_cut_answer_ends_for_its_length() -> None:
    engine = Engine(TableModel(TARGET, eos=[EOS]), TableModel(DRAFTER, eos=[EOS]))  # type: ignore[arg-type]
    request = Request(
        PROMPT, PROMPT, SamplingParams(max_new_tokens=3), SpeculationParams("lossless"),
        constraint=WordConstraint([(3, 1, 2, 2, EOS)], VOCAB, EOS),
    )  # fmt: skip
    ((answer, finished),) = run_all(engine, [request])
    engine.close()
    assert (answer, finished.reason) == ([3, 1, 2], "length")


@pytest.mark.parametrize("failing_pass", range(1, 7))
def test_a_failing_round_changes_no_state(failing_pass: int) -> None:
    words = [(*word, EOS) for word in itertools.product(range(3), repeat=6)]
    (expected,) = decode_all(tables(), [made(words, 2, acceptance="augmented")])
    decoder = tables()
    left = failing_pass

    def fail(steps: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise ConnectionError("a pass fails")

    decoder.target.before_pass = decoder.drafter.before_pass = fail  # type: ignore[attr-defined, union-attr]
    sequence = made(words, 2, acceptance="augmented")
    answer: list[int] = []
    while not answer or answer[-1] != EOS:
        try:
            (tokens,) = decoder.round([sequence])
        except ConnectionError:
            assert sequence.num_emitted == len(answer)
            assert sequence.target.tokens == [*PROMPT, *answer]
            continue
        answer += tokens
    assert answer == expected
    assert left <= 0


def test_models_of_different_padded_size_share_a_constraint() -> None:
    padded = torch.nn.functional.pad(DRAFTER, (0, 3, 0, 3, 0, 3))
    padded[..., VOCAB:] = 50
    decoder = SpeculativeDecoder(TableModel(TARGET), TableModel(padded))  # type: ignore[arg-type]
    words = random_words(4)
    (answer,) = decode_all(decoder, [made(words, 3)])
    assert tuple(answer) == best_word(words, 0)

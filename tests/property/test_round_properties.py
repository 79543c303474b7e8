"""Rounds over random batches: the output depends neither on drafting nor on the rest of the batch."""

import dataclasses
import itertools
import random
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from helpers.table_models import TableModel, decode_all, decoding, random_table
from helpers.word_constraint import WordConstraint
from hypothesis import given, settings

from rapid_integrations.config import SamplingParams, SpeculationParams
from rapid_integrations.engine.decoding.round import SpeculativeDecoder
from rapid_integrations.engine.decoding.sequence import Draft, SequenceState

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True, database=None)
VOCAB = 5
EOS = 4
# Similar tables, so that drafts are accepted for a while; scores far from ties.
TARGET = random_table(VOCAB, seed=1, scale=1.5)
DRAFTER = TARGET + random_table(VOCAB, seed=2, scale=0.7)
# So confident that the drafter is skipped at some positions.
SURE_TARGET = 3 * TARGET

prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6)


@st.composite
def sequences(draw: st.DrawFn) -> dict[str, Any]:
    acceptance = draw(st.sampled_from(["lossless", "augmented", "mixture"]))
    return {
        "target_prompt": draw(prompts),
        "drafter_prompt": draw(prompts),
        "sampling": SamplingParams(
            temperature=draw(st.sampled_from([0.0, 0.7, 1.0])),
            seed=draw(st.integers(0, 10**6)),
            top_k=draw(st.sampled_from([None, 3])),
            repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
            max_new_tokens=draw(st.integers(1, 12)),
        ),
        "speculation": SpeculationParams(
            acceptance,
            transfer_strength=draw(st.sampled_from([0.0, 5.0, 20.0])),
            tail_rule=draw(st.sampled_from(["none", "target", "drafter"])),
            adaptive_transfer=draw(st.booleans()),
            mixture_weight=draw(st.sampled_from([0.0, 0.3, 0.7, 1.0])),
        ),
        "eos": [EOS] if draw(st.booleans()) else [],
    }


draft_lengths = st.one_of(st.none(), st.integers(1, 7))
words = st.lists(st.lists(st.integers(0, EOS - 1), max_size=8), min_size=1, max_size=6)
# Long ones that share beginnings: free positions and forced ones take turns.
long_words = st.lists(st.lists(st.integers(0, 1), min_size=8, max_size=12), min_size=2, max_size=12)


def made(
    wanted: dict[str, Any], num_draft_tokens: int | None, allowed: list[list[int]] | None = None
) -> SequenceState:
    """A request; ``allowed`` are the answers that its constraint allows, without their end."""
    params = dataclasses.replace(wanted["speculation"], num_draft_tokens=num_draft_tokens)
    eos = wanted["eos"] if allowed is None else [EOS]
    sequence = decoding(
        wanted["target_prompt"], wanted["drafter_prompt"], wanted["sampling"], params, eos=eos
    )
    if allowed is not None:
        sequence.constraint = WordConstraint([(*word, EOS) for word in allowed], VOCAB, EOS)
    return sequence


def decoder(target: torch.Tensor = TARGET) -> SpeculativeDecoder:
    return SpeculativeDecoder(TableModel(target), TableModel(DRAFTER))  # type: ignore[arg-type]


@SETTINGS
@given(st.lists(st.tuples(sequences(), draft_lengths, draft_lengths), min_size=1, max_size=4))
def test_tokens_depend_neither_on_draft_lengths_nor_on_the_batch(batch: Any) -> None:
    together = decode_all(decoder(), [made(wanted, first) for wanted, first, _ in batch])
    for output, (wanted, _, second) in zip(together, batch, strict=True):
        assert decode_all(decoder(), [made(wanted, second)]) == [output]
        sampling = wanted["sampling"]
        assert 1 <= len(output) <= sampling.max_new_tokens
        ended = bool(output) and output[-1] in wanted["eos"]
        assert ended or len(output) == sampling.max_new_tokens
        assert not set(output[:-1]) & set(wanted["eos"])


@SETTINGS
@given(
    sequences(),
    draft_lengths,
    st.sampled_from([TARGET, SURE_TARGET]),
    st.one_of(st.none(), words, long_words),
)
def test_greedy_tokens_are_those_of_a_plain_loop(
    wanted: dict[str, Any], num_draft_tokens: int | None, table: torch.Tensor, allowed: list[list[int]] | None
) -> None:
    wanted["sampling"] = dataclasses.replace(wanted["sampling"], temperature=0.0, repetition_penalty=1.0)
    sequence = made(wanted, num_draft_tokens, allowed)
    (output,) = decode_all(decoder(table), [sequence])
    target, drafter = [0, *wanted["target_prompt"]], [0, *wanted["drafter_prompt"]]
    params = wanted["speculation"]
    agreement = 1.0
    for position, token in enumerate(output):
        mask = np.ones(VOCAB)
        if sequence.constraint is not None:
            mask = sequence.constraint.allowed(output[:position], 1)[0].numpy()
        z = np.exp(table[target[-2], target[-1]].double().numpy()) * mask
        p = z / z.sum()
        y = np.exp(DRAFTER[drafter[-2], drafter[-1]].double().numpy()) * mask
        q = y / y.sum()
        eta = params.transfer_strength if params.acceptance == "augmented" else 0
        if params.adaptive_transfer:
            eta *= (1 - p.max()) * agreement**8
            agreement = 0.9 * agreement + 0.1 * np.minimum(p, q).sum()
        shift = q - p
        if params.tail_rule == "drafter":
            shift[q < 0.1 * q.max()] = 0
        scores = p * np.exp(eta * shift) / (p * np.exp(eta * shift)).sum()
        if params.tail_rule == "target" and eta:
            scores = np.where(scores < 0.1 * scores.max(), p, scores)
        if params.acceptance == "mixture":
            weight = params.mixture_weight
            scores = weight * p + (1 - weight) * q
        assert token == scores.argmax()
        target.append(token)
        drafter.append(token)


def steered(rng: random.Random) -> SequenceState:
    """A request whose drafter steers; its answer may be constrained to words that share beginnings."""
    speculation = SpeculationParams(
        "augmented",
        transfer_strength=rng.choice([1.0, 5.0, 12.0]),
        tail_rule=rng.choice(["none", "none", "target", "drafter"]),
        adaptive_transfer=rng.random() < 0.7,
    )
    if rng.random() < 0.2:
        speculation = SpeculationParams("mixture", mixture_weight=rng.choice([0.6, 0.8]))
    wanted = {
        "target_prompt": rng.choices(range(VOCAB), k=3),
        "drafter_prompt": rng.choices(range(VOCAB), k=3),
        "sampling": SamplingParams(
            temperature=rng.choice([0.0, 0.0, 1.0]),
            top_p=rng.choice([0.5, 0.9]),
            seed=rng.randrange(10**6),
            max_new_tokens=16,
        ),
        "speculation": speculation,
        "eos": [],
    }
    # As in JSON, the text between the parts is forced.
    fixed = rng.choices(range(EOS), k=rng.randrange(5))
    parts = [rng.choices(range(EOS), k=3) for _ in range(rng.randrange(2, 6))]
    allowed = [[*fixed, *one, *fixed, *other] for one, other in itertools.product(parts, repeat=2)]
    return made(wanted, rng.choice([None, 1, 2, 4]), rng.choice([allowed, allowed, None]))


@pytest.mark.parametrize("seed", range(4))
def test_skipping_the_drafter_leaves_no_trace(seed: int) -> None:
    def decode() -> tuple[list[SequenceState], list[list[int]]]:
        rng = random.Random(seed)
        batch = [steered(rng) for _ in range(80)]
        return batch, decode_all(decoder(SURE_TARGET), batch)

    skipping, tokens = decode()
    with mock.patch("rapid_integrations.engine.decoding.accept.is_decided", return_value=False):
        asking, expected = decode()
    assert tokens == expected
    for greedy, free in itertools.product((True, False), repeat=2):
        passes = [
            sum(
                sequence.stats.drafter_passes
                for sequence in batch
                if (sequence.sampler.greedy, sequence.constraint is None) == (greedy, free)
            )
            for batch in (skipping, asking)
        ]
        assert passes[0] < 0.95 * passes[1]
    for one, other in zip(skipping, asking, strict=True):
        assert not other.skipped_logits
        if one.adaptive is not None and other.adaptive is not None:
            # The skipped positions are the rest of the observed ones.
            if one.skipped_logits:
                decoder().proposer.read_probs([(one, Draft(1))], [[]])
            assert one.adaptive.agreement == pytest.approx(other.adaptive.agreement, abs=1e-5)


@SETTINGS
@given(
    st.lists(st.tuples(sequences(), draft_lengths, st.none() | long_words), min_size=1, max_size=4),
    st.sampled_from([TARGET, SURE_TARGET]),
    st.data(),
)
def test_between_rounds_caches_hold_a_prefix_of_their_tokens(
    batch: Any, table: torch.Tensor, data: st.DataObject
) -> None:
    """The state that a round promises, and leaves as it was when a model raises in the middle of it."""
    rounds = decoder(table)
    running = [made(*one) for one in batch]
    expected = decode_all(decoder(table), [made(*one) for one in batch])
    while running:
        failing_pass = data.draw(st.integers(0, 6))
        before = [(s.num_emitted, list(s.target.tokens), s.stats.drafted_tokens) for s in running]
        with _Failing(rounds, failing_pass) as failing:
            rounds.round(running)
        if failing.failed:
            assert before == [(s.num_emitted, s.target.tokens, s.stats.drafted_tokens) for s in running]
        for sequence in running:
            for track in (sequence.target, sequence.drafter):
                assert track is not None
                assert track.cache.length < len(track.tokens)
                if track.cache.length:
                    none = torch.zeros(1, 0, 1)
                    keys, _ = track.cache.write(0, none, none)
                    assert keys[0, :, 0].long().tolist() == track.tokens[: track.cache.length]
            if sequence.skipped_logits:
                assert sequence.drafter is not None
                assert len(sequence.drafter.unread) > len(sequence.skipped_logits)
            assert sequence.stats.accepted_tokens <= sequence.stats.drafted_tokens
            assert sequence.stats.completion_tokens == sequence.num_emitted
            assert len(sequence.stats.token_sources) == sequence.num_emitted
        ended = [
            s
            for s in running
            if s.num_emitted == s.sampling.max_new_tokens
            or (s.num_emitted and s.target.tokens[-1] in s.eos_token_ids)
        ]
        for sequence in ended:
            assert sequence.target.tokens[-sequence.num_emitted :] in expected
        running = [s for s in running if s not in ended]


@SETTINGS
@given(st.lists(st.tuples(sequences(), draft_lengths, st.none() | words), min_size=1, max_size=4))
def test_every_token_of_an_answer_has_one_source(batch: Any) -> None:
    running = [made(*one) for one in batch]
    outputs = decode_all(decoder(), running)
    for sequence, output in zip(running, outputs, strict=True):
        stats = sequence.stats
        sources = stats.token_sources
        assert len(sources) == len(output) == stats.completion_tokens
        assert sources.count("d") == stats.accepted_tokens
        assert sources.count("f") == stats.forced_tokens
        # After a draft that ends the answer the target adds no token.
        ended = output[-1] in sequence.eos_token_ids and sources[-1] in "df"
        assert sources.count("t") == stats.rounds - ended
        if sequence.constraint is None:
            assert "f" not in sources
        for position, source in enumerate(sources):
            if source == "f":
                assert int(sequence.constraint.allowed(output[:position], 1).sum()) == 1


class _Failing:
    """Lets one pass of a round fail, counted from 1; 0 lets none."""

    def __init__(self, rounds: SpeculativeDecoder, failing_pass: int) -> None:
        self.models: Any = (rounds.target, rounds.drafter)
        self.left = failing_pass
        self.failed = False

    def __call__(self, steps: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise ConnectionError("a pass fails")

    def __enter__(self) -> "_Failing":
        for model in self.models:
            model.before_pass = self
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        for model in self.models:
            model.before_pass = None
        self.failed = kind is ConnectionError
        return self.failed

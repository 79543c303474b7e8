"""Transfer strengths, position by position, against the formula written out."""

import itertools
import math

import pytest
import torch
from helpers.table_models import TableModel, decode_all, decoding, random_table

from rapid_integrations.config import SamplingParams, SpeculationParams
from rapid_integrations.engine.decoding.round import SpeculativeDecoder
from rapid_integrations.engine.decoding.transfer import DECAY, EXPONENT, AdaptiveTransfer, question_agreement
from rapid_integrations.engine.decoding.verification import augmented_target_logits


def distributions(positions: int, *, seed: int, scale: float = 2.0, vocab: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(positions, vocab, generator=generator) * scale).softmax(-1)


def agreement(overlaps: list[float], start: float = 1.0) -> float:
    """A after these overlaps, as in the module's docstring, with ``start`` for G."""
    t = len(overlaps)
    weights = [(1 - DECAY) * DECAY ** (t - 1 - i) for i in range(t)]
    return start * DECAY**t + sum(w * b for w, b in zip(weights, overlaps, strict=True))


def test_strengths_are_those_of_the_formula() -> None:
    p, q = distributions(9, seed=1), distributions(9, seed=2)
    strengths, overlaps = AdaptiveTransfer(8.0).strengths(p, q)
    expected = torch.minimum(p, q).sum(-1).tolist()
    assert overlaps.tolist() == pytest.approx(expected)
    for t, strength in enumerate(strengths.tolist()):
        wanted = 8.0 * (1 - p[t].max().item()) * agreement(expected[:t]) ** EXPONENT
        assert strength == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("cuts", [[9], [1] * 9, [4, 5], [2, 3, 1, 3]])
def test_strengths_do_not_depend_on_where_rounds_are_cut(cuts: list[int]) -> None:
    p, q = distributions(9, seed=3), distributions(9, seed=4)
    whole, _ = AdaptiveTransfer(5.0).strengths(p, q)
    transfer, found, start = AdaptiveTransfer(5.0), [], 0
    for size in cuts:
        part = slice(start, start + size)
        strengths, overlaps = transfer.strengths(p[part], q[part])
        transfer.observe(overlaps.tolist())
        found += strengths.tolist()
        start += size
    assert found == pytest.approx(whole.tolist(), rel=1e-5)


def test_positions_between_count_before_they_are_observed() -> None:
    p, q = distributions(5, seed=5), distributions(5, seed=6)
    whole, overlaps = AdaptiveTransfer(5.0).strengths(p, q)
    transfer = AdaptiveTransfer(5.0)
    last, _ = transfer.strengths(p[4:], q[4:], pending_overlaps=overlaps[:4].tolist())
    assert last.item() == pytest.approx(whole[4].item(), rel=1e-5)
    assert transfer == AdaptiveTransfer(5.0)


def test_a_sure_target_is_not_overruled_and_an_unsure_one_is() -> None:
    sure = torch.tensor([[9.0, 0.0, 0.0]])
    unsure = torch.tensor([[0.2, 0.0, 0.0]])
    drafter = torch.tensor([[0.01, 0.98, 0.01]])
    for logits, choice in ((sure, 0), (unsure, 1)):
        strengths, _ = AdaptiveTransfer(10.0).strengths(logits.softmax(-1), drafter)
        shifted = augmented_target_logits(logits, drafter, transfer_strength=strengths)
        assert shifted.argmax().item() == choice
    fixed = augmented_target_logits(sure, drafter, transfer_strength=10.0)
    assert fixed.argmax().item() == 1


def test_trust_falls_with_disagreement_and_comes_back_with_agreement() -> None:
    transfer = AdaptiveTransfer(10.0)
    assert transfer.agreement == 1
    transfer.observe([0.1] * 20)
    low = transfer.agreement
    assert low == pytest.approx(agreement([0.1] * 20))
    assert low < 0.25
    transfer.observe([1.0] * 20)
    assert transfer.agreement > 0.85


@pytest.mark.parametrize(
    ("target_probs", "draft_probs", "wanted"),
    [
        ([], [], 1.0),
        ([0.2, 0.9], [0.2, 0.9], 1.0),
        ([0.2, 0.3], [0.9, 0.4], 1.0),  # a drafter that expects more lacks nothing
        ([0.2, 1.0, 0.5], [0.1, 0.25, 0.5], 0.25),  # the one it lacks most decides
        ([1.0], [0.0], 0.0),
    ],
)
def test_the_grounding_is_that_of_the_formula(target_probs, draft_probs, wanted) -> None:
    assert question_agreement(target_probs, draft_probs) == pytest.approx(wanted)


@pytest.mark.parametrize("start", [0.0, 0.25, 0.9])
def test_agreement_begins_at_the_grounding(start: float) -> None:
    p, q = distributions(6, seed=1), distributions(6, seed=2)
    strengths, overlaps = AdaptiveTransfer(8.0, agreement=start).strengths(p, q)
    for t, strength in enumerate(strengths.tolist()):
        wanted = 8.0 * (1 - p[t].max().item()) * agreement(overlaps.tolist()[:t], start) ** EXPONENT
        assert strength == pytest.approx(wanted, rel=1e-4, abs=1e-12)
    highest = AdaptiveTransfer(8.0, agreement=start).max_strength(p[0].max().item(), num_unknown=0)
    assert highest == pytest.approx(strengths[0].item())


def test_a_broken_row_does_not_spoil_the_ones_before() -> None:
    p, q = distributions(4, seed=7), distributions(4, seed=8)
    expected, _ = AdaptiveTransfer(5.0).strengths(p, q)
    p[2] = math.nan
    strengths, _ = AdaptiveTransfer(5.0).strengths(p, q)
    assert strengths[:2].tolist() == expected[:2].tolist()


@pytest.mark.parametrize("num_draft_tokens", [1, 3, None])
def test_the_stats_give_the_agreement(num_draft_tokens: int | None) -> None:
    target, drafter = random_table(6, seed=1), random_table(6, seed=2)
    speculation = SpeculationParams(num_draft_tokens=num_draft_tokens)
    sequence = decoding([1, 2], [1, 2], SamplingParams(max_new_tokens=12), speculation)
    assert sequence.stats.agreement is None
    decoder = SpeculativeDecoder(TableModel(target), TableModel(drafter))  # type: ignore[arg-type]
    (answer,) = decode_all(decoder, [sequence])
    tokens = [1, 2, *answer]
    overlaps = [
        torch.minimum(*(table[before, last].softmax(-1) for table in (target, drafter))).sum().item()
        for before, last in itertools.pairwise(tokens[:-1])
    ]
    # At the end of the answer the drafter may have been skipped.
    known = overlaps[: len(overlaps) - len(sequence.skipped_logits)]
    assert len(known) > len(overlaps) / 2
    assert sequence.stats.agreement == pytest.approx(agreement(known), rel=1e-5)


@pytest.mark.parametrize(
    ("speculation", "adapts"),
    [
        (SpeculationParams(), True),
        (SpeculationParams(adaptive_transfer=False), False),
        (SpeculationParams(transfer_strength=0), False),
        (SpeculationParams("lossless"), False),
        (SpeculationParams("paper"), False),
        (SpeculationParams("mixture"), False),
    ],
)
def test_only_the_augmented_rule_adapts(speculation: SpeculationParams, adapts: bool) -> None:
    sequence = decoding([1], [1], SamplingParams(), speculation)
    assert (sequence.adaptive is not None) == adapts

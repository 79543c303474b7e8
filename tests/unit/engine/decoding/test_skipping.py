"""Bonus positions without the drafter: decided means that no drafter could change the choice."""

import pytest
import torch

from rapid_integrations.config import Acceptance, TailRule
from rapid_integrations.engine.decoding.skipping import TargetMargin
from rapid_integrations.engine.decoding.verification import (
    augmented_target_logits,
    correction_probs,
    count_accepted,
    mixture_logits,
)

INF = float("inf")


def rows(*values: list[float]) -> torch.Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("weight", "p", "decided"),
    [
        (0.6, [0.85, 0.1, 0.05], True),  # .51 against .06 + .4
        (0.6, [0.8, 0.15, 0.05], False),  # .48 against .09 + .4
        (0.9, [0.5, 0.35, 0.15], True),
        (1.0, [0.4, 0.3, 0.3], True),
        (1.0, [0.4, 0.4, 0.2], False),
        (0.5, [1.0, 0.0, 0.0], False),  # a tie with a drafter that is as sure of another
        (0.0, [1.0, 0.0, 0.0], False),
    ],
)
def test_the_mixture_is_decided_where_no_drafter_could_change_its_choice(weight, p, decided) -> None:
    assert TargetMargin.of(rows(p).log()[0]).survives_mixing(weight) is decided
    choices = {
        int(mixture_logits(rows(p).log(), torch.eye(3)[token][None], target_weight=weight).argmax())
        for token in range(3)
    }
    if decided:
        assert choices == {0}
    else:
        assert len(choices) > 1 or weight in (0.5, 1.0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tail_rule", ["none", "target", "drafter"])
@pytest.mark.parametrize("strength", [0.5, 4.0, 15.0])
def test_what_is_decided_no_drafter_can_change(masked: bool, tail_rule: TailRule, strength: float) -> None:
    """Against drafters that are sure of each token in turn; a mask takes the same tokens from both models."""
    generator = torch.Generator().manual_seed(7)
    outcomes = set()
    for _ in range(300):
        left = torch.randperm(6, generator=generator)[: torch.randint(1, 4, (), generator=generator)]
        drafters = torch.eye(6)[left if masked else torch.arange(6)]
        logits = 2 * strength * torch.randn(1, 6, generator=generator)
        if masked:
            logits[:, drafters.sum(0) == 0] = -INF
        decided = TargetMargin.of(logits[0]).survives_transfer(strength, tail_rule)
        shifted = augmented_target_logits(
            logits.expand(len(drafters), -1), drafters, transfer_strength=strength, tail_rule=tail_rule
        )
        choices = set(shifted.argmax(-1).tolist())
        if decided:
            assert choices == {int(logits.argmax())}
        outcomes.add((bool(decided), len(choices) == 1))
    assert (False, False) in outcomes
    assert ((True, True) in outcomes) == (masked or tail_rule != "target")
    if tail_rule == "none":
        assert (False, True) not in outcomes, "a drafter that is sure of another token reaches the bound"


@pytest.mark.parametrize("q", [[0.9, 0.05, 0.05], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]])
@pytest.mark.parametrize("acceptance", ["lossless", "augmented"])
def test_an_only_choice_is_what_is_drawn_whatever_the_drafter_proposes(
    acceptance: Acceptance, q: list[float]
) -> None:
    logits = rows([-INF, 0.3, -INF])
    assert TargetMargin.of(logits[0]).is_only_choice
    assert not TargetMargin.of(rows([-9.0, 0.3, -INF])[0]).is_only_choice
    verify = logits.softmax(-1)
    if acceptance == "augmented":
        verify = augmented_target_logits(logits, rows(q), transfer_strength=5.0).softmax(-1)
    for token in (0, 2):
        assert not count_accepted(torch.tensor([token]), rows(q), verify, torch.tensor([0.0]))
    assert correction_probs(acceptance, logits.softmax(-1), verify, rows(q)).tolist() == [[0, 1, 0]]

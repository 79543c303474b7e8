"""Each function of the verification maths against values worked out by hand."""

import math

import pytest
import torch

from rapid_integrations.engine.decoding.verification import (
    augmented_target_logits,
    correction_probs,
    count_accepted,
    leading_matches,
    mixture_logits,
    residual_probs,
    sample_tokens,
)
from rapid_integrations.errors import ShapeMismatchError

INF = float("inf")


def rows(*values: list[float]) -> torch.Tensor:
    return torch.tensor(values)


def augmented(p: list[float], q: list[float], eta: float, tail_rule="none") -> list[float]:
    logits = augmented_target_logits(rows(p).log(), rows(q), transfer_strength=eta, tail_rule=tail_rule)
    (probs,) = logits.softmax(-1)
    return probs.tolist()


# The augmented target ------------------------------------------------------------------------------------


def test_the_shift_is_eta_times_q_minus_p() -> None:
    target = rows([1.0, 0.0], [0.0, 0.0])
    draft = rows([0.25, 0.75], [0.9, 0.1])
    p = math.e / (1 + math.e)
    shifted = augmented_target_logits(target, draft, transfer_strength=4)
    wanted = rows([1 + 4 * (0.25 - p), 4 * (0.75 - (1 - p))], [4 * 0.4, -4 * 0.4])
    torch.testing.assert_close(shifted, wanted)


def test_logits_are_shifted_not_log_probabilities() -> None:
    # A constant added to the logits stays in them and changes no probability.
    target, draft = rows([1.0, -2.0, 0.5]), rows([0.1, 0.2, 0.7])
    shifted = augmented_target_logits(target, draft, transfer_strength=3)
    torch.testing.assert_close(augmented_target_logits(target + 7, draft, transfer_strength=3), shifted + 7)


@pytest.mark.parametrize("tail_rule", ["none", "target", "drafter"])
def test_no_strength_returns_the_logits_themselves(tail_rule) -> None:
    target = rows([1.0, -INF, 3.0])
    draft = rows([0.2, 0.5, 0.3])
    assert augmented_target_logits(target, draft, transfer_strength=0, tail_rule=tail_rule) is target


@pytest.mark.parametrize("tail_rule", ["none", "target"])
def test_equal_distributions_stay_as_they_are(tail_rule) -> None:
    p = [0.5, 0.3, 0.2]
    assert augmented(p, p, 20, tail_rule) == pytest.approx(p)


@pytest.mark.parametrize("tail_rule", ["none", "target", "drafter"])
def test_removed_tokens_stay_removed(tail_rule) -> None:
    target = rows([0.0, -INF, 1.0])
    draft = rows([0.1, 0.9, 0.0])  # the drafter is sure of the removed token
    probs = augmented_target_logits(target, draft, transfer_strength=10, tail_rule=tail_rule).softmax(-1)
    assert probs[0, 1] == 0
    assert probs.isfinite().all()
    assert float(probs.sum()) == pytest.approx(1)


def test_the_target_tail_rule_can_hand_a_token_its_weight_back_and_more() -> None:
    # p = .95 falls to p̂ = .05 against a maximum of .9: under a tenth of it, so p's .95 comes back and wins.
    p = [0.95, 0.025, 0.025]
    eta = 10.0
    wanted = [0.05, 0.9, 0.05]
    # q with z + eta (q - p) = log(p̂) + c, solved for q.
    shift = [math.log(a) - math.log(b) for a, b in zip(wanted, p, strict=True)]
    constant = -sum(shift) / len(shift)
    q = [pi + (s + constant) / eta for pi, s in zip(p, shift, strict=True)]
    assert sum(q) == pytest.approx(1)
    assert augmented(p, q, eta) == pytest.approx(wanted, rel=1e-4)
    # Eq. 9 gives (.95, .9, .025): the third, .05 before, goes back to .025.
    total = 0.95 + 0.9 + 0.025
    kept = augmented(p, q, eta, "target")
    assert kept == pytest.approx([0.95 / total, 0.9 / total, 0.025 / total], rel=1e-4)
    assert kept.index(max(kept)) == 0, "the greedy choice is flipped back"


def test_the_target_tail_rule_is_renormalised_and_keeps_what_is_likely() -> None:
    p, q, eta = [0.6, 0.3, 0.1], [0.1, 0.6, 0.3], 2.0
    weights = [pi * math.exp(eta * (qi - pi)) for pi, qi in zip(p, q, strict=True)]
    plain = [weight / sum(weights) for weight in weights]
    assert min(plain) > 0.1 * max(plain)
    assert augmented(p, q, eta, "target") == pytest.approx(plain)
    assert augmented(p, q, eta, "none") == pytest.approx(plain)


def test_the_drafter_tail_rule_shifts_only_what_the_drafter_finds_likely() -> None:
    p, q, eta = [0.5, 0.3, 0.2], [0.9, 0.09, 0.01], 5.0
    # 0.09 is exactly a tenth of 0.9: shifted; 0.01 is less: left alone.
    q_exact = rows(q)
    q_exact[0, 1] = 0.1 * q_exact[0, 0]
    shifted = augmented_target_logits(rows(p).log(), q_exact, transfer_strength=eta, tail_rule="drafter")
    wanted = rows([math.log(0.5) + eta * 0.4, math.log(0.3) + eta * (0.09 - 0.3), math.log(0.2)])
    torch.testing.assert_close(shifted, wanted)


def test_rows_do_not_touch_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(5, 7, generator=generator)
    draft = torch.randn(5, 7, generator=generator).softmax(-1)
    for tail_rule in ("none", "target", "drafter"):
        together = augmented_target_logits(target, draft, transfer_strength=8, tail_rule=tail_rule)
        apart = [
            augmented_target_logits(
                target[i : i + 1], draft[i : i + 1], transfer_strength=8, tail_rule=tail_rule
            )
            for i in range(5)
        ]
        torch.testing.assert_close(together, torch.cat(apart))


def test_the_arguments_are_left_as_they_are() -> None:
    target, draft = rows([1.0, 2.0]), rows([0.5, 0.5])
    for tail_rule in ("none", "target", "drafter"):
        augmented_target_logits(target, draft, transfer_strength=8, tail_rule=tail_rule)
    assert target.tolist() == [[1, 2]]
    assert draft.tolist() == [[0.5, 0.5]]


# The mixture ---------------------------------------------------------------------------------------------


def test_the_mixture_gives_each_model_its_share() -> None:
    logits = mixture_logits(rows([0.5, 0.3, 0.2]).log() + 7, rows([0.1, 0.1, 0.8]), target_weight=0.75)
    torch.testing.assert_close(logits.exp(), rows([0.4, 0.25, 0.35]))


def test_a_target_that_has_it_all_is_returned_itself() -> None:
    target = rows([1.0, -INF, 3.0])
    assert mixture_logits(target, rows([0.2, 0.5, 0.3]), target_weight=1) is target


def test_tokens_that_neither_model_allows_stay_removed() -> None:
    logits = mixture_logits(rows([0.0, -INF, 1.0]), rows([0.0, 0.0, 1.0]), target_weight=0.5)
    assert logits[0, 1] == -INF
    assert float(logits.softmax(-1).sum()) == pytest.approx(1)


def test_acceptance_against_the_mixture_is_what_the_docstring_says() -> None:
    p, q = rows([0.5, 0.3, 0.2]), rows([0.1, 0.2, 0.7])
    mixture = mixture_logits(p.log(), q, target_weight=0.4).softmax(-1)
    distance = (p - q).abs().sum() / 2
    torch.testing.assert_close(torch.minimum(q, mixture).sum(), 1 - 0.4 * distance)
    # w (p - q) is left over: the residual of lossless speculation, whatever the share.
    torch.testing.assert_close(correction_probs("mixture", p, mixture, q), residual_probs(p, q))


# The correction token ------------------------------------------------------------------------------------


def test_the_residual_is_what_the_drafter_gives_too_little() -> None:
    residual = residual_probs(rows([0.5, 0.3, 0.2]), rows([0.2, 0.2, 0.6]))
    torch.testing.assert_close(residual, rows([0.75, 0.25, 0.0]))


def test_the_residual_of_disjoint_distributions_is_the_target() -> None:
    p = rows([0.4, 0.6, 0.0, 0.0])
    torch.testing.assert_close(residual_probs(p, rows([0.0, 0.0, 0.9, 0.1])), p)


def test_the_residual_of_equal_distributions_is_the_target() -> None:
    p = rows([0.25, 0.75], [0.5, 0.5])
    assert torch.equal(residual_probs(p, p.clone()), p)


def test_the_published_residual_takes_the_larger_of_both_differences() -> None:
    p, q, p_hat = rows([0.5, 0.3, 0.2]), rows([0.6, 0.1, 0.3]), rows([0.3, 0.3, 0.4])
    # max(p - p̂, p - q, 0) = (.2, .2, 0)
    torch.testing.assert_close(residual_probs(p, q, augmented_probs=p_hat), rows([0.5, 0.5, 0.0]))


def test_each_rule_has_its_residual() -> None:
    p, q, p_hat = rows([0.5, 0.3, 0.2]), rows([0.6, 0.1, 0.3]), rows([0.3, 0.3, 0.4])
    torch.testing.assert_close(correction_probs("lossless", p, p, q), rows([0.0, 1.0, 0.0]))
    # max(p̂ - q, 0) = (0, .2, .1)
    torch.testing.assert_close(correction_probs("augmented", p, p_hat, q), rows([0.0, 2 / 3, 1 / 3]))
    torch.testing.assert_close(correction_probs("paper", p, p_hat, q), rows([0.5, 0.5, 0.0]))


# Drawing -------------------------------------------------------------------------------------------------


def draw(probs: list[float], *uniforms: float) -> list[int]:
    many = rows(probs).expand(len(uniforms), -1)
    return sample_tokens(many, torch.tensor(uniforms, dtype=torch.float64)).tolist()


JUST_UNDER_ONE = 1 - 2**-53


def test_drawing_inverts_the_cumulative_distribution() -> None:
    assert draw([0.25, 0.5, 0.25], 0.0, 0.2499, 0.25, 0.7499, 0.75, JUST_UNDER_ONE) == [0, 0, 1, 1, 2, 2]


def test_impossible_tokens_are_never_drawn() -> None:
    probs = [0.0, 0.0, 0.5, 0.0, 0.5, 0.0, 0.0]
    assert draw(probs, 0.0, 0.4999, 0.5, JUST_UNDER_ONE) == [2, 2, 4, 4]
    assert draw([0.0, 1.0], 0.0, JUST_UNDER_ONE) == [1, 1]
    assert draw([1.0, 0.0], 0.0, JUST_UNDER_ONE) == [0, 0]


def test_rows_that_do_not_quite_sum_to_one_are_drawn_from_all_the_same() -> None:
    for total in (0.99, 1.01, 3.0):
        assert draw([total / 2, total / 2, 0.0], 0.0, 0.49, 0.51, JUST_UNDER_ONE) == [0, 0, 1, 1]


def test_small_probabilities_of_a_large_vocabulary_are_not_lost() -> None:
    size = 150_000
    probs = torch.full((1, size), 0.5 / (size - 1))
    probs[0, 0] = 0.5
    for share in (0.25, 0.5, 0.75, 0.999):
        (token,) = sample_tokens(probs, torch.tensor([0.5 + share / 2], dtype=torch.float64)).tolist()
        assert token == pytest.approx(share * size, abs=2)


# Accepting -----------------------------------------------------------------------------------------------


def accepted(tokens: list[int], q: list[list[float]], p: list[list[float]], uniforms: list[float]) -> int:
    drawn = torch.tensor(uniforms, dtype=torch.float64)
    return int(count_accepted(torch.tensor(tokens), rows(*q), rows(*p), drawn))


def test_a_token_is_accepted_with_the_ratio_of_its_probabilities() -> None:
    q, p = [[0.8, 0.2]], [[0.2, 0.8]]
    assert accepted([0], q, p, [0.2499]) == 1  # .2 / .8 = .25
    assert accepted([0], q, p, [0.2501]) == 0
    assert accepted([1], q, p, [JUST_UNDER_ONE]) == 1  # the ratio is over one


def test_a_token_that_the_target_forbids_is_never_accepted() -> None:
    assert accepted([0], [[1.0, 0.0]], [[0.0, 1.0]], [0.0]) == 0


def test_acceptance_ends_with_the_first_rejection() -> None:
    even = [[0.5, 0.5]] * 4
    p = [[0.5, 0.5], [0.5, 0.5], [0.1, 0.9], [0.5, 0.5]]
    assert accepted([0, 1, 0, 1], even, p, [0.3] * 4) == 2
    assert accepted([0, 1, 1, 1], even, p, [0.3] * 4) == 4
    p[0] = [0.0, 1.0]
    assert accepted([0, 1, 1, 1], even, p, [0.3] * 4) == 0


@pytest.mark.parametrize(
    ("matches", "length"),
    [([], 0), ([True], 1), ([False], 0), ([True, True, False, True], 2), ([True] * 3, 3)],
)
def test_leading_matches(matches: list[bool], length: int) -> None:
    assert int(leading_matches(torch.tensor(matches, dtype=torch.bool))) == length


def test_shapes_that_differ_are_named() -> None:
    square, other = torch.zeros(2, 3), torch.zeros(2, 4)
    with pytest.raises(ShapeMismatchError, match=r"target_logits \(2, 3\), draft_probs \(2, 4\)"):
        augmented_target_logits(square, other, transfer_strength=1)
    with pytest.raises(ShapeMismatchError, match=r"target_logits .*, draft_probs"):
        mixture_logits(square, other, target_weight=0.5)
    with pytest.raises(ShapeMismatchError, match=r"target_probs \(2, 3\), draft_probs \(2, 4\)"):
        residual_probs(square, other)
    with pytest.raises(ShapeMismatchError, match=r"augmented_probs \(2, 4\)"):
        residual_probs(square, square, augmented_probs=other)
    with pytest.raises(ShapeMismatchError, match="verify_probs"):
        count_accepted(torch.zeros(2, dtype=torch.long), square, other, torch.zeros(2))
    assert issubclass(ShapeMismatchError, ValueError)

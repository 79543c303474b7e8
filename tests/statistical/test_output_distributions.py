"""Sampled outputs against closed forms, for every acceptance rule.

Each case draws a fixed number of 3-token answers, seeded one by one, and compares their frequencies with the
exact distribution by a chi-square test at a significance of 1e-4; with fixed seeds a case holds or does not.
Every case also shows that the same test, at the same sample size, rejects a distribution that a plausible
mistake would produce.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import numpy as np
import pytest
from helpers.table_models import TableModel, decode_all, decoding, random_table
from helpers.word_constraint import WordConstraint
from scipy import stats

from rapid_integrations.config import SamplingParams, SpeculationParams
from rapid_integrations.engine.decoding.round import SpeculativeDecoder

pytestmark = pytest.mark.statistical
VOCAB = 3
LENGTH = 3
SAMPLES = 2500
SIGNIFICANCE = 1e-4
TARGET_PROMPT = (1, 2, 0)
DRAFTER_PROMPT = (2, 0)  # the same last two tokens: both models' tables are looked up alike
TARGET = random_table(VOCAB, seed=11)
DRAFTER = random_table(VOCAB, seed=12)
OUTPUTS = list(itertools.product(range(VOCAB), repeat=LENGTH))
# A constraint: no token twice in a row, and none that begins with 0.
ALLOWED = [output for output in OUTPUTS if output[0] and output[0] != output[1] != output[2]]

Row = np.ndarray
# From the answer so far to the probabilities of its next token.
Conditional = Callable[[tuple[int, ...]], Row]


def softmax(logits: Row) -> Row:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def warped(logits: Row, sampling: SamplingParams) -> Row:
    """Temperature, top-k, top-p as they are commonly defined, on one row."""
    logits = logits.astype(np.float64) / sampling.temperature
    if sampling.top_k is not None:
        logits[np.argsort(logits)[: -sampling.top_k]] = -np.inf
    if sampling.top_p is not None:
        order = np.argsort(-logits)
        before = np.cumsum(softmax(logits)[order]) - softmax(logits)[order]
        logits[order[before >= sampling.top_p]] = -np.inf
    return logits


@dataclasses.dataclass(frozen=True)
class ClosedForm:
    """Exact distributions of two table models, written independently of the package."""

    sampling: SamplingParams
    eta: float = 0.0
    tail_rule: str = "none"
    adaptive: bool = False
    target_weight: float = 1.0
    allowed: tuple[tuple[int, ...], ...] = tuple(OUTPUTS)

    def _logits(self, table: object, answer: tuple[int, ...]) -> Row:
        history = (*TARGET_PROMPT, *answer)
        logits = table[history[-2], history[-1]].numpy().copy()  # type: ignore[index]
        follow = {output[len(answer)] for output in self.allowed if output[: len(answer)] == answer}
        logits[[token not in follow for token in range(VOCAB)]] = -np.inf
        return warped(logits, self.sampling)

    def p(self, answer: tuple[int, ...]) -> Row:
        return softmax(self._logits(TARGET, answer))

    def q(self, answer: tuple[int, ...]) -> Row:
        return softmax(self._logits(DRAFTER, answer))

    def p_hat(self, answer: tuple[int, ...]) -> Row:
        p, q = self.p(answer), self.q(answer)
        shift = self.strength(answer) * (q - p)
        if self.tail_rule == "drafter":
            shift[q < 0.1 * q.max()] = 0
        weights = p * np.exp(shift)
        augmented = weights / weights.sum()
        if self.tail_rule == "target":
            augmented = np.where(augmented < 0.1 * augmented.max(), p, augmented)
        return augmented / augmented.sum()

    def mixture(self, answer: tuple[int, ...]) -> Row:
        return self.target_weight * self.p(answer) + (1 - self.target_weight) * self.q(answer)

    def strength(self, answer: tuple[int, ...]) -> float:
        """eta, or eta_t: lowered by the confidence of p, and by earlier differences of p and q."""
        if not self.adaptive:
            return self.eta
        overlaps = [1 - np.abs(self.p(answer[:i]) - self.q(answer[:i])).sum() / 2 for i in range(len(answer))]
        agreement = 1.0
        for each in overlaps:
            agreement = 0.9 * agreement + 0.1 * each
        return float(self.eta * (1 - self.p(answer).max()) * agreement**8)

    def autoregressive(self, conditional: Conditional) -> Row:
        return np.array(
            [
                np.prod([conditional(output[:i])[output[i]] for i in range(LENGTH)])
                if output in self.allowed
                else 0.0
                for output in OUTPUTS
            ]
        )

    def paper(self, num_draft_tokens: int) -> Row:
        """Alg. 1 with Eq. 10 and the bonus from p."""
        return self._with_bonus_from_p(
            num_draft_tokens, self.p_hat, lambda p, p_hat, q: np.maximum(p - p_hat, p - q)
        )

    def mixture_but_for_the_bonus(self, num_draft_tokens: int) -> Row:
        """The mixture's procedure, with a mistake: the bonus from p."""
        return self._with_bonus_from_p(num_draft_tokens, self.mixture, lambda p, mixture, q: mixture - q)

    def _with_bonus_from_p(
        self,
        num_draft_tokens: int,
        verify: Conditional,
        excess: Callable[[Row, Row, Row], Row],
        answer: tuple[int, ...] = (),
    ) -> Row:
        """Rounds, enumerated; the correction token is from norm(max(excess(p, verify, q), 0))."""
        again = functools.partial(self._with_bonus_from_p, num_draft_tokens, verify, excess)
        if len(answer) == LENGTH:
            return np.array([float(output == answer) for output in OUTPUTS])
        wanted = min(num_draft_tokens, LENGTH - len(answer) - 1)
        total = np.zeros(len(OUTPUTS))

        def follow(reached: tuple[int, ...], probability: float, drafted: int) -> None:
            nonlocal total
            p = self.p(reached)
            if drafted == wanted:
                for token in range(VOCAB):
                    if p[token] > 0:
                        total += probability * p[token] * again((*reached, token))
                return
            q, wanted_probs = self.q(reached), verify(reached)
            stands = np.minimum(1, np.divide(wanted_probs, q, out=np.ones(VOCAB), where=q > 0))
            rejected = 1 - (q * stands).sum()
            for token in range(VOCAB):
                if q[token] * stands[token] > 0:
                    follow((*reached, token), probability * q[token] * stands[token], drafted + 1)
            residual = np.maximum(excess(p, wanted_probs, q), 0)
            if rejected > 1e-12:
                residual /= residual.sum()
                for token in range(VOCAB):
                    if residual[token] > 0:
                        total += probability * rejected * residual[token] * again((*reached, token))

        follow(answer, 1.0, 0)
        return total


def counts_of(
    sampling: SamplingParams,
    speculation: SpeculationParams,
    *,
    first_seed: int = 0,
    allowed: list[tuple[int, ...]] | None = None,
) -> Row:
    decoder = SpeculativeDecoder(TableModel(TARGET), TableModel(DRAFTER))  # type: ignore[arg-type]
    batch = [
        decoding(
            TARGET_PROMPT,
            DRAFTER_PROMPT,
            dataclasses.replace(sampling, seed=first_seed + seed, max_new_tokens=LENGTH),
            speculation,
        )
        for seed in range(SAMPLES)
    ]
    if allowed is not None:
        constraint = WordConstraint(allowed, VOCAB, eos=-1)
        for sequence in batch:
            sequence.constraint = constraint
    found = {output: 0 for output in OUTPUTS}
    for output in decode_all(decoder, batch):
        found[tuple(output)] += 1
    return np.array([found[output] for output in OUTPUTS])


def p_value(counts: Row, expected: Row) -> float:
    """Chi-square; cells that are expected fewer than five times are merged, impossible ones must be empty."""
    assert expected.sum() == pytest.approx(1)
    if counts[expected < 1e-12].any():
        return 0.0
    wanted = expected * counts.sum()
    rare = wanted < 5
    observed = [*counts[~rare], counts[rare].sum()]
    wanted = np.array([*wanted[~rare], wanted[rare].sum()])
    keep = wanted > 0
    if wanted[-1] < 5 and keep[-1]:  # still rare together: merge into the smallest other cell
        smallest = int(np.argmin(wanted[:-1]))
        observed[smallest] += observed[-1]
        wanted[smallest] += wanted[-1]
        keep[-1] = False
    return float(stats.chisquare(np.array(observed)[keep], wanted[keep]).pvalue)


PLAIN = SamplingParams(temperature=1.0)
fixed = functools.partial(SpeculationParams, adaptive_transfer=False)
WARPED = {
    "cold": SamplingParams(temperature=0.6),
    "top-k": SamplingParams(temperature=1.3, top_k=2),
    "top-p": SamplingParams(temperature=1.0, top_p=0.8),
}


@pytest.mark.parametrize("num_draft_tokens", [1, 2, 3])
def test_lossless_outputs_are_distributed_as_the_target_s(num_draft_tokens: int) -> None:
    exact = ClosedForm(PLAIN, eta=5)
    counts = counts_of(PLAIN, SpeculationParams("lossless", num_draft_tokens=num_draft_tokens))
    assert p_value(counts, exact.autoregressive(exact.p)) > SIGNIFICANCE
    assert p_value(counts, exact.autoregressive(exact.q)) < SIGNIFICANCE
    assert p_value(counts, exact.autoregressive(exact.p_hat)) < SIGNIFICANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("eta", "tail_rule", "num_draft_tokens"),
    [
        (5.0, "none", 1),
        (5.0, "none", 3),
        (20.0, "none", 2),
        (5.0, "target", 2),
        (20.0, "target", 1),
        (20.0, "target", 3),
        (5.0, "drafter", 3),
        (20.0, "drafter", 2),
    ],
)
def test_augmented_outputs_are_distributed_as_sampling_from_the_augmented_target(
    eta: float, tail_rule: str, num_draft_tokens: int
) -> None:
    exact = ClosedForm(PLAIN, eta, tail_rule)
    counts = counts_of(PLAIN, fixed("augmented", eta, num_draft_tokens, tail_rule=tail_rule))
    assert p_value(counts, exact.autoregressive(exact.p_hat)) > SIGNIFICANCE
    assert p_value(counts, exact.autoregressive(exact.p)) < SIGNIFICANCE
    if tail_rule != "none":
        ruleless = ClosedForm(PLAIN, eta)
        assert p_value(counts, ruleless.autoregressive(ruleless.p_hat)) < SIGNIFICANCE
    # The bonus token from p instead of p̂, and Eq. 10's residual, are told apart.
    assert p_value(counts, exact.paper(num_draft_tokens)) < SIGNIFICANCE


@pytest.mark.parametrize(
    ("eta", "tail_rule", "num_draft_tokens"),
    [(10.0, "none", 1), (10.0, "none", 3), (40.0, "none", 2), (40.0, "target", 3), (40.0, "drafter", 1)],
)
def test_adaptive_outputs_are_distributed_as_sampling_with_the_strengths_of_the_formula(
    eta: float, tail_rule: str, num_draft_tokens: int
) -> None:
    exact = ClosedForm(PLAIN, eta, tail_rule, adaptive=True)
    counts = counts_of(PLAIN, SpeculationParams("augmented", eta, num_draft_tokens, tail_rule=tail_rule))
    assert p_value(counts, exact.autoregressive(exact.p_hat)) > SIGNIFICANCE
    assert p_value(counts, exact.autoregressive(exact.p)) < SIGNIFICANCE
    unlowered = ClosedForm(PLAIN, eta, tail_rule)
    assert p_value(counts, unlowered.autoregressive(unlowered.p_hat)) < SIGNIFICANCE


@pytest.mark.slow
@pytest.mark.parametrize(("weight", "num_draft_tokens"), [(0.5, 1), (0.5, 3), (0.8, 2), (0.3, 2)])
def test_mixture_outputs_are_distributed_as_sampling_from_the_mixture(
    weight: float, num_draft_tokens: int
) -> None:
    exact = ClosedForm(PLAIN, target_weight=weight)
    # Neither the transfer strength nor the tail rule has any effect.
    speculation = SpeculationParams(
        "mixture", 20.0, num_draft_tokens, tail_rule="target", mixture_weight=weight
    )
    counts = counts_of(PLAIN, speculation)
    assert p_value(counts, exact.autoregressive(exact.mixture)) > SIGNIFICANCE
    assert p_value(counts, exact.autoregressive(exact.p)) < SIGNIFICANCE
    assert p_value(counts, exact.autoregressive(exact.q)) < SIGNIFICANCE
    # The shares exchanged, and a bonus token from p, are told apart.
    swapped = ClosedForm(PLAIN, target_weight=1 - weight)
    if weight != 0.5:
        assert p_value(counts, swapped.autoregressive(swapped.mixture)) < SIGNIFICANCE
    assert p_value(counts, exact.mixture_but_for_the_bonus(num_draft_tokens)) < SIGNIFICANCE


@pytest.mark.slow
@pytest.mark.parametrize(("weight", "alone"), [(1.0, "p"), (0.0, "q")])
def test_the_ends_of_the_mixture_are_the_two_models(weight: float, alone: str) -> None:
    exact = ClosedForm(PLAIN)
    counts = counts_of(PLAIN, SpeculationParams("mixture", num_draft_tokens=2, mixture_weight=weight))
    assert p_value(counts, exact.autoregressive(getattr(exact, alone))) > SIGNIFICANCE


@pytest.mark.slow
@pytest.mark.parametrize(("eta", "num_draft_tokens"), [(5.0, 1), (5.0, 2), (20.0, 3)])
def test_paper_outputs_are_distributed_as_the_published_procedure_s(
    eta: float, num_draft_tokens: int
) -> None:
    exact = ClosedForm(PLAIN, eta)
    counts = counts_of(PLAIN, SpeculationParams("paper", eta, num_draft_tokens))
    assert p_value(counts, exact.paper(num_draft_tokens)) > SIGNIFICANCE
    assert p_value(counts, exact.autoregressive(exact.p)) < SIGNIFICANCE
    assert p_value(counts, exact.autoregressive(exact.p_hat)) < SIGNIFICANCE


def test_the_published_procedure_keeps_the_target_s_distribution_only_at_strength_zero() -> None:
    without = ClosedForm(PLAIN, eta=0)
    np.testing.assert_allclose(without.paper(2), without.autoregressive(without.p), atol=1e-12)
    shifted = ClosedForm(PLAIN, eta=20)
    distance = np.abs(shifted.paper(2) - shifted.autoregressive(shifted.p)).sum() / 2
    assert distance > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", WARPED)
def test_processors_act_before_p_q_and_the_augmented_target_are_formed(name: str) -> None:
    sampling = WARPED[name]
    exact = ClosedForm(sampling, eta=5)
    counts = counts_of(sampling, fixed("augmented", 5.0, 2))
    assert p_value(counts, exact.autoregressive(exact.p_hat)) > SIGNIFICANCE
    unwarped = ClosedForm(PLAIN, eta=5)
    assert p_value(counts, unwarped.autoregressive(unwarped.p_hat)) < SIGNIFICANCE


@pytest.mark.slow
def test_processors_act_before_the_two_are_mixed() -> None:
    sampling = WARPED["top-k"]
    exact = ClosedForm(sampling, target_weight=0.4)
    counts = counts_of(sampling, SpeculationParams("mixture", num_draft_tokens=2, mixture_weight=0.4))
    assert p_value(counts, exact.autoregressive(exact.mixture)) > SIGNIFICANCE
    unwarped = ClosedForm(PLAIN, target_weight=0.4)
    assert p_value(counts, unwarped.autoregressive(unwarped.mixture)) < SIGNIFICANCE


def test_unseeded_lossless_sampling_has_the_target_s_distribution_too() -> None:
    # Without a seed the bonus token is drawn from p at once, not as a draft; the seeds here fix the numbers.
    exact = ClosedForm(PLAIN)
    speculation = SpeculationParams("lossless", num_draft_tokens=2)
    decoder = SpeculativeDecoder(TableModel(TARGET), TableModel(DRAFTER))  # type: ignore[arg-type]
    batch = [
        decoding(
            TARGET_PROMPT,
            DRAFTER_PROMPT,
            dataclasses.replace(PLAIN, seed=seed, max_new_tokens=LENGTH),
            speculation,
        )
        for seed in range(SAMPLES)
    ]
    for sequence in batch:
        sequence.sampling = dataclasses.replace(sequence.sampling, seed=None)
    outputs = [tuple(output) for output in decode_all(decoder, batch)]
    counts = np.array([outputs.count(output) for output in OUTPUTS])
    assert p_value(counts, exact.autoregressive(exact.p)) > SIGNIFICANCE
    assert p_value(counts, exact.autoregressive(exact.q)) < SIGNIFICANCE


@pytest.mark.slow
def test_a_constraint_renormalises_p_and_q_before_the_augmented_target_is_formed() -> None:
    allowed = tuple(ALLOWED)
    for acceptance, eta in (("lossless", 0.0), ("augmented", 5.0)):
        exact = ClosedForm(PLAIN, eta, allowed=allowed)
        speculation = fixed(acceptance, eta, 2)  # type: ignore[arg-type]
        counts = counts_of(PLAIN, speculation, allowed=ALLOWED)
        assert p_value(counts, exact.autoregressive(exact.p_hat)) > SIGNIFICANCE
        other = ClosedForm(PLAIN, 5.0 - eta, allowed=allowed)
        assert p_value(counts, other.autoregressive(other.p_hat)) < SIGNIFICANCE


@pytest.mark.slow
def test_a_constraint_renormalises_p_and_q_before_they_are_mixed() -> None:
    exact = ClosedForm(PLAIN, target_weight=0.4, allowed=tuple(ALLOWED))
    speculation = SpeculationParams("mixture", num_draft_tokens=2, mixture_weight=0.4)
    counts = counts_of(PLAIN, speculation, allowed=ALLOWED)
    assert p_value(counts, exact.autoregressive(exact.mixture)) > SIGNIFICANCE
    assert p_value(counts, exact.autoregressive(exact.p)) < SIGNIFICANCE
    assert p_value(counts, exact.autoregressive(exact.q)) < SIGNIFICANCE


@pytest.mark.slow
def test_a_constraint_on_the_published_procedure_leaves_it_the_published_procedure() -> None:
    exact = ClosedForm(PLAIN, 5.0, allowed=tuple(ALLOWED))
    counts = counts_of(PLAIN, SpeculationParams("paper", 5.0, 2), allowed=ALLOWED)
    assert p_value(counts, exact.paper(2)) > SIGNIFICANCE
    assert p_value(counts, exact.autoregressive(exact.p)) < SIGNIFICANCE

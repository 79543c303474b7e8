"""Metrics by name: the score in [0, 1] of an answer, given its references.

SQuAD's metrics come from torchmetrics and ROUGE from rouge-score, both in the extra ``eval``. Each library is
imported by the metric that needs it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from rapid_integrations.errors import ConfigurationError

Metric = Callable[[str, Sequence[str]], float]

METRIC_NAMES = (
    "exact",
    "squad-exact",
    "f1",
    "contains",
    "contains-all",
    "choice",
    "stated-choice",
    "rouge-l",
    "rouge-lsum",
)
GRADED_METRICS = frozenset({"f1", "contains-all", "rouge-l", "rouge-lsum"})
"""Metrics with scores between 0 and 1."""

# A single letter that does not begin a word.
_LETTER = r"\(?([A-H])(?![A-Za-z0-9'’-])"
_FIRST_LETTER = re.compile(rf"\W*{_LETTER}")
_ANNOUNCED = re.compile(r"(?:answer is|answer|option is)\s*:?\s*", re.IGNORECASE)
_LONE_LETTER = re.compile(rf"(?<![A-Za-z0-9'’-]){_LETTER}")
_STATED = (re.compile(r"The correct answer is \(([A-D])\)"), re.compile(r"The correct answer is ([A-D])"))


def make_metric(name: str) -> Metric:
    """Find a metric by its name. Most metrics compare the answer with its best reference.

    ==================  =============================================================================
    ``exact``           :func:`exact_match`: the whole answer is equal to a reference
    ``squad-exact``     the same after SQuAD's normalisation (case, punctuation, articles, whitespace)
    ``f1``              SQuAD's token F1, of the best reference (arXiv:1606.05250, section 6.1)
    ``contains``        a reference occurs in the answer, ignoring case (RULER's match for questions)
    ``contains-all``    share of the references that occur in the answer (RULER's, arXiv:2404.06654)
    ``choice``          :func:`choice_match`: the chosen letter is a reference
    ``stated-choice``   :func:`stated_choice_match`: the same, only in LongBench v2's wording
    ``rouge-l``         F-measure of ROUGE-L, of the best reference, without stemming
    ``rouge-lsum``      the same by lines, each of which is a sentence of the summary
    ==================  =============================================================================

    Args:
        name: One of :data:`METRIC_NAMES`.

    Raises:
        ConfigurationError: The name is unknown, or the metric's library is not installed.
    """
    match name:
        case "exact":
            return exact_match
        case "squad-exact":
            return _squad("exact_match")
        case "f1":
            return _squad("f1")
        case "contains":
            return lambda answer, references: float(_contained(answer, references) > 0)
        case "contains-all":
            return lambda answer, references: _contained(answer, references) / max(1, len(references))
        case "choice":
            return choice_match
        case "stated-choice":
            return stated_choice_match
        case "rouge-l":
            return _rouge("rougeL")
        case "rouge-lsum":
            return _rouge("rougeLsum")
    raise ConfigurationError(f"there is no metric {name!r}: allowed are {', '.join(METRIC_NAMES)}.")


def exact_match(answer: str, references: Sequence[str]) -> bool:
    """Whether the answer is equal to a reference, with each run of whitespace as one space."""
    normalised = " ".join(answer.split())
    return any(normalised == " ".join(reference.split()) for reference in references)


def choice_match(answer: str, references: Sequence[str]) -> bool:
    """Whether an answer chooses a reference among options A to H.

    The letter is searched as in ∞Bench's En.MC (arXiv:2402.13718): at the start of the answer, then after
    "answer is", "answer:" or "option is", then anywhere. A letter that begins a word ("Because") is not an
    option. The text of an option also counts, as the whole answer or after those words.

    Args:
        answer: The model's answer.
        references: The correct letter, and the correct option's text if it is accepted.
    """
    if any(_normalised(answer) == _normalised(reference) for reference in references):
        return True
    if first := _FIRST_LETTER.match(answer):
        return first.group(1) in references
    if announced := _ANNOUNCED.search(answer):
        rest = answer[announced.end() :].lstrip("*_\"' ")
        if letter := _FIRST_LETTER.match(rest):
            return letter.group(1) in references
        return any(_normalised(rest).startswith(_normalised(r)) for r in references if len(r) > 1)
    lone = _LONE_LETTER.search(answer)
    return lone is not None and lone.group(1) in references


def stated_choice_match(answer: str, references: Sequence[str]) -> bool:
    """Whether "The correct answer is (X)" names a reference; LongBench v2's extraction (arXiv:2412.15204).

    Asterisks are ignored, and the brackets may be missing. Other wordings count as wrong.

    Args:
        answer: The model's answer.
        references: The correct letter, A to D.
    """
    plain = answer.replace("*", "")
    stated = next((match for pattern in _STATED if (match := pattern.search(plain))), None)
    return stated is not None and stated.group(1) in references


def _contained(answer: str, references: Sequence[str]) -> int:
    lowered = answer.lower()
    return sum(reference.lower() in lowered for reference in references)


def _normalised(text: str) -> str:
    return " ".join(text.split()).rstrip(".").lower()


def _squad(figure: str) -> Metric:
    try:
        from torchmetrics.functional.text import squad
    except ImportError as error:
        raise _missing("torchmetrics", error) from error

    def score(answer: str, references: Sequence[str]) -> float:
        target: dict[str, Any] = {
            "answers": {"text": list(references), "answer_start": [0] * len(references)},
            "id": "",
        }
        return float(squad({"prediction_text": answer, "id": ""}, target)[figure]) / 100

    return score


def _rouge(kind: str) -> Metric:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise _missing("rouge-score", error) from error
    scorer = RougeScorer([kind], use_stemmer=False)
    return lambda answer, references: max(
        (float(scorer.score(reference, answer)[kind].fmeasure) for reference in references), default=0.0
    )


def _missing(package: str, error: ImportError) -> ConfigurationError:
    return ConfigurationError(
        f"this metric needs {package} ({error}): pip install 'rapid-integrations[eval]', or use one of "
        f"{', '.join(METRIC_NAMES)}."
    )

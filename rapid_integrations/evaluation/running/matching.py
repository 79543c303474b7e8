"""Comparing methods at equal acceptance, by tuning how far each trusts its drafter.

A method that accepts more draft tokens is faster, and further from the target. To compare two methods with
the same drafter, one of them is tuned first, on other questions than those it is measured on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rapid_integrations.config import GenerationOptions
from rapid_integrations.demo import PROMPT_TEMPLATE
from rapid_integrations.engine.stats import RapidStats
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation.methods.choice import make_method
from rapid_integrations.evaluation.methods.engine_methods import ENGINE_METHODS, EngineMethod
from rapid_integrations.evaluation.methods.method import Method
from rapid_integrations.evaluation.running.runner import evaluate
from rapid_integrations.evaluation.tasks.retrieval_quality import RetrievalQuality
from rapid_integrations.evaluation.tasks.ruler import RulerSource
from rapid_integrations.evaluation.tasks.sources import DemoSource, TaskSource
from rapid_integrations.evaluation.tasks.task import Task
from rapid_integrations.pipeline import RapidPipeline

# From the lowest to the highest acceptance. Larger strengths change little (the paper uses 5 to 50,
# arXiv:2502.20330 section 4.1).
_DIALS = {"mixture_weight": (1.0, 0.0), "transfer_strength": (0.0, 100.0)}
# A length chosen per round would make acceptance depend on the machine's speed.
_DRAFT_TOKENS = 6
_OTHER_SEED = 100_000


@dataclass(frozen=True, slots=True)
class Match:
    """A method tuned to another's acceptance.

    Attributes:
        method: The tuned method.
        option: The flat option that was tuned.
        value: The value of the option.
        acceptance: The tuned method's acceptance rate on the calibration questions.
        wanted: The other method's acceptance rate.
    """

    method: EngineMethod
    option: str
    value: float
    acceptance: float
    wanted: float

    def as_dict(self) -> dict[str, Any]:
        """JSON data."""
        return {self.option: self.value, "acceptance": self.acceptance, "wanted": self.wanted}


def match_acceptance(
    pipeline: RapidPipeline,
    tasks: Sequence[Task],
    method: EngineMethod,
    like: Method,
    *,
    options: GenerationOptions | None = None,
    retrieval: RetrievalQuality = "natural",
    prompt_template: str = PROMPT_TEMPLATE,
    steps: int = 8,
) -> Match:
    """Tune a method's trust in the drafter until its acceptance equals another method's, by bisection.

    ``mixture_weight`` is searched in [0, 1], ``transfer_strength`` in [0, 100]. If the other method's
    acceptance is outside the range of these, the end of the range is used: compare ``acceptance`` with
    ``wanted``. Greedy decoding changes in jumps, so the two may differ by some points even inside the range.

    Both methods draft ``num_draft_tokens``, or 6 if that is chosen per round.

    Args:
        pipeline: The models.
        tasks: Calibration questions, different from those that the methods are compared on.
        method: The method to tune; needs a ``dial``.
        like: The method with the wanted acceptance.
        options: Replace the pipeline's options.
        retrieval: As in :func:`evaluate`.
        prompt_template: As in :func:`evaluate`.
        steps: Number of halvings of the range, at least 1.

    Raises:
        ConfigurationError: The method has no dial, the other drafts nothing, or a number is out of range.
        RapidError: As :func:`evaluate`.
    """
    if method.dial is None:
        raise ConfigurationError(
            f"the method {method.name!r} cannot be tuned: no option sets how far it trusts the drafter."
        )
    if not like.speculates:
        raise ConfigurationError(f"the method {like.name!r} drafts nothing: it has no acceptance to match.")
    if steps < 1:
        raise ConfigurationError(f"steps={steps}: at least 1 is needed.")
    options = options or pipeline.options
    if options.speculation.num_draft_tokens is None:
        options = options.override(num_draft_tokens=_DRAFT_TOKENS)

    def acceptance(asked: Method) -> float:
        report = evaluate(
            pipeline, tasks, [asked], retrieval=retrieval, options=options, prompt_template=prompt_template
        )
        return RapidStats.pooled(record.stats for record in report.answers).acceptance_rate

    wanted = acceptance(like)
    option = method.dial
    value, rate = _bisect(lambda x: acceptance(_tuned(method, option, x)), wanted, *_DIALS[option], steps)
    return Match(_tuned(method, option, value), option, value, rate, wanted)


def match_methods(
    pipeline: RapidPipeline,
    source: TaskSource,
    names: Sequence[str],
    like: str,
    *,
    retrieval: RetrievalQuality = "natural",
    num_questions: int = 10,
) -> tuple[list[Method], list[Match]]:
    """Make methods, tuned to one method's acceptance where they can be, on questions of another seed.

    Args:
        pipeline: The models.
        source: The source of the questions that the methods will be measured on.
        names: The names of the methods.
        like: The name of the method with the wanted acceptance; it is not changed.
        retrieval: The quality of retrieval.
        num_questions: Calibration questions at each length, of each subset.

    Returns:
        The methods in the order of their names, and the tuned ones.

    Raises:
        ConfigurationError: As :func:`match_acceptance` and :func:`calibration_source`, or no method can be
            tuned.
    """
    methods = [make_method(name) for name in names]
    goal = make_method(like)
    tunable = [m for m in methods if isinstance(m, EngineMethod) and m.dial and m.name != like]
    if not tunable:
        raise ConfigurationError(
            f"none of the methods {', '.join(names)} can be tuned to the acceptance of {like!r}: name one or "
            f"more of {', '.join(m.name for m in ENGINE_METHODS if m.dial and m.name != like)}."
        )
    tasks = list(calibration_source(source, num_questions=num_questions).tasks(pipeline))
    matches = [match_acceptance(pipeline, tasks, m, goal, retrieval=retrieval) for m in tunable]
    tuned: dict[str, Method] = {match.method.name: match.method for match in matches}
    return [tuned.get(method.name, method) for method in methods], matches


def calibration_source(source: TaskSource, *, num_questions: int) -> TaskSource:
    """A source of other questions of the same kind.

    Args:
        source: A source of generated questions.
        num_questions: Questions at each length, of each subset.

    Raises:
        ConfigurationError: The questions come from a file, so there are no others.
    """
    if not isinstance(source, DemoSource | RulerSource):
        raise ConfigurationError(
            f"acceptance cannot be matched for the task {source.name!r}: methods are tuned on other "
            "questions than they are measured on, and only --task demo and ruler generate more. Tune there, "
            "and give --mixture-weight and --transfer-strength here."
        )
    return replace(source, seed=source.seed + _OTHER_SEED, questions=num_questions)


def _tuned(method: EngineMethod, option: str, value: float) -> EngineMethod:
    return replace(method, options={**method.options, option: value})


def _bisect(
    acceptance: Callable[[float], float], wanted: float, low: float, high: float, steps: int
) -> tuple[float, float]:
    """The tried value with the acceptance nearest to ``wanted``, and that acceptance.

    Args:
        acceptance: Measures the acceptance of a value; increases from ``low`` to ``high``, apart from noise.
        wanted: The wanted acceptance.
        low: The value with the lowest acceptance.
        high: The value with the highest acceptance.
        steps: Number of halvings of the range.
    """
    tried = {value: acceptance(value) for value in (low, high)}
    if tried[low] < wanted < tried[high]:
        for _ in range(steps):
            middle = (low + high) / 2
            tried[middle] = acceptance(middle)
            if tried[middle] < wanted:
                low = middle
            else:
                high = middle
    # The first of equal ones is at the end of the range with less trust in the drafter.
    return min(tried.items(), key=lambda item: abs(item[1] - wanted))

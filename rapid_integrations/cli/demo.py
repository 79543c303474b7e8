"""``rapid demo``: the bundled pair, or models that were named, answer questions about a long document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from rapid_integrations.cli.ask import ASK_TEMPLATE
from rapid_integrations.cli.options import AnswerOptions


@dataclass(frozen=True, kw_only=True)
class DemoOptions(AnswerOptions):
    """The options of ``rapid demo``."""

    questions: Annotated[
        int, typer.Option(min=1, max=12, help="How many questions to ask: up to 12 with --target, else 10.")
    ] = 6


def demo(options: DemoOptions) -> None:
    """Ask about a long document, and compare RAPID with other ways to answer.

    The bundled pair answers about a generated document, and --target about an English handbook.
    """
    generation = options.generation()
    options.check_retriever()
    from rapid_integrations.evaluation.showcase import HANDBOOK_OPTIONS, show, show_handbook
    from rapid_integrations.model_choice import quiet_libraries

    with quiet_libraries():
        if options.target is None:
            show(options.load_pipeline(generation), options.questions)
        else:
            pipeline = options.load_pipeline({**HANDBOOK_OPTIONS, **generation})
            show_handbook(pipeline, options.questions, ASK_TEMPLATE)

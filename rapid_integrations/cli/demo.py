"""``rapid demo``: the bundled pair answers questions about a long document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """The options of ``rapid demo``."""

    questions: Annotated[int, typer.Option(min=1, max=10, help="How many questions to ask.")] = 6


def demo(options: DemoOptions) -> None:
    """Ask the bundled pair about a long document and compare RAPID with other ways to answer."""
    from rapid_integrations.evaluation.showcase import show
    from rapid_integrations.model_choice import quiet_libraries

    with quiet_libraries():
        show(options.questions)

"""The page's plots, as PNG files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from rapid_integrations.evaluation.page.summary import PLAIN, Row, SplitGroup
from rapid_integrations.evaluation.plotting import drawn, legend, scale
from rapid_integrations.evaluation.tables import context_label, method_label

# Okabe and Ito's palette, which is safe for colour-blind readers.
_COLOURS = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#d55e00", "#cc79a7", "#0072b2", "#999933")
_MARKERS = "osD^vPX*"
_INCHES = (7.0, 4.0)
_LABEL_WIDTH = 14  # characters per line of a group's name, so that four names fit side by side


class Plots:
    """Draws plots into a folder. Each method has the same colour in all of them.

    Args:
        folder: An existing folder.
        methods: The names of all methods, in the order of the colours.
    """

    def __init__(self, folder: Path, methods: Sequence[str]) -> None:
        self._folder = folder
        self._colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(methods)}

    def accuracy(self, file_name: str, rows: Sequence[Sequence[Row]]) -> str:
        """Plot scores over context, with 95 % intervals, and return the file's name."""

        def point(row: Row) -> tuple[float, float, float]:
            shares = row.result.accuracy
            return shares.value * 100, shares.low * 100, shares.high * 100

        return self._over_context(
            file_name, rows, point, title="Score, with 95 % intervals", ylabel="%", top=102
        )

    def acceptance(self, file_name: str, rows: Sequence[Sequence[Row]]) -> str:
        """Plot the acceptance rate over context, and return the file's name."""

        def point(row: Row) -> tuple[float, float, float] | None:
            rate = row.result.acceptance_rate
            return None if rate is None else (rate * 100,) * 3

        return self._over_context(file_name, rows, point, title="Accepted draft tokens", ylabel="%", top=102)

    def speed(self, file_name: str, rows: Sequence[Sequence[Row]]) -> str:
        """Plot decoding speed relative to long context, and return the file's name."""

        def point(row: Row) -> tuple[float, float, float] | None:
            return None if row.speed_up is None else (row.speed_up,) * 3

        return self._over_context(
            file_name, rows, point, title="Decoding speed over long context", ylabel="×", line=1
        )

    def split(self, file_name: str, groups: Sequence[SplitGroup]) -> str:
        """Plot correct answers by the outcome of long context and retrieval, and return the file's name."""
        methods = [name for name in self._colours if any(name in group.right for group in groups)]
        width = 0.8 / len(methods)

        def draw(axes: Any) -> None:
            for index, method in enumerate(methods):
                shares = [
                    (at, group.right[method]) for at, group in enumerate(groups) if method in group.right
                ]
                axes.bar(
                    [at + (index - (len(methods) - 1) / 2) * width for at, _ in shares],
                    [share.value * 100 for _, share in shares],
                    width * 0.9,
                    yerr=[
                        [max(0.0, share.value - share.low) * 100 for _, share in shares],
                        [max(0.0, share.high - share.value) * 100 for _, share in shares],
                    ],
                    capsize=3,
                    ecolor="#444444",
                    color=self._colours[method],
                    label=method_label(method),
                )
            names = [f"{fill(group.name, _LABEL_WIDTH)}\n({group.questions})" for group in groups]
            axes.set_xticks(range(len(groups)), names, fontsize="small")
            axes.set(ylabel="right, %", title="Where long context and retrieval are right or wrong")
            axes.set_ylim(0, 102)
            legend(axes)

        return drawn(self._folder / file_name, draw, inches=_INCHES).name

    def _over_context(
        self,
        file_name: str,
        rows: Sequence[Sequence[Row]],
        point: Callable[[Row], tuple[float, float, float] | None],
        *,
        title: str,
        ylabel: str,
        top: float | None = None,
        line: float | None = None,
    ) -> str:
        """Plot a line for each method. A point is a value with its lower and upper end."""

        def draw(axes: Any) -> None:
            for index, (method, colour) in enumerate(self._colours.items()):
                points = [
                    (row.result.context, ends)
                    for context_rows in rows
                    for row in context_rows
                    if row.result.method == method and (ends := point(row)) is not None
                ]
                if points and not (line is not None and method == PLAIN):
                    values = [value for _, (value, _, _) in points]
                    below = [max(0.0, value - low) for _, (value, low, _) in points]
                    above = [max(0.0, high - value) for _, (value, _, high) in points]
                    axes.errorbar(
                        # Points side by side, because equal values would hide each other.
                        [context * (1 + 0.025 * index) for context, _ in points],
                        values,
                        yerr=[below, above] if any(below + above) else None,
                        marker=_MARKERS[index % len(_MARKERS)],
                        capsize=3,
                        color=colour,
                        label=method_label(method),
                    )
            if line is not None:
                axes.axhline(line, color="black", linewidth=0.8)
            # A task without a nominal length has context 0, which a logarithmic axis cannot show.
            contexts = sorted({row.result.context for context_rows in rows for row in context_rows})
            if contexts[0] > 0:
                scale(axes, contexts, context_label)
            else:
                axes.set_xticks(contexts, [context_label(context) for context in contexts])
            axes.set(xlabel="context, tokens", ylabel=ylabel, title=title)
            axes.set_ylim(0, top)
            legend(axes)

        return drawn(self._folder / file_name, draw, inches=_INCHES).name

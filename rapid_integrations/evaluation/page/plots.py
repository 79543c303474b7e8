"""The page's plots, as PNG files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from rapid_integrations.evaluation.page.summary import PLAIN, Row, SplitGroup
from rapid_integrations.evaluation.plotting import drawn, legend, scale
from rapid_integrations.evaluation.tables import context_label, method_label

# Okabe and Ito's colours, told apart with every kind of colour vision.
_COLOURS = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#d55e00", "#cc79a7", "#0072b2", "#999933")
_MARKERS = "osD^vPX*"
_INCHES = (7.0, 4.0)
_LABEL_WIDTH = 14  # letters of a group's name in a line: four stand side by side


class Plots:
    """Draws into a folder; each method keeps its colour.

    Args:
        folder: Must be there.
        methods: All methods, in their order.
    """

    def __init__(self, folder: Path, methods: Sequence[str]) -> None:
        self._folder = folder
        self._colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(methods)}

    def accuracy(self, name: str, rows: Sequence[Sequence[Row]]) -> str:
        """Scores over context, with 95 % intervals; the file's name."""

        def point(row: Row) -> tuple[float, float, float]:
            shares = row.result.accuracy
            return shares.value * 100, shares.low * 100, shares.high * 100

        return self._over_context(name, rows, point, title="Score, with 95 % intervals", ylabel="%", top=102)

    def acceptance(self, name: str, rows: Sequence[Sequence[Row]]) -> str:
        """Accepted over drafted tokens by context; the file's name."""

        def point(row: Row) -> tuple[float, float, float] | None:
            rate = row.result.acceptance_rate
            return None if rate is None else (rate * 100,) * 3

        return self._over_context(name, rows, point, title="Accepted draft tokens", ylabel="%", top=102)

    def speed(self, name: str, rows: Sequence[Sequence[Row]]) -> str:
        """Decoding speed over that of long context; the file's name."""

        def point(row: Row) -> tuple[float, float, float] | None:
            return None if row.speed_up is None else (row.speed_up,) * 3

        return self._over_context(
            name, rows, point, title="Decoding speed over long context", ylabel="×", line=1
        )

    def split(self, name: str, groups: Sequence[SplitGroup]) -> str:
        """Shares of right answers where long context and retrieval agree or not; the file's name."""
        methods = [each for each in self._colours if any(each in group.right for group in groups)]
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

        return drawn(self._folder / name, draw, inches=_INCHES).name

    def _over_context(
        self,
        name: str,
        rows: Sequence[Sequence[Row]],
        point: Callable[[Row], tuple[float, float, float] | None],
        *,
        title: str,
        ylabel: str,
        top: float | None = None,
        line: float | None = None,
    ) -> str:
        """A line for each method through its points: values with their lower and upper ends."""

        def draw(axes: Any) -> None:
            for place, (method, colour) in enumerate(self._colours.items()):
                found = [
                    (row.result.context, ends)
                    for each in rows
                    for row in each
                    if row.result.method == method and (ends := point(row)) is not None
                ]
                if found and not (line is not None and method == PLAIN):
                    values = [value for _, (value, _, _) in found]
                    below = [max(0.0, value - low) for _, (value, low, _) in found]
                    above = [max(0.0, high - value) for _, (value, _, high) in found]
                    axes.errorbar(
                        # Side by side, so that equal values do not hide each other.
                        [context * (1 + 0.025 * place) for context, _ in found],
                        values,
                        yerr=[below, above] if any(below + above) else None,
                        marker=_MARKERS[place % len(_MARKERS)],
                        capsize=3,
                        color=colour,
                        label=method_label(method),
                    )
            if line is not None:
                axes.axhline(line, color="black", linewidth=0.8)
            # A task without a nominal length stands at 0, where a logarithm has no place.
            contexts = sorted({row.result.context for each in rows for row in each})
            if contexts[0] > 0:
                scale(axes, contexts, context_label)
            else:
                axes.set_xticks(contexts, [context_label(context) for context in contexts])
            axes.set(xlabel="context, tokens", ylabel=ylabel, title=title)
            axes.set_ylim(0, top)
            legend(axes)

        return drawn(self._folder / name, draw, inches=_INCHES).name

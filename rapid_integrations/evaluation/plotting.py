"""What all plots share: PNG files, axes and legends. Only this module imports matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from rapid_integrations.errors import ConfigurationError

_INCHES = (8.5, 4.2)
_DPI = 140


def check_plotting(option: str, extra: str) -> None:
    """Make sure that plots can be drawn, before anything is measured.

    Args:
        option: What asks for plots.
        extra: The extra of this package that brings matplotlib with it.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    try:
        import_module("matplotlib")
    except ImportError as error:
        raise ConfigurationError(
            f"{option} needs matplotlib ({error}): pip install 'rapid-integrations[{extra}]', or leave it "
            "out."
        ) from error


def drawn(path: Path, draw: Callable[[Any], None], *, inches: tuple[float, float] = _INCHES) -> Path:
    """Draw one plot into a PNG file.

    Args:
        path: The file.
        draw: Draws on the axes it is given.
        inches: Width and height.

    Raises:
        OSError: The file cannot be written.
    """
    # Without pyplot nothing is kept, and no display is asked for.
    figure = import_module("matplotlib.figure").Figure(figsize=inches, layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=_DPI)
    return path


def legend(axes: Any) -> None:
    """Beside the plot, where it hides no line."""
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def scale(axes: Any, values: Sequence[int], label: Callable[[int], str]) -> None:
    """A logarithmic axis with a mark at each value."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [label(value) for value in values])
    axes.minorticks_off()

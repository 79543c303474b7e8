"""Shared parts of all plots: PNG files, axes and legends. Only this module imports matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from rapid_integrations.errors import ConfigurationError

_INCHES = (8.5, 4.2)
_DPI = 140


def check_plotting(option: str, extra: str) -> None:
    """Check that plots can be drawn, before anything is measured.

    Args:
        option: The option that requests plots, for the error message.
        extra: The extra of this package that installs matplotlib.

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
        draw: Draws on the axes that it is given.
        inches: Width and height.

    Returns:
        The file.

    Raises:
        OSError: The file cannot be written.
    """
    # pyplot would keep the figure and require a display.
    figure = import_module("matplotlib.figure").Figure(figsize=inches, layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=_DPI)
    return path


def legend(axes: Any) -> None:
    """Put the legend beside the plot, where it hides no line."""
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def scale(axes: Any, values: Sequence[int], label: Callable[[int], str]) -> None:
    """Make the horizontal axis logarithmic, with a tick at each value."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [label(value) for value in values])
    axes.minorticks_off()

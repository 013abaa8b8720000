"""How all figures look: axes, legends and scales, without pyplot and without global settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sphereopt.report.svg import GRID, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["dress", "log_scale", "make_axes", "with_legend"]


def make_axes(ylabel: str, size: tuple[float, float] = (4.6, 3.1)) -> tuple[Figure, Axes]:
    """Return an empty figure over steps.

    Args:
        ylabel: What the figure shows, with its unit.
        size: Width and height, in inches.

    Returns:
        Figure and axes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel(ylabel, color=INK)
    dress(axes, 9)
    axes.margins(x=0.02)
    return figure, axes


def dress(axes: Axes, labelsize: int) -> None:
    """Give axes a quiet grid and two spines.

    Args:
        axes: What to dress.
        labelsize: Of the ticks, in points.
    """
    axes.tick_params(which="both", color=GRID, labelcolor=INK, labelsize=labelsize)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)


def with_legend(figure: Figure, axes: Axes) -> Figure:
    """Return the figure with its legend above the axes, where it hides nothing."""
    labels = axes.get_legend_handles_labels()[1]
    if labels:
        axes.legend(
            frameon=False,
            labelcolor=INK,
            fontsize=9,
            ncols=3 if len(labels) <= 3 else 2,
            loc="lower right",
            bbox_to_anchor=(1.01, 1.0),
            handlelength=2.2,
            columnspacing=1.4,
            borderaxespad=0.2,
        )
    return figure


def log_scale(axes: Axes, low: float, high: float) -> None:
    """Make the vertical axis logarithmic, from ``low`` to ``high``, with plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.set_ylim(low, high)
    plain: Any = "{x:.3g}"
    axes.yaxis.set_major_formatter(plain)
    if high > 50 * low:
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
        axes.yaxis.set_minor_formatter(plain)

"""Two runs on the same axes, and where they part, layer by layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from sphereopt.report.axes import make_axes, with_legend
from sphereopt.report.drawing import (
    ROWS,
    as_columns,
    count_steps,
    grouped,
    marks,
    name_rows,
    set_scale,
)
from sphereopt.report.series import Array, averaged, parts, quantiles
from sphereopt.report.svg import COLOURS, GRID, INK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sphereopt.report.history import History

__all__ = ["draw_metrics", "draw_ratios", "draw_two"]

_POINTS = 500
#: Solid and dashed, blue and orange: told apart without colours, and with any eyes.
_STYLES: tuple[dict[str, Any], ...] = (
    {"color": COLOURS["sgd"], "linewidth": 2},
    {"color": COLOURS["free"], "linewidth": 2, "linestyle": (0, (5, 2))},
)
#: From "b is smaller" to "b is larger"; nothing in between lets the ground through, light or dark.
_SMALLER, _LARGER, _ABSENT = (0.0, 0.45, 0.7), (0.84, 0.37, 0.0), (0.5, 0.5, 0.5, 0.4)
#: The colour scale ends at a factor between these: less would show noise, more hide the rest.
_LEAST, _MOST = 1.25, 64.0


def draw_two(a: History, b: History, names: tuple[str, ...], probe: str, unit: str) -> Figure:
    """Draw the median layer of both runs, each with a band that holds 80 % of the layers.

    Args:
        a: The first log.
        b: The second.
        names: Layers of both.
        probe: What to draw.
        unit: Label of the vertical axis.

    Returns:
        A figure over the steps that each run logged.
    """
    figure, axes = make_axes(unit)
    count_steps(axes)
    seen = []
    for log, label, style in zip((a, b), "ab", _STYLES, strict=True):
        values = log.of(probe)[:, [log.names.index(name) for name in names]]
        starts = parts(len(values), _POINTS)
        steps, lines = averaged(log.steps.astype(float), starts), averaged(values, starts)
        low, middle, high = quantiles(lines, (0.1, 0.5, 0.9))
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
        line = axes.plot(steps, middle, label=label, **style, **marks(steps))
        line[0].set_gid(f"run-{label}")
        seen += [low, middle, high]
    set_scale(axes, np.concatenate(seen), None)
    return with_legend(figure, axes)


def draw_metrics(a: History, b: History, name: str) -> Figure:
    """Draw one metric of both runs; see :func:`draw_two`."""
    figure, axes = make_axes(name.replace("$", r"\$"))
    count_steps(axes)
    seen = []
    for log, label, style in zip((a, b), "ab", _STYLES, strict=True):
        there = np.flatnonzero(np.isfinite(log.metrics[name]))
        starts = parts(len(there), _POINTS)
        if len(there):
            steps = averaged(log.steps[there].astype(float), starts)
            values = averaged(log.metrics[name][there], starts)
            axes.plot(steps, values, label=label, **style, **marks(steps))
            seen.append(values)
    if seen:
        set_scale(axes, np.concatenate(seen), None)
    return with_legend(figure, axes)


def draw_ratios(steps: Array, names: tuple[str, ...], logs: Array, what: str) -> Figure:
    """Draw where b is larger or smaller than a, layers by steps.

    Args:
        steps: Common steps, shape (T,).
        names: Layers, L of them.
        logs: Natural logarithms of b/a, shape (T, L), NaN where one is missing.
        what: Of which quantity, for the label.

    Returns:
        A figure whose colour scale is centred on 1.
    """
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    rows, size = grouped(logs, ROWS)
    edges, cells = as_columns(steps.astype(float), rows)
    shown = cells.T / math.log(2)
    found = np.abs(shown[np.isfinite(shown)])
    most = float(np.quantile(found, 0.99)) if found.size else 0.0
    most = min(max(most, math.log2(_LEAST)), math.log2(_MOST))
    count = shown.shape[0]
    figure, axes = make_axes("", (9.6, min(8.0, 1.5 + 0.2 * max(count, 4))))
    axes.grid(visible=False)
    count_steps(axes)
    colours = [(*_SMALLER, 1.0), (*_SMALLER, 0.0), (*_LARGER, 0.0), (*_LARGER, 1.0)]
    places = [0.0, 0.5, 0.5, 1.0]
    scale = LinearSegmentedColormap.from_list("b over a", list(zip(places, colours, strict=True)))
    image = axes.imshow(
        np.ma.masked_invalid(shown),
        norm=Normalize(-most, most),
        cmap=scale.with_extremes(bad=_ABSENT),
        aspect="auto",
        interpolation="none",
        extent=(edges[0], edges[1], count - 0.5, -0.5),
    )
    name_rows(axes, names, count, size)
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=30)
    bar.set_label(f"log2 of {what}, b/a", color=INK)
    bar.ax.tick_params(which="both", colors=INK, labelsize=8)
    bar.outline.set_edgecolor(GRID)
    return figure

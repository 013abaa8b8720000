"""How instruments are drawn: lines with their band, heat maps, one metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sphereopt.report.axes import log_scale, make_axes, with_legend
from sphereopt.report.history import History
from sphereopt.report.rates import equilibrium_norms
from sphereopt.report.series import Array, averaged, parts, quantiles
from sphereopt.report.svg import COLOURS, GRID, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["LAYERS", "ROWS", "draw_heat_map", "draw_lines", "draw_metric"]
__all__ += ["as_columns", "count_steps", "grouped", "marks", "name_rows", "set_scale"]

#: Layers drawn one by one; more than that make a chart a blot and a page slow.
LAYERS = 120
#: Points of a bold line, and of all thin ones together: what a screen can show.
_POINTS, _THIN = 500, 12_000
#: Rows and columns of a heat map.
ROWS, _COLUMNS = 120, 400
_MEASURED, _EXPECTED, _APART = COLOURS["sgd"], COLOURS["free"], COLOURS["fixed"]
#: Of the layers in a colour of their own, which they share: more could not be told apart.
_DASHES: tuple[Any, ...] = ("-", (0, (1.2, 1.0)))


def draw_lines(
    history: History,
    probe: str,
    unit: str,
    beside: str | None,
    zero: float | None,
    mark: Sequence[str],
) -> Figure:
    """Draw a probe of all layers; see :func:`sphereopt.report.instruments.draw`."""
    figure, axes = make_axes(unit)
    count_steps(axes)
    values = history.of(probe)
    steps, lines = _thinned(history, values, _POINTS)
    if zero is not None:
        axes.axhline(0, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
    low, middle, high = _band(history, probe, lines)
    single = values.shape[1] == 1
    axes.fill_between(steps, low, high, color=_MEASURED, alpha=0.18, linewidth=0)
    if not single and values.shape[1] <= LAYERS:
        _draw_each(axes, history, values)
    label = "median of its spheres" if single else "median layer"
    bold = axes.plot(steps, middle, color=_MEASURED, linewidth=2, label=label, **marks(steps))
    bold[0].set_gid("layer-0" if single else "median")
    seen = [lines, low[:, None], high[:, None]]
    if beside is not None and np.isfinite(history.values.get(beside, np.array(np.nan))).any():
        each = equilibrium_norms(history) if probe == "norm" else history.of(beside)
        when, settled = _thinned(history, each, _POINTS)
        expected = quantiles(settled, (0.5,))[0]
        style: Any = {"color": _EXPECTED, "linewidth": 1.8, "linestyle": (0, (5, 2.5))}
        axes.plot(when, expected, label="expected", zorder=3, **style, **marks(when))
        seen.append(expected[:, None])
    apart = [name for name in mark if name in history.names and not single]
    for name, dashes in zip(apart, _DASHES, strict=False):
        line = lines[:, history.names.index(name)]
        style = {"color": _APART, "linewidth": 1.6, "label": _short(name), **marks(steps)}
        style["linestyle"] = dashes
        axes.plot(steps, line, **style)
    set_scale(axes, np.concatenate([x.ravel() for x in seen]), zero)
    return with_legend(figure, axes)


def _draw_each(axes: Axes, history: History, values: Array) -> None:
    """Draw each layer as a thin line that a page can find by its id."""
    steps, lines = _thinned(history, values, max(20, min(_POINTS, _THIN // values.shape[1])))
    width, alpha = (0.8, 0.45) if values.shape[1] <= 40 else (0.6, 0.3)
    for i in range(values.shape[1]):
        label = "each layer" if i == 0 else None
        style: Any = {"linewidth": width, "alpha": alpha, "label": label, **marks(steps)}
        drawn = axes.plot(steps, lines[:, i], color=_MEASURED, **style)
        drawn[0].set_gid(f"layer-{i}")


def _band(history: History, probe: str, lines: Array) -> tuple[Array, Array, Array]:
    """Return low, middle and high of each column of a figure."""
    if lines.shape[1] > 1:
        low, middle, high = quantiles(lines, (0.1, 0.5, 0.9))
        return low, middle, high
    ends = [_thinned(history, history.of(probe, q), _POINTS)[1][:, 0] for q in ("q25", "q75")]
    return ends[0], lines[:, 0], ends[1]


def _thinned(history: History, values: Array, count: int) -> tuple[Array, Array]:
    """Return steps and values, averaged over parts of the log; rows without values are left out.

    A line through what is measured now and then would have gaps everywhere, and not be seen.
    """
    there = np.isfinite(values).any(1)
    starts = parts(int(there.sum()), count)
    return averaged(history.steps[there].astype(float), starts), averaged(values[there], starts)


def marks(steps: Array) -> dict[str, Any]:
    """Return what makes a log of one step visible."""
    return {"marker": "o", "markersize": 4} if len(steps) == 1 else {}


def count_steps(axes: Axes) -> None:
    """Number steps, which are whole, as people write them."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))
    plain: Any = "{x:,.0f}"
    axes.xaxis.set_major_formatter(plain)


def set_scale(axes: Axes, values: Array, zero: float | None) -> None:
    """Choose the vertical scale: around zero, logarithmic, or from zero."""
    values = values[np.isfinite(values)]
    if not values.size:
        return
    if zero is not None:
        # A single spike, often of the first steps, would flatten all that follows.
        low, high = (float(np.quantile(values, q)) for q in (0.005, 0.995))
        axes.set_ylim(min(1.15 * low, -zero), max(1.15 * high, zero))
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
        axes.yaxis.get_offset_text().set_color(INK)
        return
    positive = values[values > 0]
    if positive.size and np.quantile(positive, 0.99) > 10 * np.quantile(positive, 0.01):
        # What is nearly zero, such as the first steps of a warm-up, leaves the frame below.
        top = float(positive.max())
        log_scale(axes, max(float(np.quantile(positive, 0.01)) / 1.5, 1e-8 * top), 1.3 * top)
    elif values.min() >= 0:
        axes.set_ylim(0, 1.08 * float(values.max()) or 1.0)


def grouped(values: Array, count: int) -> tuple[Array, int]:
    """Return columns averaged in groups of neighbours, at most ``count``, and the group's size."""
    size = -(-values.shape[1] // count)
    starts = np.arange(0, values.shape[1], size)
    return (values if size == 1 else averaged(values.T, starts).T), size


def draw_heat_map(history: History, probe: str, unit: str) -> Figure:
    """Draw layers by steps on a logarithmic colour scale, as a picture within the figure."""
    from matplotlib.colors import LogNorm

    values = history.of(probe)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs, size = grouped(np.log(np.where(values > 0, values, np.nan)), ROWS)
    edges, cells = as_columns(history.steps.astype(float), logs)
    shown = np.exp(cells.T)
    rows = shown.shape[0]
    figure, axes = make_axes("", (9.6, min(8.0, 1.5 + 0.2 * max(rows, 4))))
    axes.grid(visible=False)
    count_steps(axes)
    found = shown[np.isfinite(shown)]
    low, high = (found.min(), found.max()) if found.size else (1.0, 1.0)
    # Rates that a schedule takes to zero would use up the colours.
    low = max(low, 1e-4 * high)
    image = axes.imshow(
        np.ma.masked_invalid(shown),
        norm=LogNorm(low, max(high, 1.0001 * low)),
        cmap="viridis",
        aspect="auto",
        interpolation="none",
        extent=(edges[0], edges[1], rows - 0.5, -0.5),
    )
    name_rows(axes, history.names, rows, size)
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=30)
    bar.set_label(unit, color=INK)
    bar.ax.tick_params(which="both", colors=INK, labelsize=8)
    bar.outline.set_edgecolor(GRID)
    return figure


def as_columns(steps: Array, values: Array) -> tuple[tuple[float, float], Array]:
    """Return first and last edge, and values at columns of equal width in steps."""
    first, last = float(steps[0]), float(steps[-1])
    count = min(_COLUMNS, len(steps))
    place = np.zeros(len(steps), int)
    if last > first:
        place = np.minimum((steps - first) * count // (last - first), count - 1).astype(int)
    filled, starts = np.unique(place, return_index=True)
    cells = averaged(values, starts)
    # Where logging was rarer than a column, the last value before it still stands.
    cells = cells[np.searchsorted(filled, np.arange(count if last > first else 1), "right") - 1]
    return (first, last if last > first else first + 1), cells


def name_rows(axes: Axes, names: tuple[str, ...], rows: int, size: int) -> None:
    """Write names where they fit, and which layers of a group otherwise."""
    every = -(-rows // 38)
    at = range(0, rows, every)
    axes.set_yticks(list(at), [_short(names[i * size]) for i in at], fontsize=8)
    axes.tick_params(axis="y", length=0)


def _short(name: str) -> str:
    """Return the end of a long name, which tells layers apart.

    To matplotlib ``$`` begins a formula, and a label that begins with ``_`` is none.
    """
    name = name if len(name) <= 32 else "…" + name[-31:]
    return (" " + name if name.startswith("_") else name).replace("$", r"\$")


def draw_metric(history: History, name: str) -> Figure:
    """Draw one metric; see :func:`sphereopt.report.instruments.metric`."""
    figure, axes = make_axes(_short(name))
    count_steps(axes)
    there = np.isfinite(history.metrics[name])
    if there.any():
        starts = parts(int(there.sum()), _POINTS)
        steps = averaged(history.steps[there].astype(float), starts)
        line = averaged(history.metrics[name][there], starts)
        axes.plot(steps, line, color=_MEASURED, linewidth=1.6, **marks(steps))
        set_scale(axes, line, None)
    return figure

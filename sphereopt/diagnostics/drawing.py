"""Pictures of measurements over depth; matplotlib is imported when one is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sphereopt.report.axes import dress, log_scale
from sphereopt.report.svg import COLOURS, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sphereopt.diagnostics.amplify import Amplification
    from sphereopt.diagnostics.signal import Layer, Propagation

__all__ = ["draw_amplification", "draw_propagation"]

#: Okabe and Ito's colours that all readers can tell apart; six arms, then dashes.
_PALETTE = (*COLOURS.values(), "#cc79a7", "#56b4e9", "#d55e00")
_DASHES: tuple[Any, ...] = ("-", (0, (3.0, 1.2)), (0, (1.0, 1.0)))


def _style(i: int) -> dict[str, Any]:
    colour = _PALETTE[i % len(_PALETTE)]
    return {"color": colour, "linestyle": _DASHES[i // len(_PALETTE) % len(_DASHES)], "lw": 1.4}


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9, loc="left", color=INK)
    dress(axes, 8)


def _log(axes: Axes, values: Sequence[float]) -> None:
    """Make an axis logarithmic if what is on it spans a factor of five."""
    known = [v for v in values if math.isfinite(v) and v > 0]
    if known and max(known) > 5 * min(known):
        log_scale(axes, min(known) / 1.3, max(known) * 1.3)


def draw_propagation(
    results: Mapping[str, Propagation], roles: Sequence[str] = ("weights", "activation")
) -> Figure:
    """Draw the four statistics of one or several models over depth.

    Args:
        results: Name in the legend -> measurement.
        roles: What is drawn: gradient norms of the first role, the others of the last one that the
            model has.

    Returns:
        A matplotlib figure of four panels.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.4, 5.2), layout="constrained")
    panels: list[tuple[str, str, Callable[[Layer], float | None], bool]] = [
        ("activation variance", roles[-1], lambda x: x.variance, True),
        ("cosine similarity of samples", roles[-1], lambda x: x.similarity, False),
        ("stable rank of the samples", roles[-1], lambda x: x.stable_rank, True),
        ("gradient norm, layers with weights", roles[0], lambda x: x.grad_norm, True),
    ]
    for axes, (title, role, value, log) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        _dress(axes, title)
        everything: list[float] = []
        for i, (name, result) in enumerate(results.items()):
            rows = [x for x in result.layers if x.role == role] or list(result.layers)
            values = [math.nan if (v := value(x)) is None else v for x in rows]
            mark = "." if len(values) < 30 else ""
            axes.plot(range(1, len(values) + 1), values, label=name, marker=mark, **_style(i))
            everything += values
        if log:
            _log(axes, everything)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(f"{role} number", fontsize=8, color=INK)
    _legend(figure, results)
    return figure


def draw_amplification(results: Mapping[str, Amplification]) -> Figure:
    """Draw amplification before and after each normalizer, by statistics.

    Args:
        results: Title of a panel's row -> measurement.

    Returns:
        A matplotlib figure of two panels per measurement.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from sphereopt.diagnostics.amplify import STATISTICS

    figure = Figure(figsize=(7.4, 0.6 + 2.3 * len(results)), layout="constrained")
    grid = figure.subplots(len(results), 2, squeeze=False, sharey="row")
    for line, (title, result) in zip(grid, results.items(), strict=True):
        everything: list[float] = []
        for axes, side in zip(line, ("before", "after"), strict=True):
            _dress(axes, f"{title}{': ' if title else ''}{side} each normalizer")
            for i, name in enumerate(STATISTICS):
                factors = [getattr(row, side)[name] for row in result.rows]
                places = range(1, len(factors) + 1)
                axes.plot(
                    places, factors, label=name, marker="osx"[i], ms=4, mfc="none", **_style(i)
                )
                everything += factors
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlabel("normalizer number", fontsize=8, color=INK)
        _log(line[0], everything)
        line[0].set_ylabel("amplification", fontsize=8, color=INK)
    _legend(figure, STATISTICS)
    return figure


def _legend(figure: Figure, names: Sequence[str] | Mapping[str, Any]) -> None:
    if any(names):
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8,
            labelcolor=INK,
        )  # fmt: skip

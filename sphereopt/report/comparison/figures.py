"""From a comparison run's numbers to figures: pure functions, no pyplot, nothing global."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sphereopt.report.axes import make_axes, with_legend
from sphereopt.report.svg import COLOURS, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["accuracy", "angles", "layers", "loss", "loss_gap", "norms"]

Results = Mapping[str, Any]
Rows = Mapping[str, Sequence[Mapping[str, Any]]]

_DASHES: dict[str, Any] = {"sgd": "-", "free": (0, (4, 2.5)), "fixed": (0, (1, 1))}
_WIDTHS = {"sgd": 2.4, "free": 1.4, "fixed": 1.8}
_BINS = 250


def norms(results: Results) -> Figure:
    """Draw the norms that the optimizers believe, and those stored.

    Args:
        results: A comparison run's results.

    Returns:
        Medians over all spheres, with the quartiles as a band, and the calculator's for (a).
    """
    figure, axes = make_axes("norm of a sphere")
    _calculated(axes, results, "norm")
    for name, arm in results["arms"].items():
        steps = [point["step"] for point in arm["norms"]]
        kinds = ("believed", "stored") if name == "free" else ("stored",)
        for kind in kinds:
            low, middle, high = (
                [point[kind][q] for point in arm["norms"]] for q in ("q25", "median", "q75")
            )
            label = f"({arm['letter']}) {'virtual radius' if kind == 'believed' else 'stored norm'}"
            style = _style(name) | ({"linestyle": (0, (8, 4))} if len(kinds) > 1 else {})
            if kind == "believed":
                style["linestyle"] = _DASHES["free"]
            axes.plot(steps, middle, label=label, **style)
            if kind == "stored" and name != "free":
                axes.fill_between(steps, low, high, color=COLOURS[name], alpha=0.15, linewidth=0)
    axes.set_ylim(bottom=0)
    return with_legend(figure, axes)


def angles(results: Results) -> Figure:
    """Draw how far the weights turn in a step, the calculator's angle and that at equilibrium.

    Args:
        results: A comparison run's results.

    Returns:
        Means over all spheres at the logged steps.
    """
    figure, axes = make_axes("angle per step (rad)")
    _calculated(axes, results, "angle")
    # Broad and pale, so that an arm that turns exactly so can be seen on it.
    label = "at equilibrium"
    axes.plot(*_columns(results["predicted"]), color=INK, linewidth=6, alpha=0.3, label=label)
    warm_up = results["config"]["steps"] / 20
    top = max(value for _, value in results["predicted"])
    for name, arm in results["arms"].items():
        top = max([top, *(value for step, value in arm["angles"] if step > warm_up)])
        style = _style(name) | {"linewidth": 0.7 * _WIDTHS[name]}
        axes.plot(*_columns(arm["angles"]), label=f"({arm['letter']})", **style)
    # The first steps, before the norms have grown, would flatten all that follows.
    axes.set_ylim(0, 1.1 * top)
    return with_legend(figure, axes)


def layers(results: Results, rows: Rows) -> Figure:
    """Draw the norm of each layer in (a), and what (b) believes it to be.

    Args:
        results: A comparison run's results.
        rows: Arm name to the rows of its JSONL file.

    Returns:
        Medians over the layer's spheres, each line named at its end.
    """
    figure, axes = make_axes("norm of a sphere, by layer")
    for arm in ("sgd", "free"):
        steps = [row["step"] for row in rows[arm]]
        for name in results["spheres"]:
            values = [row["parameters"][name]["norm"]["median"] for row in rows[arm]]
            axes.plot(steps, values, **_style(arm))
            if arm == "sgd":
                end = (steps[-1], values[-1])
                axes.annotate(name, end, (4, -3), textcoords="offset points", color=INK, size=8)
        axes.lines[-1].set_label(f"({results['arms'][arm]['letter']})")
    axes.set_ylim(bottom=0)
    return with_legend(figure, axes)


def accuracy(results: Results) -> Figure:
    """Draw the share of test images that are classified correctly.

    Args:
        results: A comparison run's results.

    Returns:
        Percent against steps.
    """
    figure, axes = make_axes("test accuracy (%)")
    lowest = 100.0
    for name, arm in results["arms"].items():
        steps, shares = _columns(arm["accuracy"])
        values = [100 * share for share in shares]
        lowest = min([lowest, *values[len(values) // 5 :]])
        axes.plot(steps, values, label=f"({arm['letter']})", **_style(name))
    axes.set_ylim(max(0.0, lowest - 0.2 * (100 - lowest) - 1), 100.5)
    return with_legend(figure, axes)


def loss(results: Results) -> Figure:
    """Draw the training loss.

    Args:
        results: A comparison run's results.

    Returns:
        Means over bins of steps.
    """
    figure, axes = make_axes("training loss")
    for name, arm in results["arms"].items():
        bins = _bins(arm["loss"], 100)
        steps = [end for end, _ in bins]
        means = [math.fsum(values) / len(values) for _, values in bins]
        axes.plot(steps, means, label=f"({arm['letter']})", **_style(name))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.yaxis.set_minor_formatter("{x:.3g}")
    return with_legend(figure, axes)


def loss_gap(results: Results) -> Figure:
    """Draw how far the training losses are from that of (a).

    Args:
        results: A comparison run's results.

    Returns:
        The largest difference in each bin of steps, on a logarithmic axis.
    """
    figure, axes = make_axes("|loss − loss of (a)|")
    reference = results["arms"]["sgd"]["loss"]
    widest = 0.0
    for name, arm in list(results["arms"].items())[1:]:
        gaps = [abs(x - y) for x, y in zip(arm["loss"], reference, strict=True)]
        bins = [(end, max(values)) for end, values in _bins(gaps, _BINS)]
        # A difference of exactly zero has no place on a logarithmic axis.
        ends, largest = [end for end, _ in bins], [gap or math.nan for _, gap in bins]
        style = _style(name) | {"linestyle": "-", "linewidth": 1.1}
        axes.plot(ends, largest, label=f"({arm['letter']}) − (a)", **style)
        widest = max(widest, *gaps)
    if widest > 0:
        axes.set_yscale("log")
    return with_legend(figure, axes)


def _calculated(axes: Axes, results: Results, what: str) -> None:
    """Draw what the calculator says of (a)."""
    steps = [point["step"] for point in results["forecast"]]
    values = [point[what] for point in results["forecast"]]
    axes.plot(steps, values, label="calculated for (a)", color=INK, linewidth=1.2, zorder=3)


def _style(arm: str) -> dict[str, Any]:
    return {"color": COLOURS[arm], "linestyle": _DASHES[arm], "linewidth": _WIDTHS[arm]}


def _columns(series: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in series], [value for _, value in series]


def _bins(values: Sequence[float], count: int) -> list[tuple[int, Sequence[float]]]:
    """Return runs of equal length, each with the step it ends at."""
    size = max(1, math.ceil(len(values) / count))
    return [
        (min(start + size, len(values)), values[start : start + size])
        for start in range(0, len(values), size)
    ]

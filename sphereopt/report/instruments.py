"""The instruments: one figure for each thing that a log says, for notebooks and for the page.

Each takes a log, as a path, rows or a :class:`~sphereopt.report.History`, and returns a matplotlib
figure that nothing else holds on to. Steps are averaged where there are more than a figure can
show, so that a log of any length makes a figure of the same size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sphereopt.report.drawing import draw_heat_map, draw_lines, draw_metric
from sphereopt.report.history import History, as_history

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "HEAT_MAP",
    "INSTRUMENTS",
    "Instrument",
    "K_measured",
    "Log",
    "angles",
    "diffusive_angles",
    "draw",
    "effective_lrs",
    "grad_radial_shares",
    "growth",
    "metric",
    "momentum_alignments",
    "norms",
    "radial_shares",
    "relative_updates",
    "scaled_grad_norms",
]

Log = str | Path | Sequence[Mapping[str, Any]] | History


@dataclass(frozen=True)
class Instrument:
    """What a chart shows and how it is read.

    Attributes:
        name: Of the chart, distinct on a page.
        probe: What is drawn, a key of the log.
        title: What it is, in words.
        unit: Label of the vertical axis.
        reading: One sentence or two: what is expected, and what it means if it is not so.
        beside: Probe that is drawn beside it, what theory expects.
        zero: Expected is zero; the axis holds it and is never finer than this.
    """

    name: str
    probe: str
    title: str
    unit: str
    reading: str
    beside: str | None = None
    zero: float | None = None


HEAT_MAP = Instrument(
    "effective-lr",
    "effective_lr",
    "Effective learning rate, by layer",
    "rad per unit of direction",
    "The step on the unit sphere: lr/|w|² for SGD, lr/|w| for Adam, lr where a move takes radians. "
    "Expected: rows alike in layers that learn alike, and the schedule's shape along each; a row "
    "that fades sees its norm grow.",
)
_ALL = (
    Instrument(
        "norms",
        "norm",
        "Norms",
        "norm of a sphere",
        "Where learning rate and weight decay are constant, norms settle at the dashed line, where "
        "growth by steps and weight decay balance; on fixed spheres they stay where they began.",
        beside="equilibrium_norm",
    ),
    Instrument(
        "angles",
        "angle",
        "Angles",
        "rad per step",
        "How far the weights turn in a step. Expected: the dashed line, once norms had time to "
        "settle, in every layer with the same lr and weight decay; a layer far off it learns at "
        "another pace.",
        beside="equilibrium_angle",
    ),
    Instrument(
        "grad-radial-share",
        "grad_radial_share",
        "Cosine of gradient and weights",
        "cos(g, w)",
        "Expected: 0 for scale-invariant weights. A layer away from 0 is not scale-invariant: its "
        "norm means something, and a sphere takes it away.",
        zero=0.01,
    ),
    Instrument(
        "radial-share",
        "radial_share",
        "Cosine of direction and weights",
        "cos(u, w)",
        "Expected: near 0. Above it the step shrinks the weights, as weight decay in the gradient "
        "does; below it momentum, or Adam's division, lets them grow.",
        zero=0.01,
    ),
    Instrument(
        "growth",
        "growth",
        "Growth of norms",
        "relative change per step",
        "Expected: on the dashed line, the growth that the tangent steps and weight decay imply. "
        "Below it for long, rounding swallows growth; away from it, gradients point along weights.",
        beside="growth_law",
        zero=1e-7,
    ),
    Instrument(
        "scaled-grad-norm",
        "scaled_grad_norm",
        "Size of the gradient",
        "|g||w|",
        "Does not change when weights are rescaled, so layers and runs compare. It follows the "
        "loss; one layer alone that falls by orders of magnitude no longer gets a gradient.",
    ),
    Instrument(
        "relative-update",
        "relative_update",
        "Relative update",
        "lr|u| / |w|",
        "The length of the proposed step over the norm. Expected: close to the angle.",
    ),
    Instrument(
        "momentum-alignment",
        "momentum_alignment",
        "Cosine of gradient and direction",
        "cos(g, u)",
        "Expected: 1 without momentum, √(1 − μ²) with, if gradients are noise. Above: successive "
        "gradients agree. Below: they undo each other.",
    ),
    Instrument(
        "k-measured",
        "K_measured",
        "Alignment of updates",
        "K = 2κ/angle²",
        "Expected at equilibrium: what momentum alone gives, (1 + μ)/(1 − μ) for SGD, and 1 "
        "without momentum. More: norms are above equilibrium, and turning is slow; less: below.",
    ),
    Instrument(
        "diffusive-angle",
        "diffusive_angle",
        "Diffusive angle",
        "rad per root step",
        "How far the weights get in many steps, over the root of their number. Well above the "
        "angle per step where successive steps agree.",
    ),
)
#: Name to instrument, in the order of the page.
INSTRUMENTS: Mapping[str, Instrument] = {one.name: one for one in _ALL}


def draw(log: Log, instrument: Instrument, mark: Sequence[str] = ()) -> Figure:
    """Draw one instrument of a log.

    Args:
        log: Path of a JSONL file, rows, or a :class:`~sphereopt.report.History`.
        instrument: One of ``INSTRUMENTS``, or ``HEAT_MAP``.
        mark: Layers to draw in a colour of their own, at most two.

    Returns:
        Up to 120 layers as thin lines, their median bold over a band that holds 80 % of them, and
        what theory expects dashed; of a single layer the median over its spheres, and a band that
        holds half of them.

    Raises:
        ValueError: If the log cannot be read, or has nothing of the instrument's probe.
        ImportError: If matplotlib is missing; the extra ``report`` brings it.
    """
    history = as_history(log)
    if not has(history, instrument):
        raise ValueError(f"{history.source}: no {instrument.probe} was logged")
    if instrument is HEAT_MAP:
        return draw_heat_map(history, instrument.probe, instrument.unit)
    return draw_lines(
        history, instrument.probe, instrument.unit, instrument.beside, instrument.zero, mark
    )


def has(history: History, instrument: Instrument) -> bool:
    """Return whether a log has a number for an instrument."""
    import numpy as np

    values = history.values.get(instrument.probe)
    return values is not None and bool(np.isfinite(values[..., 3]).any())


def norms(log: Log) -> Figure:
    """Draw norms, and those at equilibrium; see :func:`draw`."""
    return draw(log, INSTRUMENTS["norms"])


def angles(log: Log) -> Figure:
    """Draw angles per step, and those at equilibrium; see :func:`draw`."""
    return draw(log, INSTRUMENTS["angles"])


def effective_lrs(log: Log) -> Figure:
    """Draw the effective learning rate, layers by steps, as a heat map; see :func:`draw`."""
    return draw(log, HEAT_MAP)


def grad_radial_shares(log: Log) -> Figure:
    """Draw the cosines of gradient and weights; see :func:`draw`."""
    return draw(log, INSTRUMENTS["grad-radial-share"])


def radial_shares(log: Log) -> Figure:
    """Draw the cosines of direction and weights; see :func:`draw`."""
    return draw(log, INSTRUMENTS["radial-share"])


def growth(log: Log) -> Figure:
    """Draw the growth of norms, and what the law says of it; see :func:`draw`."""
    return draw(log, INSTRUMENTS["growth"])


def scaled_grad_norms(log: Log) -> Figure:
    """Draw the norm of the gradient times that of the weights; see :func:`draw`."""
    return draw(log, INSTRUMENTS["scaled-grad-norm"])


def relative_updates(log: Log) -> Figure:
    """Draw the length of the step over the norm; see :func:`draw`."""
    return draw(log, INSTRUMENTS["relative-update"])


def momentum_alignments(log: Log) -> Figure:
    """Draw the cosines of gradient and direction; see :func:`draw`."""
    return draw(log, INSTRUMENTS["momentum-alignment"])


def K_measured(log: Log) -> Figure:  # noqa: N802
    """Draw the alignment of updates; see :func:`draw`."""
    return draw(log, INSTRUMENTS["k-measured"])


def diffusive_angles(log: Log) -> Figure:
    """Draw the diffusive angles; see :func:`draw`."""
    return draw(log, INSTRUMENTS["diffusive-angle"])


def metric(log: Log, name: str) -> Figure:
    """Draw what the user logged under a name, such as the loss.

    Args:
        log: Path of a JSONL file, rows, or a :class:`~sphereopt.report.History`.
        name: As given to ``tracker.log``.

    Returns:
        One line; logarithmic if the numbers span more than a factor of ten.

    Raises:
        ValueError: If the log cannot be read or has no such metric.
    """
    history = as_history(log)
    if name not in history.metrics:
        known = ", ".join(history.metrics) or "none"
        raise ValueError(f"{history.source}: no metric {name!r} was logged; there are: {known}")
    return draw_metric(history, name)

"""How one run stands to another in one quantity: by how much, since when, and beyond noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sphereopt.report.series import Array, averaged, parts, quantiles

__all__ = ["MEASURES", "Course", "Measure", "apart", "course"]

#: Means of stretches that a course is judged by: finer than a chart shows.
_PARTS = 400
#: Standard errors beyond the tolerance. A diff asks some thousand questions; at four, two runs that
#: differ by their seeds alone answer yes to none of them.
_SURE = 4.0
#: A parting shorter than this share of the rows, and over before the end, is not counted: while
#: norms settle, seeds make those.
_LASTING = 0.1
#: Ratios beyond this are said as this: one run's number is zero.
_MOST = 1e9


@dataclass(frozen=True)
class Measure:
    """What is compared.

    Attributes:
        probe: Key of the log.
        heading: Of a column.
        words: Plural, for sentences.
        scale: None for a positive quantity, of which ratios are taken. Of a cosine differences are
            taken, and this times the tolerance is what passes as the same.
        power: Of the norm that it follows: so many times the tolerance passes as the same.
    """

    probe: str
    heading: str
    words: str
    scale: float | None = None
    power: int = 1


#: The most telling first. For cosines with the gradient 10 % of 0.1 is what the report, too, calls
#: not scale-invariant. Effective rates go with the square of the norm. Left out are growth, which
#: is the norm's difference and mostly noise, relative updates, which are the angles again, and what
#: is measured too seldom to know its noise.
MEASURES = (
    Measure("norm", "norm", "norms"),
    Measure("angle", "angle", "angles"),
    Measure("effective_lr", "eff. lr", "effective learning rates", power=2),
    Measure("scaled_grad_norm", "|g||w|", "gradients"),
    Measure("grad_radial_share", "cos(g,w)", "cosines of gradient and weights", 0.1),
    Measure("radial_share", "cos(u,w)", "cosines of direction and weights", 1.0),
    Measure("momentum_alignment", "cos(g,u)", "cosines of gradient and direction", 1.0),
)


@dataclass(frozen=True)
class Course:
    """How b stands to a in one quantity: ratios b/a, or differences b - a.

    Attributes:
        is_ratio: Which of the two.
        late: Over the second half of the common steps: geometric mean (mean), or None.
        end: Median of the last stretch of rows.
        largest: The running median that is farthest from 1 (0).
        largest_at: Its step.
        since: First step of the first stretch in which they are apart; None if they never are, or
            if noise hides it.
        parted: They are apart beyond tolerance and noise, in such a stretch or over the second
            half.
        size: How far apart they are over the second half, else at the end, in units of what passes
            as the same: for ranking.
    """

    is_ratio: bool
    late: float | None
    end: float
    largest: float
    largest_at: int
    since: int | None
    parted: bool
    size: float


def apart(a: Array, b: Array, is_ratio: bool) -> Array:
    """Return logarithms of ratios, or differences, NaN where one is missing.

    Args:
        a: Numbers of the first run.
        b: Those of the second, same shape.
        is_ratio: Ratios; of two zeros it is 1, and a number over zero is a billion.

    Returns:
        Of the same shape.

    Example:
        >>> apart(np.array([1.0, 0.0, np.nan]), np.array([1.0, 0.0, 1.0]), True).tolist()
        [0.0, 0.0, nan]
    """
    if not is_ratio:
        return np.asarray(b - a, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where((a == b) & np.isfinite(a), 0.0, np.log(b) - np.log(a))
    most = math.log(_MOST)
    return np.asarray(np.clip(logs, -most, most), float)


def course(
    values: Array,
    steps: NDArray[np.int64],
    *,
    half: float,
    tolerance: float,
    scale: float | None = None,
    power: int = 1,
) -> Course | None:
    """Return how b stands to a over the run.

    Args:
        values: What :func:`apart` returned for one layer, shape (T,).
        steps: Of each row, shape (T,), increasing.
        half: The step at which the second half begins.
        tolerance: Ratios within ``1 + tolerance`` pass as the same.
        scale: As in :class:`Measure`.
        power: Likewise.

    Returns:
        The course, or None if no row has both runs.

    Notes:
        A running median over a twentieth of the rows is compared with the tolerance plus four times
        its own noise, which is taken from its second differences, so that what grows steadily is
        not mistaken for noise.

    Example:
        >>> steps = np.arange(1, 101)
        >>> found = course(np.log(np.where(steps < 40, 1.0, 2.0)), steps, half=50, tolerance=0.1)
        >>> found.since, round(found.late, 6)
        (40, 2.0)
    """
    there = np.flatnonzero(np.isfinite(values))
    if not there.size:
        return None
    starts = parts(len(there), _PARTS)
    x, at = averaged(values[there], starts), steps[there][starts]
    bound = power * math.log1p(tolerance) if scale is None else scale * tolerance
    width = _width(len(x))
    medians = _medians(x, width)
    noise = _noise(medians, width)
    lower = np.clip(np.arange(len(x)) - width // 2, 0, len(medians) - 1)
    running = medians[lower]
    row = _first(np.abs(running) > bound + noise)
    late, late_parted = None, False
    if (rest := values[there][steps[there] >= half]).size:
        late = float(rest.mean())
        count = max(1.0, float((at >= half).sum()) / width)
        late_parted = abs(late) > bound + noise / math.sqrt(count)
    top = int(np.argmax(np.abs(running)))
    parted = row is not None or late_parted
    if row is not None and late is not None and late_parted:
        row = _dated(row, at >= half, late, float(running[top]))
    given = _ratio if scale is None else float
    return Course(
        is_ratio=scale is None,
        late=None if late is None else given(late),
        end=given(running[-1]),
        largest=given(running[top]),
        largest_at=int(at[top]),
        since=None if row is None else int(at[row]),
        parted=parted,
        size=abs(float(running[-1]) if late is None else late) / bound,
    )


def _dated(row: int, in_half: NDArray[np.bool_], late: float, largest: float) -> int | None:
    """Return a row, or None if what begins there is too short to have made the mean.

    Then they were apart before it, and noise hides since when. A factor of two is left for noise.
    """
    share = float((np.flatnonzero(in_half) >= row).mean())
    return row if abs(late) <= 2 * share * abs(largest) else None


def _ratio(log: float) -> float:
    return math.exp(log)


def _width(rows: int) -> int:
    """Return over how many rows medians go: a twentieth, at least five if the log has fifty."""
    return max(1, min(rows // 10, 5), rows // 20)


def _medians(x: Array, width: int) -> Array:
    windows = np.lib.stride_tricks.sliding_window_view(x, width)
    found: Array = quantiles(np.asarray(windows), (0.5,))[0]
    return found


def _noise(medians: Array, width: int) -> float:
    """Return what noise alone may make of a running median, 0 of too few rows to know.

    Of few windows the noise is poorly known, which asks for more.
    """
    second = medians[2 * width :] - 2 * medians[width : len(medians) - width]
    second = second + medians[: len(medians) - 2 * width]
    if not second.size:
        return 0.0
    # For normal noise of size s the median of |x - 2y + z| is s sqrt(6) / 1.4826.
    size = 1.4826 * float(np.median(np.abs(second))) / math.sqrt(6)
    return _SURE * (1 + 3 * width / second.size) * size


def _first(apart: NDArray[np.bool_]) -> int | None:
    """Return where the first stretch begins that lasts long enough, or to the end."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], apart, [False]])))
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        if stop - start >= _LASTING * len(apart) or stop == len(apart):
            return int(start)
    return None

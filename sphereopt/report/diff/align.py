"""Two logs on the same steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sphereopt.report.history import History
from sphereopt.report.series import Array

__all__ = ["Aligned", "Rows", "aligned"]

#: With fewer of the sparser log's steps in common, what lies between them would be lost.
_SHARE = 0.1


@dataclass(frozen=True, eq=False)
class Rows:
    """Which rows of a log, or which between two: ``low`` and a share of the way to ``high``."""

    low: NDArray[np.intp]
    high: NDArray[np.intp]
    share: Array

    def of(self, values: Array) -> Array:
        """Return the rows of an array whose first axis is that of the log."""
        share = self.share.reshape(-1, *[1] * (values.ndim - 1))
        found: Array = values[self.low] + (values[self.high] - values[self.low]) * share
        return found


@dataclass(frozen=True, eq=False)
class Aligned:
    """Two logs on the same steps.

    Attributes:
        a: Rows of the first log.
        b: Rows of the second.
        steps: The steps, shape (T,); may be empty.
        names: Parameters of both, in the first log's order.
        interpolated: Some of the numbers were not logged at these steps.
    """

    a: Rows
    b: Rows
    steps: NDArray[np.int64]
    names: tuple[str, ...]
    interpolated: bool

    @property
    def half(self) -> float:
        """The step at which the second half begins."""
        return float(self.steps[0] + self.steps[-1]) / 2 if len(self.steps) else 0.0


def aligned(a: History, b: History) -> Aligned:
    """Return two logs on the steps that both have.

    Args:
        a: The first log.
        b: The second.

    Returns:
        Their common steps. If these are less than a tenth of the sparser log's: that log's steps
        within the overlap, the other one interpolated between its rows, linearly in the logarithm
        of the step, as runs change fast at first and slowly later.

    Example:
        >>> row = {"parameters": {"w": {"norm": {"median": 1.0}}}}
        >>> one = History.from_rows([{"step": i} | row for i in range(10, 100, 10)])
        >>> two = History.from_rows([{"step": i} | row for i in range(15, 100, 15)])
        >>> aligned(one, two).steps.tolist()
        [30, 60, 90]
    """
    first, last = max(a.steps[0], b.steps[0]), min(a.steps[-1], b.steps[-1])
    others = set(b.names)
    names = tuple(name for name in a.names if name in others)
    inside = [x[(x >= first) & (x <= last)] for x in (a.steps, b.steps)]
    sparser = min(inside, key=len)
    common = np.intersect1d(a.steps, b.steps)
    between = len(common) < _SHARE * len(sparser)
    steps = sparser if between else common
    return Aligned(_rows(a.steps, steps), _rows(b.steps, steps), steps, names, between)


def _rows(steps: NDArray[np.int64], wanted: NDArray[np.int64]) -> Rows:
    high = np.searchsorted(steps, wanted).astype(np.intp)
    exact = steps[high] == wanted if len(wanted) else np.zeros(0, bool)
    low = np.where(exact, high, np.maximum(high - 1, 0))
    place, start, stop = (np.log1p(x.astype(float)) for x in (wanted, steps[low], steps[high]))
    share: Array = np.zeros(len(wanted))
    np.divide(place - start, stop - start, out=share, where=~exact)
    return Rows(low, high, share)

"""What figures and findings compute of logged series, in which numbers may be missing (NaN)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "averaged", "lasting_from", "middle", "over", "parts", "quantiles"]
__all__ += ["running_mean", "smoothed", "window"]

Array = NDArray[np.float64]

#: Rows of a running median that count.
_COUNTED = 100


def parts(rows: int, count: int) -> NDArray[np.intp]:
    """Return the first row of each of at most ``count`` parts of nearly equal length.

    Example:
        >>> parts(5, 2).tolist(), parts(2, 10).tolist()
        ([0, 2], [0, 1])
    """
    count = min(rows, count)
    return np.unique(np.arange(count) * rows // max(1, count)).astype(np.intp)


def averaged(values: Array, starts: NDArray[np.intp]) -> Array:
    """Return the mean of each part of the rows, over what is there.

    Args:
        values: (rows,) or (rows, columns), NaN where missing.
        starts: First row of each part, from :func:`parts`.

    Returns:
        One row per part; NaN where a part has nothing.

    Example:
        >>> averaged(np.array([1.0, 3.0, np.nan]), np.array([0, 2])).tolist()
        [2.0, nan]
    """
    there = np.isfinite(values)
    count = np.add.reduceat(there.astype(float), starts, axis=0)
    total = np.add.reduceat(np.where(there, values, 0.0), starts, axis=0)
    result: Array = np.full(total.shape, np.nan)
    return np.divide(total, count, out=result, where=count > 0)


def quantiles(values: Array, shares: tuple[float, ...]) -> Array:
    """Return quantiles of each row, over what is there: (len(shares), rows).

    Example:
        >>> quantiles(np.array([[1.0, np.nan, 3.0], [np.nan] * 3]), (0.5,)).tolist()
        [[2.0, nan]]
    """
    ordered = np.sort(np.where(np.isfinite(values), values, np.nan), axis=1)
    last = np.isfinite(ordered).sum(axis=1) - 1
    rows, result = np.arange(len(values)), np.full((len(shares), len(values)), np.nan)
    if values.shape[1]:
        for i, share in enumerate(shares):
            place = np.maximum(last, 0) * share
            low = ordered[rows, np.floor(place).astype(int)]
            high = ordered[rows, np.ceil(place).astype(int)]
            result[i] = low + (high - low) * (place % 1)
    return result


def over(values: Any, others: Any) -> Array:
    """Return ratios, NaN where one is missing or the other is not positive.

    Example:
        >>> over(np.array([1.0, 1.0, np.nan]), np.array([2.0, 0.0, 1.0])).tolist()
        [0.5, nan, nan]
    """
    values, others = np.broadcast_arrays(np.asarray(values, float), np.asarray(others, float))
    result: Array = np.full(values.shape, np.nan)
    np.divide(values, others, out=result, where=others > 0)
    return result


def middle(values: Any) -> float:
    """Return the median of what is there, NaN if nothing is.

    Example:
        >>> middle([1.0, float("nan"), 2.0, 9.0])
        2.0
    """
    array = np.asarray(values, float)
    array = array[np.isfinite(array)]
    return float(np.median(array)) if array.size else float("nan")


def smoothed(values: Array) -> Array:
    """Return the running median over the past rows, a twentieth of them but at least five.

    Args:
        values: (rows, columns); the median of each row and those before it.

    Returns:
        Of the same shape: one odd step does not count, and what lasts is seen at most half a window
        late. Of a window of more than a hundred rows about as many count, evenly spread: the memory
        of a long log stays bounded.
    """
    width = window(len(values))
    if width == 0:
        return values
    first = np.repeat(values[:1], width - 1, axis=0)
    windows = np.lib.stride_tricks.sliding_window_view(np.concatenate([first, values]), width, 0)
    every = (width + _COUNTED - 1) // _COUNTED
    spread = windows[..., ::-every]  # from the row itself backwards
    result = np.empty(values.shape)
    for column in range(values.shape[1]):
        result[:, column] = quantiles(spread[:, column], (0.5,))[0]
    return result


def running_mean(values: Array) -> Array:
    """Return the mean of each row and those before it, over as many as :func:`smoothed` takes.

    Example:
        >>> running_mean(np.array([[1.0], [3.0], [np.nan]]))[:, 0].tolist()
        [1.0, 2.0, 2.0]
    """
    width, there = window(len(values)), np.isfinite(values)
    total = np.cumsum(np.where(there, values, 0.0), axis=0)
    count = np.cumsum(there.astype(float), axis=0)
    for sums in (total, count):
        sums[width:] -= sums[:-width].copy()
    return over(np.where(there.any(), total, np.nan), count)


def window(rows: int) -> int:
    """Return over how many rows running means and medians go."""
    return min(rows, max(5, rows // 20))


def lasting_from(holds: NDArray[np.bool_]) -> int | None:
    """Return the row from which a condition holds to the end, None if it does not at the end.

    Example:
        >>> lasting_from(np.array([True, False, True, True])), lasting_from(np.array([False]))
        (2, None)
    """
    if not len(holds) or not holds[-1]:
        return None
    fails = np.flatnonzero(~holds)
    return int(fails[-1]) + 1 if len(fails) else 0

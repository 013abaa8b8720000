"""The learning rate of a run: which rows are to be judged by what they settle at."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sphereopt.report.history import History
from sphereopt.report.series import Array, over, quantiles, running_mean

__all__ = ["equilibrium_norms", "high_rate", "norm_ratio", "steady", "steady_words"]


def high_rate(history: History) -> NDArray[np.intp]:
    """Return the rows whose learning rate is at least half its peak, in the median layer.

    Where a schedule takes the rate to zero norms stay behind, and what they would settle at says
    nothing. A log without learning rates is taken whole.
    """
    rates = quantiles(history.settings["lr"], (0.5,))[0]
    share: Array = over(rates, np.nanmax(rates, initial=0.0))
    if not np.isfinite(share).any():
        return np.arange(len(rates))
    return np.flatnonzero(share >= 0.5)


def steady(history: History) -> NDArray[np.intp]:
    """Return the second half of the rows of :func:`high_rate`."""
    rows = high_rate(history)
    return rows[len(rows) // 2 :]


def equilibrium_norms(history: History) -> Array:
    r"""Return norms at equilibrium, without the noise of single batches: (rows, layers).

    The logged equilibrium is that of one batch's gradient. Norms follow the mean square of many,
    and the equilibrium of SGD goes with the root of the size, :math:`|w|^4\propto\hat g^2`; so it
    is the mean of its fourth power that counts. Where gradients do not matter, as for AdamW, the
    mean changes nothing.
    """
    return np.asarray(running_mean(history.of("equilibrium_norm") ** 4) ** 0.25, float)


def norm_ratio(history: History) -> Array:
    """Return norms over :func:`equilibrium_norms`, (rows, layers)."""
    return over(history.of("norm"), equilibrium_norms(history))


def steady_words(history: History) -> str:
    """Return which rows :func:`steady` returns, in words.

    Example:
        >>> entry = {"sphere": "row", "lr": 0.1, "count": 3}
        >>> rows = [{"step": i, "parameters": {"w": entry}} for i in range(1, 9)]
        >>> steady_words(History.from_rows(rows))
        'over the second half'
    """
    rows = steady(history)
    if len(high_rate(history)) == len(history.steps):
        return "over the second half"
    return f"from step {history.steps[rows[0]]:,} to {history.steps[rows[-1]]:,}"

"""Where gradients point and how fast layers turn, each against what is expected."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from sphereopt.report.finding import Finding
from sphereopt.report.history import History
from sphereopt.report.series import Array, lasting_from, over, quantiles, smoothed
from sphereopt.report.words import factor, listed, number

__all__ = ["effective_rates", "radial_gradients", "uneven_angles"]

#: Beyond it theory.is_invariant says no: norm eps and half precision leave up to some 5e-3.
_RADIAL = 1e-2
#: At equilibrium layers of one lr and decay turn alike; sampling and momentum leave 30 %, and the
#: theory's own error is up to 27 %. Before it, initial norms make factors of two or three.
_FASTER = 4.0
#: Without weight decay nothing makes layers alike.
_FASTER_FREE = 12.0
#: A rate fell or rose by this because of norms, not the schedule.
_FADED = 4.0
#: Rows that a comparison needs, and the share of the run it must last.
_ROWS, _SHARE = 5, 0.1
#: A quartile range over this is a standard deviation, for normal numbers.
_IQR = 1.349


def radial_gradients(history: History) -> Iterator[Finding]:
    """Cosines of gradient and weights above 0.01 in the second half, where 0 was claimed."""
    if "grad_radial_share" not in history.values:
        return
    late = slice(len(history.steps) // 2, None)
    centre = np.abs(history.of("grad_radial_share")[late])
    low, high = (history.of("grad_radial_share", q)[late] for q in ("q25", "q75"))
    # Spheres of one layer may point in and out: their median is zero, and their spread is not.
    size = quantiles(np.fmax(centre, (high - low) / _IQR).T, (0.5,))[0]
    claimed = [history.about[name].get("kind") != "constrained" for name in history.names]
    where = np.flatnonzero((size > _RADIAL) & np.array(claimed))
    if len(where):
        where = where[np.argsort(-size[where], kind="stable")]
        names = tuple(history.names[i] for i in where)
        are = "is" if len(names) == 1 else "are"
        sentence = (
            f"{listed(names)} {are} not scale-invariant: |cos(g, w)| "
            f"is {number(size[where[0]])} over the second half, where 0 is expected. A sphere "
            "takes away a norm that means something."
        )
        worst = math.log(size[where[0]] / _RADIAL)
        yield Finding("warning", sentence, names, None, "grad-radial-share", worst)


def uneven_angles(history: History) -> Iterator[Finding]:
    """A layer that turns 4 times faster or slower than those of the same lr and decay, lastingly.

    Without weight decay 12 times.
    """
    if "angle" not in history.values or len(history.steps) < _ROWS:
        return
    angle, groups = history.of("angle"), _alike(history)
    found = []
    for members, decays in groups:
        ratios = smoothed(_over_median(angle[:, members]))
        limit = math.log(_FASTER if decays else _FASTER_FREE)
        for column, i in enumerate(members):
            off = np.log(ratios[:, column])
            start = _lasting(np.abs(off) > limit)
            if start is not None:
                typical = float(np.nanmedian(off[start:]))
                found.append((abs(typical), typical, start, i))
    found.sort(key=lambda x: (-x[0], x[2]))
    for faster in (True, False):
        some = [x for x in found if (x[1] > 0) == faster]
        if some:
            yield _uneven(history, some, faster)


def _uneven(history: History, found: list[tuple[float, float, int, int]], faster: bool) -> Finding:
    size, _, start, _ = found[0]
    names = tuple(history.names[i] for *_, i in found)
    since = int(history.steps[start])
    more = f" ({len(names) - 1} more layers do too)" if len(names) > 2 else ""
    more = f" ({names[1]} does too)" if len(names) == 2 else more
    sentence = (
        f"{names[0]} rotates {factor(math.exp(size))} {'faster' if faster else 'slower'} than the "
        f"median of the layers with its lr and weight decay since step {since:,}{more}."
    )
    return Finding("warning", sentence, names, since if start else None, "angles", size)


def _alike(history: History) -> list[tuple[list[int], bool]]:
    """Return groups of at least three layers of one lr and decay, and whether they decay."""
    groups: dict[tuple[float, float], list[int]] = {}
    decay = history.settings.get("weight_decay")
    for i in range(len(history.names)):
        rates = history.settings["lr"][:, i]
        there = np.flatnonzero(np.isfinite(rates))
        if len(there) >= _ROWS:
            # In the middle of what was logged: a schedule's ends are zero for all.
            row = there[len(there) // 2]
            own = 0.0 if decay is None or not np.isfinite(decay[row, i]) else float(decay[row, i])
            groups.setdefault((float(rates[row]), own), []).append(i)
    return [(members, key[1] > 0) for key, members in groups.items() if len(members) >= 3]


def _over_median(values: Array) -> Array:
    """Return values over the median of their row; NaN where that is not positive."""
    return _positive(over(values, quantiles(values, (0.5,))[0][:, None]))


def _lasting(holds: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> int | None:
    start = lasting_from(holds)
    long_enough = max(_ROWS, _SHARE * len(holds))
    return start if start is not None and len(holds) - start >= long_enough else None


def effective_rates(history: History) -> Iterator[Finding]:
    """An effective learning rate that norms changed by 4, beyond what the schedule did."""
    if "effective_lr" not in history.values or len(history.steps) < 2 * _ROWS:
        return
    rate = _positive(over(history.of("effective_lr"), history.settings["lr"]))
    width = max(_ROWS, len(rate) // 20)
    first = quantiles(rate[:width].T, (0.5,))[0]
    change = np.log(over(quantiles(rate[-width:].T, (0.5,))[0], first))
    change = np.where(np.isfinite(change), change, 0.0)
    where = np.flatnonzero(np.abs(change) > math.log(_FADED))
    if not len(where):
        return
    where = where[np.argsort(-np.abs(change[where]), kind="stable")]
    worst = float(change[where[0]])
    names = tuple(history.names[i] for i in where)
    sentence = (
        f"The effective learning rate of {listed(names)} {'rose' if worst > 0 else 'fell'} "
        f"{factor(math.exp(abs(worst)))} because norms {'fell' if worst > 0 else 'grew'}, on "
        "top of what the schedule did."
    )
    yield Finding("note", sentence, names, None, "effective-lr", abs(worst))


def _positive(values: Array) -> Array:
    return np.where(values > 0, values, np.nan)

"""What is broken: numbers that are none, weights that stopped, gradients that vanished."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sphereopt.report.finding import Finding
from sphereopt.report.history import History
from sphereopt.report.series import lasting_from, middle, over, quantiles, smoothed
from sphereopt.report.words import listed, number

__all__ = ["left", "no_gradient", "not_finite", "partly_stopped", "stopped"]

#: Rows and share of the run that something must last for: fewer can be chance, or a last row.
_ROWS, _SHARE = 3, 0.02
#: An angle or gradient this far below what it was is zero with rounding: networks whose loss goes
#: to zero lose three or four orders of magnitude, a dead layer all.
_GONE = 1e-6
#: Of the gradient of one layer against that of the others, which go along with the loss.
_APART = 1e-4


def not_finite(history: History) -> Iterator[Finding]:
    """Norm, angle or gradient of a layer that was logged, and is not a number. No tolerance."""
    there = present(history)
    for probe, chart, word in (
        ("norm", "norms", "norm"),
        ("angle", "angles", "angle"),
        ("scaled_grad_norm", "scaled-grad-norm", "gradient"),
    ):
        values = history.of(probe, "mean") if probe in history.values else None
        # A probe that never had a value was not measured; only norms always can be.
        if values is None or (probe != "norm" and not np.isfinite(values).any()):
            continue
        measured = np.isfinite(values).any(0) | (probe == "norm")
        bad = there & ~np.isfinite(values) & measured
        if not bad.any():
            continue
        where = np.flatnonzero(bad.any(0))
        first = bad[:, where].argmax(0)
        order = np.argsort(first, kind="stable")
        names = _names(history, where[order])
        since = int(history.steps[first.min()])
        lasts = bool(bad[-1].any())
        text = f"since step {since:,}" if lasts else f"at step {since:,}"
        sentence = f"The {word} of {listed(names)} is not a number {text}."
        # What is not a number is what all else follows from: first of the faults.
        yield Finding("fault", sentence, names, since, chart, math.inf)
        return


def stopped(history: History) -> Iterator[Finding]:
    """Weights that turn by less than a millionth of what they did, to the end of the log."""
    if "angle" not in history.values:
        return
    angle, lr, there = history.of("angle"), history.settings["lr"], present(history)
    faults: list[tuple[int, int]] = []
    idle: list[tuple[int, int]] = []
    for i in range(angle.shape[1]):
        rows = np.flatnonzero(there[:, i] & np.isfinite(angle[:, i]))
        if len(rows) < _ROWS:
            continue
        values = angle[rows, i]
        typical = middle(values[values > 0])
        start = lasting_from(~(values > _GONE * typical))
        if start is None or len(rows) - start < max(_ROWS, _SHARE * len(rows)):
            continue
        zero_rate = bool(np.all(lr[rows[start:], i] == 0))
        (idle if zero_rate else faults).append((int(rows[start]), i))
    for found, severity, reason in (
        (faults, "fault", "though its learning rate is not zero: no gradient, or rounding"),
        (idle, "note", "because the learning rate is zero"),
    ):
        if found:
            yield _stopped(history, sorted(found), severity, reason)


def _stopped(history: History, found: list[tuple[int, int]], severity: Any, reason: str) -> Finding:
    names = _names(history, [i for _, i in found])
    row = found[0][0]
    since = int(history.steps[row])
    what = f"does not turn since step {since:,}" if row else "never turned"
    sentence = f"{listed(names)} {what}, {reason}."
    return Finding(severity, sentence, names, since, "angles", 100.0 + len(found))


def partly_stopped(history: History) -> Iterator[Finding]:
    """A quarter of a layer's spheres that do not turn while others do, over the second half."""
    if "angle" not in history.values:
        return
    late = slice(len(history.steps) // 2, None)
    low = quantiles(history.of("angle", "q25")[late].T, (0.9,))[0]
    middles = quantiles(history.of("angle")[late].T, (0.1,))[0]
    where = np.flatnonzero((low == 0) & (middles > 0))
    if len(where) and len(history.steps) >= _ROWS:
        names = _names(history, where)
        sentence = (
            f"At least a quarter of the spheres of {listed(names)} did not turn in the second "
            "half: dead units, which get no gradient."
        )
        since = int(history.steps[late][0])
        yield Finding("warning", sentence, names, since, "angles", 1.0 + len(where))


def no_gradient(history: History) -> Iterator[Finding]:
    """A gradient that fell by 10^4 against the other layers', or by 10^6 where it has no others."""
    if "scaled_grad_norm" not in history.values or len(history.steps) < 2 * _ROWS:
        return
    sizes = history.of("scaled_grad_norm")
    others = quantiles(sizes, (0.5,))[0][:, None]
    alone = sizes.shape[1] < 3
    relative = sizes if alone else over(sizes, others)
    first = quantiles(relative[: max(_ROWS, len(relative) // 4)].T, (0.5,))[0]
    found = []
    for i in range(sizes.shape[1]):
        ratio = over(smoothed(relative[:, [i]])[:, 0], first[i])
        start = lasting_from(ratio < (_GONE if alone else _APART))
        if start is not None and len(ratio) - start >= max(_ROWS, _SHARE * len(ratio)):
            found.append((float(ratio[-1]), start, i))
    if found:
        found.sort()
        ratio_end, start, _ = found[0]
        names = _names(history, [i for *_, i in found])
        since = int(history.steps[start])
        left_over = "nothing" if ratio_end == 0 else f"{number(ratio_end)} of what it was"
        against = "" if alone else ", measured against the other layers'"
        sentence = (
            f"The gradient of {listed(names)} vanished at about step {since:,}: {left_over} is "
            f"left{against}."
        )
        size = 50.0 if ratio_end == 0 else -math.log(ratio_end)
        yield Finding("fault", sentence, names, since, "scaled-grad-norm", size)


def left(history: History) -> Iterator[Finding]:
    """A layer that got a gradient before and none in the last twentieth of the run."""
    there = present(history)
    rows = len(there)
    last = np.where(there.any(0), rows - 1 - there[::-1].argmax(0), rows)
    where = np.flatnonzero(rows - 1 - last >= max(_ROWS, 0.05 * rows))
    if len(where):
        where = where[np.argsort(last[where], kind="stable")]
        names = _names(history, where)
        step = int(history.steps[last[where[0]]])
        last_seen = f"{listed(names)} was logged last at step {step:,}"
        sentence = f"{last_seen}: no gradient since, frozen or unused."
        yield Finding("warning", sentence, names, step, "norms", 1.0)


def present(history: History) -> NDArray[np.bool_]:
    """Return which layers are in which rows: (rows, layers)."""
    there: NDArray[np.bool_] = np.isfinite(history.settings["lr"])
    for values in history.values.values():
        there = there | np.isfinite(values).any(-1)
    return there


def _names(history: History, where: Any) -> tuple[str, ...]:
    return tuple(history.names[int(i)] for i in where)

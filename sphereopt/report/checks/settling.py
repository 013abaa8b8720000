"""Norms and angles against what weight decay and growth should make of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sphereopt.report.finding import Finding
from sphereopt.report.history import History
from sphereopt.report.rates import high_rate, norm_ratio, steady, steady_words
from sphereopt.report.series import Array, lasting_from, middle, over, quantiles, smoothed
from sphereopt.report.words import listed, number, percent
from sphereopt.theory import Settling, at_equilibrium

__all__ = ["Balance", "balance", "drift_when_fixed", "equilibrium", "lost_growth"]
__all__ += ["predicted_angles"]

#: Half precision rounds a norm by less; ten times what stochastic rounding leaves.
_DRIFT = 1e-2
#: What theory and networks differ by in norm, doubled, as in theory.at_equilibrium.
_NORM = 0.2
#: In angle: networks were within 9 % for SGD and AdamW.
_ANGLE = 0.1
#: Distance at which a norm counts as arrived, as in theory.at_equilibrium.
_ARRIVED = 0.05
#: Relaxation times after which a distance that remains is not one left from the start: e^-4 is 2 %.
_LONG = 4.0
#: Growth that is missing, as a share of what steps give.
_LOST = 0.25
#: Standard errors that count as certain. Momentum makes successive gaps alike, so that the error is
#: up to four times what it seems.
_SURE = 10
_ROWS = 10


@dataclass(frozen=True)
class Balance:
    """Where the norms of a run stand, over all layers with an equilibrium.

    Attributes:
        settling: What :func:`sphereopt.theory.at_equilibrium` says of the median layer.
        step: The step it is said of: the last at which lr was at least half its peak.
        steps_left: Steps at that lr until the norm is within 5 %, 0 if it is.
    """

    settling: Settling
    step: int
    steps_left: float


def drift_when_fixed(history: History) -> Iterator[Finding]:
    """A norm that changed by more than 1 % though the header says it is fixed."""
    fixed = [_radius(history, name) == "fixed" for name in history.names]
    if not any(fixed) or "norm" not in history.values:
        return
    norm = history.of("norm")
    found = []
    for i in np.flatnonzero(fixed):
        there = np.flatnonzero(np.isfinite(norm[:, i]) & (norm[:, i] > 0))
        if len(there) >= 2:
            drift = norm[there, i] / norm[there[0], i] - 1
            start = lasting_from(np.abs(drift) > _DRIFT)
            if start is not None:
                found.append((abs(float(drift[-1])), float(drift[-1]), int(there[start]), int(i)))
    if found:
        found.sort(reverse=True)
        _, drift_end, row, _ = found[0]
        names = tuple(history.names[i] for *_, i in found)
        since = int(history.steps[row])
        sentence = (
            f"The norm of {listed(names)} drifted by {percent(drift_end)} on a sphere of fixed "
            f"radius, beyond 1 % since step {since:,}: something else writes the weights, or "
            "their precision is too low."
        )
        yield Finding("warning", sentence, names, since, "norms", abs(math.log1p(drift_end)) + 1)


def _radius(history: History, name: str) -> object:
    members = name.split(" + ")
    for run in reversed(history.runs):
        for group in run.get("groups", ()):
            if members[0] in group.get("names", ()):
                return group.get("radius")
    return None


def equilibrium(history: History) -> Iterator[Finding]:
    """Norms more than 20 % from where they should settle, by theory.at_equilibrium."""
    found = balance(history)
    if found is None:
        return
    settling, side = found.settling, "above" if found.settling.distance > 0 else "below"
    when = "at the end" if found.step == history.steps[-1] else f"at step {found.step:,}"
    off = f"{percent(abs(settling.distance))} {side} equilibrium {when}"
    size = abs(math.log1p(max(settling.distance, -0.999)))
    names = _with_equilibrium(history)
    if abs(settling.distance) <= _NORM:
        sentence = f"Norms had settled: the median layer was within {percent(_NORM)} of equilibrium"
        text = f"{sentence} ({percent(abs(settling.distance))} {side}) {when}."
        yield Finding("good", text, names, None, "norms", size)
        return
    if settling.verdict == "elsewhere":
        sentence = f"Norms stand still {off}: gradients are not the noise that theory assumes."
        yield Finding("note", sentence, names, None, "norms", size)
        return
    towards = settling.drift * settling.distance < 0
    moving = "falling" if settling.drift < 0 else "rising"
    text = f"Norms were {off} and {moving}, away from it: the gradients' size is changing."
    if towards and settling.relaxations > _LONG:
        text = f"Norms were {off} and {moving}: gradients change faster than norms follow."
    elif towards:
        text = (
            f"Norms were {off} and still {moving}: the run ends before they get there, which takes "
            f"about {_rounded(found.steps_left):,} more steps at that learning rate."
        )
    short = towards and settling.relaxations <= _LONG
    yield Finding("warning" if short else "note", text, names, None, "norms", size)


def _rounded(steps: float) -> int:
    """Return a number of steps with two digits: more would be a promise."""
    return int(float(f"{steps:.2g}"))


def balance(history: History) -> Balance | None:
    """Return where the norms of the median layer stand, None if the log does not say.

    Needs ``equilibrium_norm`` and ``K_measured``, which a log without weight decay lacks, and at
    least ten rows.
    """
    needed = ("norm", "angle", "equilibrium_norm", "K_measured")
    if any(probe not in history.values for probe in needed):
        return None
    ratio = norm_ratio(history)
    rate = _relaxation_rate(history)
    rows = np.flatnonzero(np.isfinite(ratio * rate).any(1))
    high = np.intersect1d(rows, high_rate(history))
    if len(high) < _ROWS:
        return None
    rows = rows[rows <= high[-1]]
    course = smoothed(quantiles(ratio, (0.5,))[0][rows][:, None])[:, 0]
    each = quantiles(rate, (0.5,))[0][rows]
    gaps = np.diff(history.steps[rows], prepend=history.steps[rows[0]] - 1)
    if not (np.isfinite(course) & (course > 0) & np.isfinite(each) & (each > 0)).all():
        return None
    settling = at_equilibrium(course, relaxation=1 / (each * np.maximum(gaps, 1)), expected=1.0)
    steps_left = _steps_left(settling.distance, _power(history)) / float(each[-1])
    return Balance(settling, int(history.steps[rows[-1]]), steps_left)


def _steps_left(distance: float, power: int) -> float:
    """Return relaxation times until a norm is within 5 %, where a power of it relaxes."""
    near = 1 + math.copysign(_ARRIVED, distance)
    ratio = abs((1 + distance) ** power - 1) / abs(near**power - 1)
    return math.log(ratio) if ratio > 1 else 0.0


def _relaxation_rate(history: History) -> Array:
    """Return how fast a distance from equilibrium shrinks per step, from kappa = K angle^2 / 2."""
    return _power(history) * history.of("K_measured") * history.of("angle") ** 2 / 2


def _power(history: History) -> int:
    """Return the power of the norm that relaxes exponentially.

    The fourth where the step shrinks with the norm's square (SGD), the second where with the norm.
    """
    return 4 if any(run.get("rule") == "sgd" for run in history.runs) else 2


def _with_equilibrium(history: History) -> tuple[str, ...]:
    there = np.isfinite(history.of("equilibrium_norm")).any(0)
    return tuple(history.names[i] for i in np.flatnonzero(there))


def predicted_angles(history: History) -> Iterator[Finding]:
    """Angles against those at equilibrium over the second half: 10 % passes as the same."""
    if "equilibrium_angle" not in history.values or "angle" not in history.values:
        return
    late, when = steady(history), steady_words(history)
    ratio = over(history.of("angle")[late], history.of("equilibrium_angle")[late])
    each = quantiles(ratio.T, (0.5,))[0]
    if np.isfinite(each).sum() == 0 or len(late) < 3:
        return
    typical = middle(each)
    names = tuple(history.names[i] for i in np.flatnonzero(np.isfinite(each)))
    off = abs(typical - 1)
    if off <= _ANGLE:
        sentence = f"Angles followed the prediction within {_within(off)} {when}."
        yield Finding("good", sentence, names, None, "angles", 1 - off)
    elif balance(history) is None or abs(typical - 1) > _NORM:
        side = "above" if typical > 1 else "below"
        sentence = (
            f"Angles were {percent(off)} {side} those at equilibrium {when}, in the median layer."
        )
        yield Finding("note", sentence, names, None, "angles", abs(math.log(typical)))


def _within(off: float) -> str:
    return percent(max(math.ceil(round(100 * off, 3)), 1) / 100)


def lost_growth(history: History) -> Iterator[Finding]:
    """Growth that falls short of the law by a quarter of what steps give, on average."""
    if any(probe not in history.values for probe in ("growth", "growth_law", "angle")):
        return
    late = steady(history)
    law = history.of("growth_law", "mean")[late]
    gap = history.of("growth", "mean")[late] - law
    given = _given(history, law, late)
    found = []
    for i in range(gap.shape[1]):
        there = np.isfinite(gap[:, i]) & (given[:, i] > 0)
        if there.sum() < _ROWS:
            continue
        values, scale = gap[there, i], float(np.mean(given[there, i]))
        error = float(np.std(values)) / math.sqrt(there.sum())
        share = float(np.mean(values)) / scale
        if share < -_LOST and abs(np.mean(values)) > _SURE * error:
            found.append((-share, float(np.mean(values)), i))
    if found:
        found.sort(reverse=True)
        names = tuple(history.names[i] for *_, i in found)
        sentence = (
            f"The norm of {listed(names)} grew by {number(-found[0][1])} per step less than its "
            "steps and weight decay imply: rounding swallows growth, or gradients point outwards."
        )
        yield Finding("warning", sentence, names, None, "growth", found[0][0])


def _given(history: History, law: Array, rows: NDArray[np.intp]) -> Array:
    """Return the growth that steps give before weight decay takes its part: (rows, layers)."""
    square = history.of("angle", "mean")[rows] ** 2 / 2
    if "K_measured" not in history.values:
        return square
    taken = history.of("K_measured")[rows] * history.of("angle")[rows] ** 2 / 2
    return np.where(np.isfinite(taken), np.maximum(law + taken, square), square)

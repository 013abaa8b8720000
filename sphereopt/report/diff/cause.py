"""What the calculator says two runs' options alone make of norms and angles."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sphereopt.moves import RADIANS
from sphereopt.report.diff.align import Aligned, Rows
from sphereopt.report.diff.settings import members, options
from sphereopt.report.history import History
from sphereopt.report.series import Array
from sphereopt.theory import OPTIMIZERS, equilibrium, trajectory

__all__ = ["CAUSES", "Prediction", "predictions"]

#: Options that the calculator follows.
CAUSES: tuple[str, ...] = ("optimizer", "lr", "weight_decay", "momentum", "betas", "dampening")
CAUSES += ("nesterov", "radius", "move")
#: Optimizers whose norms follow from what a log has: Adam with L2 and Muon need shapes.
_KNOWN = ("sgd", "adamw", "lion")
#: Steps that are followed in all, some seconds.
_STEPS = 1_000_000


@dataclass(frozen=True)
class Prediction:
    """What options alone make of one layer: b over a, geometric mean over the second half.

    Attributes:
        norm: Ratio of norms.
        angle: Ratio of angles per step, None if they follow from what a log does not have.
    """

    norm: float
    angle: float | None


@dataclass(frozen=True)
class _Walk:
    norm: Array
    angle: Array | None


@dataclass(frozen=True)
class _Common:
    """What both runs of a layer are given, so that options alone make them differ."""

    start: float
    gradients: Array
    dim: float | None


def predictions(a: History, b: History, on: Aligned, names: Iterable[str]) -> dict[str, Prediction]:
    r"""Return what the calculator predicts of layers, if both runs began alike.

    Both runs are followed step by step (:func:`sphereopt.theory.trajectory`) with the rate and
    decay of their own logs and the options of their own headers, but from the same norm and with
    gradients of the same size: of each the geometric mean of the two, at every common step.

    Args:
        a: The first log.
        b: The second.
        on: Their common steps.
        names: Layers, the most important first: as many as a million steps allow.

    Returns:
        Layer to prediction, where there is one: not without headers, for an optimizer that the
        calculator does not follow from a log alone (it follows SGD, AdamW and Lion), or for weights
        that are on spheres by choice.
    """
    first, second = options(a), options(b)
    if len(on.steps) < 3 or not first or not second:
        return {}
    length = int(on.steps[-1] - on.steps[0])
    found = {}
    for name in list(names)[: _STEPS // (2 * length)]:
        common = _common(a, b, on, name, (first, second))
        walks = common and [
            _walk(_options_of(name, given), _rates(history, rows, name), on, common)
            for history, rows, given in ((a, on.a, first), (b, on.b, second))
        ]
        if walks and walks[0] is not None and walks[1] is not None:
            found[name] = _prediction(walks[0], walks[1], on)
    return found


def _prediction(a: _Walk, b: _Walk, on: Aligned) -> Prediction:
    late = on.steps >= on.half
    angle = None
    if a.angle is not None and b.angle is not None:
        angle = _typical_ratio(a.angle[late], b.angle[late])
    norm = _typical_ratio(a.norm[late], b.norm[late])
    return Prediction(1.0 if norm is None else norm, angle)


def _typical_ratio(a: Array, b: Array) -> float | None:
    there = (a > 0) & (b > 0)
    return float(np.exp(np.mean(np.log(b[there] / a[there])))) if there.any() else None


def _options_of(name: str, given: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return a sphere's options, none if its parameters have different ones."""
    each = [given.get(member, {}) for member in members(name)]
    return each[0] if all(x == each[0] for x in each) else {}


def _rates(history: History, rows: Rows, name: str) -> tuple[Array, Array]:
    i = history.names.index(name)
    lr, decay = (rows.of(history.settings[key])[:, i] for key in ("lr", "weight_decay"))
    return lr, decay


def _common(
    a: History,
    b: History,
    on: Aligned,
    name: str,
    given: tuple[Mapping[str, Mapping[str, Any]], Mapping[str, Mapping[str, Any]]],
) -> _Common | None:
    """Return what both runs of a layer are given, None if the logs do not say it."""
    sizes, norms, dims = [], [], []
    for history, rows, told in ((a, on.a, given[0]), (b, on.b, given[1])):
        if not {"norm", "scaled_grad_norm"} <= history.values.keys():
            return None
        i = history.names.index(name)
        sizes.append(rows.of(history.of("scaled_grad_norm", "mean"))[:, i])
        norms.append(rows.of(history.of("norm"))[:, i])
        dims.append(_dim(history, rows, name, _options_of(name, told)))
    with np.errstate(divide="ignore", invalid="ignore"):
        both = 0.5 * (np.log(sizes[0]) + np.log(sizes[1]))
        start = 0.5 * (np.log(norms[0][0]) + np.log(norms[1][0]))
    there = np.isfinite(both)
    if not there.any() or not math.isfinite(start):
        return None
    every = np.arange(on.steps[0] + 1, on.steps[-1] + 1)
    gradients = np.exp(np.interp(every, on.steps[there], both[there]))
    return _Common(math.exp(start), gradients, next(filter(None, dims), None))


def _dim(history: History, rows: Rows, name: str, given: Mapping[str, Any]) -> float | None:
    """Return the number of weights of a sphere, which the logged equilibrium norm tells."""
    if given.get("rule") not in ("adamw", "lion") or "equilibrium_norm" not in history.values:
        return None
    (lr, decay), i = _rates(history, rows, name), history.names.index(name)
    norm = rows.of(history.of("equilibrium_norm"))[:, i]
    there = np.flatnonzero(np.isfinite(norm) & (lr * decay > 0))
    if not there.size:
        return None
    rule, row = str(given["rule"]), there[0]
    try:
        hyper = _hyper(rule, given)
        rms = equilibrium(rule, lr=lr[row], weight_decay=decay[row], **hyper).rms
    except (ValueError, TypeError):
        return None
    return round((float(norm[row]) / rms) ** 2) if rms else None


def _hyper(rule: str, given: Mapping[str, Any]) -> dict[str, Any]:
    # eps is left out, as in the equilibria that the tracker logs.
    found = {key: given[key] for key in OPTIMIZERS[rule][0] if key in given and key != "eps"}
    return {key: tuple(x) if isinstance(x, list) else x for key, x in found.items()}


def _walk(
    given: Mapping[str, Any], rates: tuple[Array, Array], on: Aligned, common: _Common
) -> _Walk | None:
    """Return norms and angles at the common steps, None if the calculator does not know them."""
    rule, radius, turns = given.get("rule"), given.get("radius"), given.get("move") in RADIANS
    if given.get("sphere") is None or given.get("kind") == "constrained":
        return None
    if not (np.isfinite(rates[0]).all() and np.isfinite(rates[1]).all()):
        return None
    if radius == "fixed":
        return _Walk(np.full(len(on.steps), common.start), rates[0] if turns else None)
    special = given.get("amsgrad") or given.get("second_moment", "entry") != "entry"
    if radius not in (None, "free") or turns or special or rule not in _KNOWN:
        return None
    return _followed(str(rule), given, rates, on, common)


def _followed(
    rule: str, given: Mapping[str, Any], rates: tuple[Array, Array], on: Aligned, common: _Common
) -> _Walk | None:
    every = np.arange(on.steps[0] + 1, on.steps[-1] + 1)
    lr, decay = (np.interp(every, on.steps, rate) for rate in rates)
    size: dict[str, Any] = {"norm0": common.start, "grad_norm": common.gradients}
    if rule != "sgd":
        if common.dim is None:
            return None
        size |= {"dim": int(common.dim)}
    try:
        run = trajectory(rule, lr=lr, weight_decay=decay, **size, **_hyper(rule, given))
    except (ValueError, TypeError):
        return None
    if run.norm is None:
        return None
    # Row t of a trajectory is step t + 1 after the first common one.
    at = np.maximum(on.steps - on.steps[0] - 1, 0)
    return _Walk(run.norm[at], run.angle[at])

"""What to make of a log: is the norm at equilibrium, is the block scale-invariant after all?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypedDict, Unpack

import numpy as np
from numpy.typing import ArrayLike

from sphereopt.theory.errors import OutOfRangeError, number, whole
from sphereopt.theory.logs import Moments, logged, rows, sgd_steps, start
from sphereopt.theory.moments import Array

__all__ = ["Invariance", "SGDLog", "Settling", "at_equilibrium", "is_invariant", "radial_share"]

#: What theory and networks differ by, doubled: beyond it they disagree.
_ELSEWHERE = 0.2


@dataclass(frozen=True)
class Settling:
    """Whether a norm is at equilibrium.

    Attributes:
        verdict: ``"settled"``, ``"rising"``, ``"falling"``, ``"elsewhere"`` (it stands still, but
            not where it was expected) or ``"too short"`` (less than a relaxation time is logged).
        drift: Relative change of the norm per relaxation time, over the last one.
        distance: Of the last norm from the expected one, as a share of that; without one what the
            drift says, ``-drift``, which is right near equilibrium.
        relaxations: How many relaxation times the log lasts.
    """

    verdict: str
    drift: float
    distance: float
    relaxations: float

    def __str__(self) -> str:
        if self.verdict == "too short":
            return f"too short: the log lasts {self.relaxations:.2g} relaxation times"
        moved = f"{self.drift:+.1%} per relaxation time, about {abs(self.distance):.1%}"
        side = "above" if self.distance > 0 else "below"
        return f"{self.verdict}: {moved} {side} equilibrium, {self.relaxations:.2g} logged"


def at_equilibrium(
    norms: ArrayLike,
    *,
    relaxation: ArrayLike,
    expected: ArrayLike | None = None,
    tolerance: float = 0.05,
) -> Settling:
    r"""Return whether a logged norm is at equilibrium.

    .. math::
        drift = \frac{d\ln|w|}{ds}, \qquad s_t = \sum_{k \le t} \frac{1}{relaxation_k}

    fitted by least squares over the last unit of :math:`s`. Near equilibrium the relative distance
    from it is :math:`-drift`.

    Args:
        norms: Norm of the weights after each step, (steps,).
        relaxation: Relaxation time in steps, as :func:`equilibrium` returns it: a constant or
            (steps,). Under a schedule it is that of the peak times ``peak/lr[t]``.
        expected: Norm at equilibrium, a constant or (steps,).
        tolerance: Drift that passes as none.

    Returns:
        The verdict with its numbers.

    Raises:
        OutOfRangeError: If a value is out of range or a shape does not fit.

    Notes:
        *Valid when* the norm fluctuates by less than ``tolerance``: look at the mean over the
        blocks of a layer rather than at one small block. A norm that is frozen because the learning
        rate went to zero is not settled: its log is short in relaxation times.

    References:
        Reconciling Modern Deep Learning with Traditional Optimization Analyses: The Intrinsic
        Learning Rate, Li, Lyu and Arora, 2020 (time in units of lr times decay).

    Example:
        >>> import numpy as np
        >>> decaying = 1 + 2 * np.exp(-np.arange(500) / 100)
        >>> print(at_equilibrium(decaying, relaxation=100))
        settled: -2.2% per relaxation time, about 2.2% above equilibrium, 5 logged
        >>> at_equilibrium(decaying[:200], relaxation=100).verdict
        'falling'
    """
    r = logged("norms", norms)
    if r.ndim != 1 or len(r) < 2 or not np.all(r > 0):
        raise OutOfRangeError("norms", r.shape, "must be at least two positive norms of one block")
    number("tolerance", tolerance, above=0)
    times = _like("relaxation", relaxation, r)
    clock = np.cumsum(1 / times)
    last = clock >= clock[-1] - 1
    last[-2:] = True
    drift = _slope(clock[last], np.log(r[last]))
    distance = -drift if expected is None else float(r[-1] / _like("expected", expected, r)[-1] - 1)
    if clock[-1] < 1:
        verdict = "too short"
    elif abs(drift) > tolerance:
        verdict = "rising" if drift > 0 else "falling"
    else:
        verdict = "elsewhere" if abs(distance) > _ELSEWHERE else "settled"
    return Settling(verdict, drift, distance, float(clock[-1]))


def radial_share(
    grad_norms: ArrayLike,
    norms: ArrayLike,
    *,
    lr: ArrayLike,
    weight_decay: ArrayLike = 0.0,
    norm0: ArrayLike,
    overlaps: ArrayLike | None = None,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    decoupled: bool = False,
) -> Array:
    r"""Return the cosine between gradient and weights under SGD, from norms.

    What of the new norm a gradient across the weights does not explain. Without momentum

    .. math::
        \frac{\langle g_t, w_t\rangle}{|g_t||w_t|} =
        \frac{a^2|w_t|^2 + lr^2|g_t|^2 - |w_{t+1}|^2}{2\,a\,lr\,|g_t||w_t|}, \qquad
        a = 1 - lr\,\lambda

    Args:
        grad_norms: As in :func:`norm_from_gradients`, (n,) or (n, blocks).
        norms: Norm of the weights after each step, of the same shape.
        lr: As in :func:`norm_from_gradients`, and so are the others.
        weight_decay: Weight decay.
        norm0: Norm before the first step.
        overlaps: Inner product of momentum buffer and gradient; needed with momentum.
        momentum: Momentum.
        dampening: Dampening.
        nesterov: Whether momentum is Nesterov's.
        decoupled: Whether weight decay is.

    Returns:
        The cosine at every step, of the shape of ``norms``; 0 where the gradient is.

    Raises:
        OutOfRangeError: If a value is out of range or a shape does not fit.

    Notes:
        An identity, also for weights that are not scale-invariant. Norms rounded to a relative
        :math:`\epsilon` leave an error of about :math:`\epsilon|w|/(lr|g|)`.

    References:
        L2 Regularization versus Batch and Weight Normalization, van Laarhoven, 2017 (the gradient
        is orthogonal to scale-invariant weights).

    Example:
        >>> radial_share([1.0], [2.0], lr=1.0, norm0=3.0).tolist()  # straight inwards
        [1.0]
    """
    g = logged("grad_norms", grad_norms)
    after = logged("norms", norms, g.shape)
    if overlaps is None and momentum != 0:
        raise OutOfRangeError("overlaps", None, "must be given with momentum")
    x = np.zeros_like(g) if overlaps is None else logged("overlaps", overlaps, g.shape, low=None)
    hyper = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov}
    if not np.all(logged("lr", lr, scalar=True) > 0):
        raise OutOfRangeError("lr", 0.0, "must be positive at every step: such a step says nothing")
    state: Moments = (start(norm0, g), 0.0, 0.0)
    lengths, result = [], []
    all_steps = sgd_steps(len(g), lr, weight_decay, decoupled, hyper)
    for step, g2, overlap, square in zip(
        all_steps, rows(g**2), rows(x), rows(after**2), strict=True
    ):
        across = step.moments(state, g2, overlap, 0.0)[0]
        radial = (across - square) / (2 * step.kept * step.fresh)
        lengths.append(g2 * state[0])
        result.append(radial)
        _, c, m = step.moments(state, g2, overlap, radial)
        state = (square, c, m)
    length = np.sqrt(np.array(lengths).reshape(g.shape))
    inner = np.array(result).reshape(g.shape)
    share: Array = np.divide(inner, length, out=np.zeros_like(g), where=length > 0)
    return share


class SGDLog(TypedDict, total=False):
    """What :func:`radial_share` takes beside norms."""

    lr: ArrayLike
    weight_decay: ArrayLike
    overlaps: ArrayLike | None
    momentum: float
    dampening: float
    nesterov: bool
    decoupled: bool


@dataclass(frozen=True)
class Invariance:
    """Whether a block behaves as scale-invariant weights do.

    Attributes:
        verdict: By the share ``"yes"``, ``"nearly"`` (up to ten times the tolerance) or ``"no"``;
            by the slope, which is weaker evidence, ``"consistent"`` or ``"doubtful"``; or
            ``"cannot tell"``.
        evidence: What the number is: ``"radial share"`` or ``"slope"``.
        value: Root mean square cosine between gradient and weights, 0 if invariant; or the slope of
            the logarithm of the gradient's norm over that of the weights', -1 if invariant.
        error: What ``value`` is uncertain by.
    """

    verdict: str
    evidence: str
    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.verdict}: {self.evidence} {self.value:.2g} (uncertain by {self.error:.1g})"


def is_invariant(
    grad_norms: ArrayLike,
    norms: ArrayLike,
    *,
    norm0: ArrayLike,
    radial: ArrayLike | None = None,
    dim: int | None = None,
    tolerance: float = 1e-3,
    precision: float = 1e-7,
    **sgd: Unpack[SGDLog],
) -> Invariance:
    r"""Return whether a block is scale-invariant, judged by its log.

    The best evidence that the log has is used:

    .. math::
        \text{radial share:}\quad \frac{\langle g_t, w_t\rangle}{|g_t||w_t|} = 0, \qquad
        \text{slope:}\quad \frac{d\ln|g_t|}{d\ln|w_t|} = -1

    Args:
        grad_norms: Norm of the gradient of the loss alone, (n,) or (n, blocks).
        norms: Norm of the weights after each step, of the same shape.
        norm0: Norm before the first step, a number or (blocks,).
        radial: Logged :math:`\langle g_t, w_t\rangle`, of the same shape. Without it the share is
            what the norms of an SGD run say, if its settings are given, see :func:`radial_share`.
        dim: Number of weights of a block, if it is large. Gradients that have nothing to do with
            the weights have a share of :math:`1/\sqrt{dim}`, so ``tolerance`` is lowered to a
            tenth of that.
        tolerance: Share that passes as none. BatchNorm with an eps of 1e-5 leaves some 5e-5.
        precision: Relative rounding error of the logged numbers.
        **sgd: ``lr`` and the further arguments of :func:`radial_share`, if the run was SGD.

    Returns:
        The verdict with the number behind it.

    Raises:
        OutOfRangeError: If a value is out of range or a shape does not fit.

    Notes:
        Steps and blocks without gradient are left out. The radial share decides, for the states
        that were visited. The slope does not decide:
        gradients also change because the loss does, so that it says at most ``"consistent"``, and
        nothing where the norm moves by less than a tenth. ``find_spheres`` decides for the model
        itself.

    References:
        L2 Regularization versus Batch and Weight Normalization, van Laarhoven, 2017 (gradient
        orthogonal to the weights, and inverse to their norm).

    Example:
        >>> print(is_invariant([1.0, 2.0], [3.0, 3.0], norm0=3.0, radial=[0.0, 0.0]))
        yes: radial share 0 (uncertain by 1e-07)
    """
    g = logged("grad_norms", grad_norms)
    after = logged("norms", norms, g.shape)
    first = np.reshape(start(norm0, g), (1, *g.shape[1:]))
    before = np.sqrt(np.concatenate([first, after[:-1] ** 2]))
    seen = (g > 0) & (before > 0)
    if not np.any(seen):
        return Invariance("cannot tell", "radial share", math.nan, math.inf)
    if dim is not None:
        tolerance = min(tolerance, 0.1 / math.sqrt(whole("dim", dim, low=1)))
    if radial is not None:
        share = logged("radial", radial, g.shape, low=None)[seen] / (g * before)[seen]
        error = precision
    elif "lr" in sgd and (sgd.get("momentum", 0) == 0 or sgd.get("overlaps") is not None):
        share = radial_share(g, after, norm0=norm0, **sgd)[seen]
        rate = np.asarray(sgd["lr"], float).reshape(-1, *[1] * (g.ndim - 1))
        error = precision * _rms((before / rate)[seen] / g[seen])
    else:
        whole_log = np.all(seen, axis=0)
        return _by_slope(np.log(g[..., whole_log]), np.log(before[..., whole_log]))
    return _by_share(_rms(share), error, tolerance)


def _by_share(value: float, error: float, tolerance: float) -> Invariance:
    if error > tolerance and value < 10 * error:
        verdict = "cannot tell"
    elif value <= tolerance:
        verdict = "yes"
    else:
        verdict = "nearly" if value <= 10 * tolerance else "no"
    return Invariance(verdict, "radial share", value, error)


def _rms(x: Array) -> float:
    return float(np.sqrt(np.mean(x**2)))


_PARTS = 10


def _by_slope(log_g: Array, log_w: Array) -> Invariance:
    """Judge by how gradients scale with weights, from means over parts of the log."""
    if len(log_g) < 2 * _PARTS or log_g.size == 0:
        return Invariance("cannot tell", "slope", math.nan, math.inf)
    x, y = (_parts(values) for values in (log_w, log_g))
    if np.ptp(x, axis=0).max() < math.log(1.1):
        return Invariance("cannot tell", "slope", math.nan, math.inf)
    slope = float(np.sum(x * y) / np.sum(x * x))
    error = math.sqrt(float(np.sum((y - slope * x) ** 2) / np.sum(x * x)) / (_PARTS - 2))
    if error > 0.1:
        verdict = "cannot tell"
    else:
        verdict = "consistent" if abs(slope + 1) <= 0.1 + 2 * error else "doubtful"
    return Invariance(verdict, "slope", slope, error)


def _parts(values: Array) -> Array:
    """Return means over ten parts of the log, less the mean of each block."""
    means = np.array([part.mean(axis=0) for part in np.array_split(values, _PARTS)])
    return np.asarray(means - means.mean(axis=0), float)


def _like(name: str, x: ArrayLike, like: Array) -> Array:
    """Return positive numbers, one for each step."""
    array = logged(name, x, scalar=True)
    if array.shape not in ((), like.shape) or not np.all(array > 0):
        raise OutOfRangeError(name, array.shape, f"must be positive, one or {like.shape} of them")
    return np.broadcast_to(array, like.shape)


def _slope(x: Array, y: Array) -> float:
    """Return the slope of the least-squares line."""
    off = x - x.mean()
    return float(off @ (y - y.mean()) / (off @ off))

r"""The recursion behind every prediction: second moments of weights and buffer under noise.

*Assumes* gradients without memory, orthogonal to the weights and the buffer on average, of size
:math:`|g| = \hat g/|w|` (scale invariance): a random walk on the sphere. Then three numbers close,

.. math::
    R = E|w|^2, \qquad C = E\langle w, m\rangle, \qquad M = E|m|^2,

for every optimizer that is a linear filter of its gradients times a number. Division by the second
moment, sign and orthogonalization are such a number (Bussgang), plus noise of their own.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sphereopt.theory.rules import Filter, Rule, SecondMoment
from sphereopt.theory.shapes import Shape

__all__ = ["Array", "Stationary", "Steps", "Walk", "stationary", "steps", "walk"]

Array = NDArray[np.float64]

_STRETCH = 65_536


@dataclass(frozen=True)
class Steps:
    r"""What the recursion needs of each step, arrays of one length.

    Attributes:
        shrink: :math:`lr\,\lambda` where decay is decoupled, else 0: weights are multiplied by
            :math:`1 - shrink`.
        added: :math:`\lambda` where decay is coupled, else 0: times the weights it is added to the
            gradient.
        scale: What the filter's output is multiplied by, but for the root in the denominator.
        eps: What is added to that root.
        power: Squared norm of the step over that of its linear part: the rest is white noise.
        tail: Inner product of weights and step that the linear part does not explain, over the
            squared norm of that part.
    """

    shrink: Array
    added: Array
    scale: Array
    eps: Array
    power: Array
    tail: Array


@dataclass(frozen=True)
class Walk:
    r"""What the recursion returns for each step.

    Attributes:
        squares: :math:`E|w|^2` after the step.
        ahead: :math:`E\langle w_t, w_{t+1}\rangle/|w_t|`: the new weights along the old direction.
        across: Squared norm of the new weights across the old direction.
    """

    squares: Array
    ahead: Array
    across: Array

    @property
    def angle(self) -> Array:
        """Angle between the weights before and after each step, in radians."""
        # Where gradients are nothing, what is left is the rounding of a difference.
        return np.arctan2(np.sqrt(np.maximum(self.across, 0.0)), self.ahead)


def steps(rule: Rule, lr: Array, weight_decay: Array, dim: int, count: Array) -> Steps:
    """Return what the recursion needs of each step.

    Args:
        rule: The optimizer.
        lr: Learning rates, (n,).
        weight_decay: Weight decays, (n,).
        dim: Number of weights; 1 where norms are in units of the root mean square.
        count: Steps made so far, this one included, (n,); ``inf`` long after the start.

    Returns:
        Arrays of shape (n,).
    """
    zero, one = np.zeros_like(lr), np.ones_like(lr)
    shrink, added = (zero, weight_decay.copy()) if rule.coupled else (lr * weight_decay, zero)
    if isinstance(rule.scale, SecondMoment):
        return Steps(shrink, added, *_by_second_moment(rule, rule.scale, lr, dim, count), zero)
    if isinstance(rule.scale, Shape):
        share = rule.scale.share
        linear = share * rule.scale.power * (dim if rule.scale.per_weight else 1)
        tails = rule.scale.tails(_first_correlation(rule), rule.filter.decay)
        tail = tails[np.minimum(count, len(tails)).astype(int) - 1] / share
        return Steps(shrink, added, lr * math.sqrt(linear), zero, one / share, tail)
    return Steps(shrink, added, lr, zero, one, zero)


def _first_correlation(rule: Rule) -> float:
    """Return the correlation of the filter's outputs at successive steps, long after the start."""
    f = rule.filter
    buffer = f.gain**2 / (1 - f.decay**2)
    mixed = f.decay * f.carry * buffer + f.gain * f.fresh
    return f.carry * mixed / (f.carry**2 * buffer + f.fresh**2)


def _by_second_moment(
    rule: Rule, moment: SecondMoment, lr: Array, dim: int, count: Array
) -> tuple[Array, Array, Array]:
    r"""Return scale, eps and power of Adam.

    The quotient of two fluctuating moments is not the quotient of their means: to second order in
    the fluctuation of the second moment, for Gaussian gradients, successive updates correlate as

    .. math::
        b_1^k\left[1 + \tfrac34 V - \tfrac12 X + b_2^k(\tfrac14 V - \tfrac12 X)\right]

    with the variance :math:`V` of the second moment and its covariance :math:`X` with the square of
    the first. A linear part and white noise stand for it with the same power and the same sum.
    """
    b1, b2 = rule.filter.decay, moment.beta
    first, second = 1 - b1**count, 1 - b2**count
    variance = 2 * (1 - b2) * (1 + b2**count) / ((1 + b2) * second)
    square = (1 - b1**2) / (1 - b1 ** (2 * count))
    shared = 2 * (1 - b2) * square * (1 - (b1**2 * b2) ** count) / ((1 - b1**2 * b2) * second)
    power = 1 + variance - shared
    linear, slow = (1 + b1) / (1 - b1), (1 + b1 * b2) / (1 - b1 * b2)
    total = (power - variance / 4 + shared / 2) * linear + (variance / 4 - shared / 2) * slow
    gain = (total - power) / (linear - 1) if b1 > 0 else power
    scale = lr * np.sqrt(dim * gain * second) / first
    return scale, moment.eps * np.sqrt(dim * second), power / gain


def _uneven(grad: float, decay: float) -> float:
    r"""Return how much less L2 pulls because the largest weights have the largest divisor.

    For Gaussian weights :math:`E[w_i^2/\sqrt{g^2 + \lambda^2w_i^2}]` is, to first order in
    :math:`\lambda^2`, as if the decay's share of the second moment were three times its mean.
    """
    return math.sqrt((grad + decay) / (grad + 3 * decay))


def walk(rule: Rule, steps: Steps, grad_squares: Array, start: float) -> Walk:
    r"""Run the recursion from an empty buffer.

    Args:
        rule: The optimizer.
        steps: What each step needs.
        grad_squares: :math:`\hat g^2`: squared gradient norm times squared weight norm, (n,).
        start: Squared norm of the weights before the first step.

    Returns:
        Arrays of shape (n,).
    """
    f, scale = rule.filter, rule.scale
    beta, gain, carry, fresh = f.decay, f.gain, f.carry, f.fresh
    b2 = scale.beta if isinstance(scale, SecondMoment) else 0.0
    shaped, divided = isinstance(scale, Shape), isinstance(scale, SecondMoment)
    new, kept, root = 1 - b2, gain * gain, math.sqrt
    r, c, m, v = start, 0.0, 0.0, 0.0
    squares, inner, across = array("d"), array("d"), array("d")
    # Plain floats in one loop: small arrays would take seven times as long.
    for shrink, added, size, eps, power, tail, g2 in _rows(steps, grad_squares):
        g2 /= r
        if divided:
            v = b2 * v + new * (g2 + added * added * r)
            size /= root(v) + eps
            if added:
                added *= _uneven(g2, added * added * r)
        elif shaped:
            size /= root(carry * carry * m + fresh * fresh * g2)
        p, q, b = size * carry, size * fresh, gain * added
        a = 1 - shrink - q * added
        linear = p * p * m + q * q * g2
        back = p * c - tail * linear
        along = a * r - back
        side = power * linear - back * back / r
        wm, mm = b * r + beta * c, b * c + beta * m
        c = a * wm - p * mm - q * gain * g2
        m = b * wm + beta * mm + kept * g2
        inner.append(along)
        across.append(side)
        r = along * along / r + side
        squares.append(r)
    after = np.array(squares)
    before = np.concatenate([[start], after[:-1]])
    return Walk(after, np.array(inner) / np.sqrt(before), np.array(across))


def _rows(steps: Steps, grad_squares: Array) -> Iterator[tuple[float, ...]]:
    """Yield the numbers of each step; a stretch at a time, for lists of floats are large."""
    columns = (steps.shrink, steps.added, steps.scale, steps.eps, steps.power, steps.tail)
    for at in range(0, len(grad_squares), _STRETCH):
        part = slice(at, at + _STRETCH)
        yield from zip(*(x[part].tolist() for x in (*columns, grad_squares)), strict=True)


@dataclass(frozen=True)
class Stationary:
    r"""Where the recursion stays.

    Attributes:
        square: :math:`E|w|^2`.
        angle: Angle per step, in radians.
        forgetting: :math:`\kappa`: how fast the direction is forgotten, per step.
        oscillates: Whether it is forgotten in oscillations.
        grad_square: :math:`E|g|^2`.
    """

    square: float
    angle: float
    forgetting: float
    oscillates: bool
    grad_square: float


def stationary(rule: Rule, steps: Steps, grad_square: float) -> Stationary:
    r"""Return the fixed point of the recursion.

    Args:
        rule: The optimizer.
        steps: What a step needs, arrays of one entry.
        grad_square: :math:`\hat g^2`.

    Returns:
        The fixed point.
    """
    r = math.sqrt(grad_square)
    # Geometric means of a guess and what follows from it: what r is under SGD is inverse to what
    # it was, so that the mean is the solution; the error of the others falls by half or more.
    for _ in range(200):
        last, r = r, math.sqrt(r * _Balance.of(rule, steps, grad_square / r, r).square)
        if abs(r / last - 1) < 1e-15:
            break
    return _Balance.of(rule, steps, grad_square / r, r).described()


@dataclass(frozen=True)
class _Balance:
    """The recursion's coefficients for a given size of the gradient, and the moments they keep."""

    a: float
    b: float
    p: float
    q: float
    shrink: float
    filter: Filter
    power: float
    tail: float
    grad: float

    @classmethod
    def of(cls, rule: Rule, steps: Steps, grad: float, square: float) -> _Balance:
        """Return the coefficients for ``|g|^2 = grad`` and, in the divisor, ``|w|^2 = square``."""
        f, added = rule.filter, float(steps.added[0])
        size = float(steps.scale[0])
        if isinstance(rule.scale, SecondMoment):
            size /= math.sqrt(grad + added**2 * square) + float(steps.eps[0])
            added *= _uneven(grad, added**2 * square)
        elif isinstance(rule.scale, Shape):
            buffer = f.gain**2 * grad / (1 - f.decay**2)
            size /= math.sqrt(f.carry**2 * buffer + f.fresh**2 * grad)
        shrink = float(steps.shrink[0]) + size * f.fresh * added
        power, tail = float(steps.power[0]), float(steps.tail[0])
        p, q = size * f.carry, size * f.fresh
        return cls(1 - shrink, f.gain * added, p, q, shrink, f, power, tail, grad)

    @property
    def _cross(self) -> tuple[float, float]:
        """Return x, y with ``C = x R - y |g|^2``."""
        beta, left = self.filter.decay, 1 - self.filter.decay**2
        pb = self.p * self.b
        kept = 1 - self.a * beta + pb + 2 * pb * beta**2 / left
        mixed = self.q * self.filter.gain + self.p * beta * self.filter.gain**2 / left
        return (self.a * self.b - pb * beta * self.b / left) / kept, mixed / kept

    @property
    def square(self) -> float:
        """``R``, by eliminating M and C: no difference of near equals, however small the decay."""
        x, y = self._cross
        beta, left = self.filter.decay, 1 - self.filter.decay**2
        p, b = self.p, self.b
        # What a square of the linear part of the step adds, with what it does through the tail.
        per = self.power + 2 * self.a * self.tail
        lost = (
            self.shrink * (2 - self.shrink)
            + 2 * self.a * p * x
            - per * p * p * b * (b + 2 * beta * x) / left
        )
        buffer = (self.filter.gain**2 - 2 * b * beta * y) * self.grad / left
        linear = p * p * buffer + self.q**2 * self.grad
        return (per * linear + 2 * self.a * p * y * self.grad) / lost

    def described(self) -> Stationary:
        """Return angle and forgetting."""
        x, y = self._cross
        beta, r = self.filter.decay, self.square
        c = x * r - y * self.grad
        m = (self.b**2 * r + 2 * self.b * beta * c + self.filter.gain**2 * self.grad) / (
            1 - beta**2
        )
        linear = self.p**2 * m + self.q**2 * self.grad
        back = self.p * c - self.tail * linear
        across = self.power * linear - back**2 / r
        ahead = (self.a * r - back) / math.sqrt(r)
        # The roots of the map of (w, m), as their distances k from 1.
        total = 1 - beta + self.shrink
        product = self.shrink * (1 - beta) + self.p * self.b
        under = total**2 - 4 * product
        if under >= 0:
            kappa = -math.log1p(-2 * product / (total + math.sqrt(under)))
        else:
            kappa = -0.5 * math.log(self.a * beta + self.p * self.b)
        return Stationary(r, math.atan2(math.sqrt(across), ahead), kappa, under < 0, self.grad)

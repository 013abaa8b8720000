"""When not to believe the numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator

from sphereopt.theory.moments import Stationary
from sphereopt.theory.rules import Rule, SecondMoment

__all__ = ["DTYPES", "warnings_at"]

#: Bits of precision of the weights' dtype.
DTYPES = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}


def warnings_at(
    rule: Rule,
    found: Stationary,
    decay: float,
    rate: float,
    grad_rms: float | None,
    dtype: str,
) -> tuple[str, ...]:
    """Return what makes the equilibrium doubtful, in words.

    Args:
        rule: The optimizer.
        found: The fixed point.
        decay: Learning rate times weight decay.
        rate: At which the norm relaxes, per step.
        grad_rms: Root mean square of the gradient, where it is known.
        dtype: Of the weights.

    Returns:
        One sentence for each doubt.
    """
    return (
        *_of_decay(found, decay),
        *_of_second_moment(rule, found, rate, grad_rms),
        *_of_rounding(rule, found, decay, dtype),
    )


def _of_decay(found: Stationary, decay: float) -> Iterator[str]:
    if found.oscillates:
        yield (
            "momentum oscillation: lr*weight_decay is over (1 - sqrt(momentum))^2, so the "
            "direction is forgotten in swings; use less momentum or decay"
        )
    if decay > 0.01:
        yield (
            f"lr*weight_decay = {decay:.2g}: over 1 % of the weights is lost in each step, and "
            "noise does not average out; take the numbers as rough"
        )


def _of_second_moment(
    rule: Rule, found: Stationary, rate: float, grad_rms: float | None
) -> Iterator[str]:
    if not isinstance(rule.scale, SecondMoment):
        return
    # At equilibrium the decay is half of the diffusive angle of the gradient.
    if rule.coupled and found.forgetting > 0.005:
        yield (
            f"L2: the decay is {math.sqrt(found.forgetting / 2):.0%} of the gradient and part "
            "of the second moment; far from equilibrium take the angle as rough"
        )
    if rate > 0.1 * (1 - rule.scale.beta):
        yield (
            "second moment: the norm would settle faster than 10/(1 - beta2) steps, but "
            "must wait for it; trajectory() follows that, relaxation does not"
        )
    if grad_rms is not None and rule.scale.eps > 0.01 * grad_rms:
        yield (
            f"eps = {rule.scale.eps:.2g} is over 1 % of the gradient's root mean square "
            f"{grad_rms:.2g}, so steps are smaller; use a smaller eps or scale the loss"
        )


def _of_rounding(rule: Rule, found: Stationary, decay: float, dtype: str) -> Iterator[str]:
    # To the nearest: what is less than half a unit in the last place of a weight is lost. The
    # unit is between 2^-bits and 2^-(bits-1) of the weight.
    half = 2.0 ** -DTYPES[dtype]
    if not rule.coupled and decay < half:
        yield (
            f"{dtype}: multiplying weights by 1 - {decay:.2g} changes nothing, so there is no "
            "decay and no equilibrium; keep float32 weights or round stochastically"
        )
    if found.angle < half:
        yield (
            f"{dtype}: steps of {found.angle:.2g} of a weight round to nothing; keep float32 "
            "weights or round stochastically"
        )

r"""Learning rates of every step of a run, as arrays.

Step ``t`` counts from 0, as torch's schedulers do: ``lr[0]`` is what the first step uses. Warm-up
is linear and reaches the peak at step ``warmup - 1``; the first step is not lost on a rate of zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from sphereopt.theory.errors import OutOfRangeError, number, whole
from sphereopt.theory.moments import Array

__all__ = ["SCHEDULES", "schedule"]


def schedule(
    kind: str,
    peak: float,
    steps: int,
    *,
    warmup: int = 0,
    final: float = 0.0,
    decay_fraction: float = 0.2,
    milestones: tuple[float, ...] = (0.5, 0.75),
    gamma: float = 0.1,
) -> Array:
    r"""Return the learning rate of every step: the peak times

    .. math::
        \text{linear:}\quad & 1 - (1-f)\,x, \qquad x = \tfrac{t-warmup}{steps-warmup} \\
        \text{cosine:}\quad & f + (1-f)\,\tfrac{1+\cos\pi x}2 \\
        \text{wsd:}\quad & 1 \text{ until } x = 1 - decay\_fraction \text{, then linear to } f \\
        \text{step:}\quad & \gamma^{\text{number of milestones} \le t/steps}

    Args:
        kind: ``"constant"``, ``"linear"``, ``"cosine"``, ``"wsd"`` (warm-up, stable, decay) or
            ``"step"``.
        peak: Largest learning rate.
        steps: Steps of the run, warm-up included.
        warmup: Steps of linear warm-up.
        final: What the schedule falls to, as a share :math:`f` of the peak: its value one step
            after the last, as in ``CosineAnnealingLR(T_max=steps - warmup)``.
        decay_fraction: Of ``wsd``: share of the steps after warm-up in which the rate falls.
        milestones: Of ``step``: shares of ``steps`` at which the rate falls by ``gamma``.
        gamma: Of ``step``.

    Returns:
        Learning rates, (steps,).

    Raises:
        OutOfRangeError: If the schedule is unknown or a value out of range.

    Example:
        >>> schedule("cosine", 1.0, 4, warmup=2).tolist()
        [0.5, 1.0, 1.0, 0.5]
    """
    if kind not in SCHEDULES:
        raise OutOfRangeError("schedule", kind, f"must be one of {', '.join(SCHEDULES)}")
    number("lr", peak, above=0)
    whole("steps", steps, low=1)
    whole("warmup", warmup, low=0)
    if warmup >= steps:
        raise OutOfRangeError("warmup", warmup, f"must be below steps={steps}")
    number("final", final, low=0)
    number("gamma", gamma, above=0)
    if not 0 < number("decay_fraction", decay_fraction) <= 1:
        raise OutOfRangeError("decay_fraction", decay_fraction, "must be over 0, at most 1")
    t = np.arange(steps)
    if kind == "step":
        falls = np.searchsorted(np.sort(np.array(milestones, float)) * steps, t, side="right")
        factor = gamma ** falls.astype(float)
    else:
        x = np.clip((t - warmup) / (steps - warmup), 0, 1)
        factor = SCHEDULES[kind](x, final, decay_fraction)
    factor[:warmup] = (t[:warmup] + 1) / warmup if warmup else factor[:0]
    return np.asarray(peak * factor, float)


def _constant(x: Array, final: float, fraction: float) -> Array:
    return np.ones_like(x)


def _linear(x: Array, final: float, fraction: float) -> Array:
    return 1 - (1 - final) * x


def _cosine(x: Array, final: float, fraction: float) -> Array:
    return final + (1 - final) * (1 + np.cos(math.pi * x)) / 2


def _wsd(x: Array, final: float, fraction: float) -> Array:
    return 1 - (1 - final) * np.clip((x - (1 - fraction)) / fraction, 0, 1)


#: From the share of the run after warm-up to the share of the peak; "step" needs step numbers.
SCHEDULES: Mapping[str, Callable[[Array, float, float], Array]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "wsd": _wsd,
    "step": _constant,
}

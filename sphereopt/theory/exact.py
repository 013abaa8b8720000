r"""Conversions that are exact for every scale-invariant block and every sequence of gradients.

No random walk, no equilibrium, no small learning rate: only :math:`L(cw) = L(w)` for :math:`c > 0`,
so that the gradient at :math:`cw` is that at :math:`w` over c.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Unpack

import numpy as np

from sphereopt.theory.errors import OutOfRangeError, number
from sphereopt.theory.moments import Array
from sphereopt.theory.rules import Hyperparameters, Rule, rule
from sphereopt.theory.series import Numbers, series
from sphereopt.theory.settings import Settings
from sphereopt.theory.validity import DTYPES

__all__ = ["DecayFree", "adamc", "rescaled", "sphere_sgd_lr", "without_weight_decay"]

_LARGEST = {"float64": 1.7e308, "float32": 3.4e38, "bfloat16": 3.3e38, "float16": 65504.0}


@dataclass(frozen=True)
class DecayFree:
    r"""A run without weight decay that visits the same directions.

    Attributes:
        lr: Learning rate of step ``t``; (steps,).
        grad_scale: What the gradients of the block are multiplied by at step ``t``; (steps,).
        shrinkage: :math:`A_t`: before step ``t`` the original weights are :math:`A_t` times those
            of this run; (steps + 1,), the last one after the last step.
    """

    lr: Array
    grad_scale: Array
    shrinkage: Array

    def __repr__(self) -> str:
        return f"<DecayFree, {len(self.lr)} steps, lr grows {self.lr[-1] / self.lr[0]:.3g} times>"


def without_weight_decay(
    optimizer: str,
    *,
    lr: Numbers,
    weight_decay: Numbers,
    steps: int | None = None,
    dtype: str = "float32",
    **hyper: Unpack[Hyperparameters],
) -> DecayFree:
    r"""Return the learning rates with which a run needs no weight decay.

    With :math:`w = A\,\tilde w`, the run of :math:`\tilde w` without decay visits the same
    directions for

    .. math::
        \text{SGD:}\quad & \tilde{lr}_t = \frac{lr_t}{A_tA_{t+1}}, \qquad
            B_t = \mu B_{t-1} + (1-\tau)\lambda_tA_t, \quad A_{t+1} = A_t - lr_tB_t \\
        \text{decoupled:}\quad & \tilde{lr}_t = \frac{lr_t}{A_{t+1}}, \quad
            \tilde g_t \to \tilde g_t/A_t, \qquad A_{t+1} = (1 - lr_t\lambda_t)A_t

    from :math:`A_0 = 1` and an empty buffer. A and B are what torch's SGD makes of the weight 1
    when its gradient is zero.

    Args:
        optimizer: ``"sgd"`` (momentum and dampening, no Nesterov), or one with decoupled decay:
            ``"sgdw"``, ``"adamw"``, ``"sign"``, ``"signum"``, ``"lion"``, ``"muon"``.
        lr: Learning rate, a constant or one number for each step.
        weight_decay: Weight decay, a constant or one number for each step.
        steps: Number of steps; needed if both are constants.
        dtype: Of the weights, which grow as :math:`1/A`: their square must be finite.
        **hyper: See :class:`~sphereopt.theory.Hyperparameters`; all are kept.

    Returns:
        Learning rates, gradient scales (1 for ``sgd``) and the shrinkage A.

    Raises:
        OutOfRangeError: If there is no exact equivalent (Nesterov with coupled decay; Adam with
            L2), if :math:`A` does not stay positive, or if the weights would overflow.

    Notes:
        Exact for any schedule and any loss, block by block; ordinary parameters (gains, biases)
        stay in groups of their own, with their own lr and decay, and unscaled gradients.
        Under decoupled decay the scale keeps buffers and ``eps`` what they were. Without it,
        sign and Adam's quotient follow the growing norm, and their momentum weighs old
        gradients otherwise.
        For a constant rate :math:`A_t` becomes :math:`\alpha^t`, Li and Arora's rate, with
        :math:`\alpha` the larger root of :math:`x^2 - (1+\mu-lr\,\lambda)x + \mu = 0`. With that
        rate from the first step on, theirs is exact for one initial buffer, which is not the empty
        one.

    References:
        An Exponential Learning Rate Schedule for Deep Learning, Li and Arora, 2020, theorem 2.12.

    Example:
        >>> free = without_weight_decay("sgd", lr=0.1, weight_decay=5e-4, momentum=0.9, steps=3910)
        >>> free
        <DecayFree, 3910 steps, lr grows 50.4 times>
    """
    made = rule(optimizer, hyper)
    rate, decay = series(steps, lr=lr, weight_decay=weight_decay).values()
    kept = _coupled(made, rate, decay) if made.coupled else np.cumprod(1 - rate * decay)
    shrinkage = np.concatenate([[1.0], kept])
    _check_range(shrinkage, rate, dtype)
    if made.coupled:
        return DecayFree(rate / (shrinkage[:-1] * shrinkage[1:]), np.ones_like(rate), shrinkage)
    return DecayFree(rate / shrinkage[1:], 1 / shrinkage[:-1], shrinkage)


def _coupled(made: Rule, rate: Array, decay: Array) -> Array:
    """Return A after every step of torch's SGD."""
    if made.scale is not None:
        raise OutOfRangeError(
            "optimizer",
            made.name,
            "has no equivalent without decay: its L2 term enters the second moment, entry by "
            "entry; use adamw, or a sphere optimizer with radius='free'",
        )
    if made.hyper["nesterov"]:
        raise OutOfRangeError(
            "nesterov",
            True,
            "has no exact equivalent without decay under sgd: the look-ahead weighs past "
            "gradients otherwise; use sgdw, or SphereSGD with radius='free'",
        )
    mu, gain = made.filter.decay, made.filter.gain
    a, b, after = 1.0, 0.0, []
    for t, (lr, wd) in enumerate(zip(rate.tolist(), decay.tolist(), strict=True)):
        b = mu * b + (1.0 if t == 0 else gain) * wd * a
        a -= lr * b
        after.append(a)
    return np.array(after)


def _check_range(shrinkage: Array, rate: Array, dtype: str) -> None:
    """Refuse weights that turn round or whose squared norm overflows."""
    if dtype not in DTYPES:
        raise OutOfRangeError("dtype", dtype, f"must be one of {', '.join(DTYPES)}")
    gone = ~(shrinkage > 0)
    small = shrinkage < 1 / math.sqrt(_LARGEST[dtype])
    if not np.any(gone | small):
        return
    t = int(np.argmax(gone | small)) - 1
    if gone[t + 1] and shrinkage[t] > 1e-3:
        raise OutOfRangeError(
            "lr", float(rate[t]), f"with this decay turns the weights round at step {t}; lower it"
        )
    raise OutOfRangeError(
        "steps",
        len(rate),
        f"are too many for {dtype}: weights would be over {1 / shrinkage[t]:.1g} times too large "
        f"at step {t}; convert shorter runs, or use radius='free', which keeps the norm",
    )


def sphere_sgd_lr(*, lr: Numbers, weight_decay: Numbers, norm0: float, grad_norm: Numbers) -> Array:
    r"""Return the learning rates of SGD on the unit sphere that follow SGD with weight decay.

    .. math::
        \eta_t = \frac{lr_t}{(1-lr_t\lambda_t)\,r_t^2}, \qquad
        r_{t+1}^2 = (1-lr_t\lambda_t)^2\,r_t^2\,(1 + \eta_t^2\hat g_t^2)

    and the step is :math:`u \leftarrow (u - \eta_t\,\hat g_t)/|u - \eta_t\,\hat g_t|`.

    Args:
        lr: Learning rate of SGD without momentum, a constant or one number for each step.
        weight_decay: Its weight decay, coupled or decoupled: without momentum they are the same.
        norm0: Norm of the block before the first step.
        grad_norm: Norm of the gradient at norm 1: norm of the gradient times norm of the block, a
            constant or one number for each step. One of the three must have one for each step.

    Returns:
        :math:`\eta_t`, (steps,): ``lr`` of ``SphereSGD(move="retract")`` on a sphere of norm 1; on
        one of norm R, times :math:`R^2`.

    Raises:
        OutOfRangeError: If a value is out of range.

    Notes:
        An identity, given the gradient norms: rounding is the only error. It is Hoffer et al.'s
        effective step size up to the factor :math:`1/(1-lr\,\lambda)`.

    References:
        Norm matters: efficient and accurate normalization schemes in deep networks, Hoffer et al.,
        2018, section 2.

    Example:
        >>> sphere_sgd_lr(lr=0.1, weight_decay=0.5, norm0=2.0, grad_norm=[4.0, 4.0]).round(5)
        array([0.02632, 0.02884])
    """
    given = series(None, lr=lr, weight_decay=weight_decay, grad_norm=grad_norm)
    rate, decay, gradient = given.values()
    square = number("norm0", norm0, above=0) ** 2
    keep = 1 - rate * decay
    if np.any(keep <= 0):
        t = int(np.argmax(keep <= 0))
        raise OutOfRangeError(
            "lr", float(rate[t]), f"times weight_decay={decay[t]:g} must be below 1"
        )
    result = []
    for eta, a, g in zip(rate.tolist(), keep.tolist(), gradient.tolist(), strict=True):
        angular = eta / (a * square)
        square *= a * a * (1 + (angular * g) ** 2)
        result.append(angular)
    return np.array(result)


def rescaled(
    optimizer: str,
    factor: float,
    *,
    lr: float,
    weight_decay: float,
    **hyper: Unpack[Hyperparameters],
) -> Settings:
    r"""Return what to pass when the weights are multiplied by a factor and nothing else changes.

    .. math::
        \text{SGD, SGDW:}\quad & (c^2\,lr,\ \lambda/c^2,\ c\,w) \\
        \text{AdamW, sign, Lion, Muon:}\quad & (c\,lr,\ \lambda/c,\ c\,w) \\
        \text{Adam with L2:}\quad & (c\,lr,\ \lambda/c^2,\ c\,w)

    and Adam's :math:`\epsilon/c`.

    Args:
        optimizer: As in :func:`equilibrium`.
        factor: What the weights are multiplied by, :math:`c`, before the first step.
        lr: Learning rate.
        weight_decay: Weight decay.
        **hyper: See :class:`~sphereopt.theory.Hyperparameters`.

    Returns:
        Settings whose run visits the same directions.

    Raises:
        OutOfRangeError: If a value is out of range.

    Notes:
        Exact for scale-invariant blocks, any schedule (rates at all steps change by the same
        factor) and empty buffers. A run therefore has two numbers, not three: ``lr * weight_decay``
        and ``lr`` in units of the initial norm.

    References:
        L2 Regularization versus Batch and Weight Normalization, van Laarhoven, 2017.

    Example:
        >>> print(rescaled("adamw", 2.0, lr=3e-4, weight_decay=0.1))
        torch.optim.AdamW(lr=0.0006, weight_decay=0.05, betas=(0.9, 0.999), eps=5e-09)  # multiply
        the weights by 2
    """
    made = rule(optimizer, hyper)
    c = number("factor", factor, above=0)
    i, j = made.symmetry
    options = dict(made.hyper)
    if "eps" in options:
        options["eps"] /= c
    rate, decay = number("lr", lr, above=0), number("weight_decay", weight_decay, low=0)
    note = f"multiply the weights by {c:.4g}"
    return Settings(optimizer, rate * c**i, decay / c**j, options, note)


def adamc(lr: Numbers, weight_decay: float) -> Array:
    r"""Return weight decays that follow the learning rate, so that the norm stays where it is.

    .. math:: \lambda_t = \lambda\,\frac{lr_t}{\max_s lr_s}

    Args:
        lr: Learning rate of every step.
        weight_decay: Weight decay at the largest one.

    Returns:
        Weight decays, (steps,).

    Raises:
        OutOfRangeError: If a value is out of range.

    Notes:
        The equilibrium norm depends on :math:`lr/\lambda` only, so it stays, and the angle at
        equilibrium becomes proportional to lr instead of its root. The rate of forgetting falls as
        the square of lr: an equilibrium is held, and hardly approached.

    References:
        Why Gradients Rapidly Increase Near the End of Training, Defazio, 2025 (AdamC).

    Example:
        >>> adamc([1e-3, 5e-4], 0.1).tolist()
        [0.1, 0.05]
    """
    decay = number("weight_decay", weight_decay, low=0)
    (rate,) = series(None, lr=lr).values()
    if not np.any(rate > 0):
        raise OutOfRangeError("lr", 0.0, "must be positive at some step")
    return np.asarray(decay * rate / rate.max(), float)

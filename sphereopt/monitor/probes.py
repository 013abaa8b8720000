r"""Probes: from the numbers of a step to one value per sphere.

Each probe is a function of a :class:`~sphereopt.optim.Reading`; its docstring says the unit and
what to expect of a scale-invariant weight. :math:`\rho` is the norm the optimizer believes: the
stored one, or the virtual radius under ``radius="free"``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sphereopt.moves import RADIANS, _divide, _root, step_angle
from sphereopt.optim.base import Reading

__all__ = ["PROBES", "angle", "effective_lr", "norm", "radial_share", "relative_update"]


def norm(reading: Reading) -> Tensor:
    r"""Return the believed norm :math:`\rho` after the step, in units of the weights.

    Expected: constant under ``"fixed"``; otherwise growth against decay,
    :math:`\rho'^2=\rho^2(1-lr\,\lambda)^2+lr^2|u|^2` for a direction orthogonal to w.
    """
    return reading.travel.norm


def angle(reading: Reading) -> Tensor:
    r"""Return the angle the weights turned, in radians per step.

    Expected: ``lr`` under ``"rotate"``; :math:`\sqrt{2\,lr\,\lambda/(1+\mu)}` for SGD with
    momentum and weight decay at equilibrium.
    """
    return step_angle(reading.travel.gram, reading.travel.a, reading.travel.b)


def effective_lr(reading: Reading) -> Tensor:
    r"""Return the step on the unit sphere per unit of its direction.

    :math:`lr/\rho^2` for SGD (its direction scales like the gradient), :math:`lr/\rho` for Adam
    (whose direction has no scale), and lr itself where a move takes radians; in units of
    radians per unit of direction. The norm is that before the step.
    """
    lr = reading.lr * torch.ones_like(reading.travel.norm)
    if reading.group.get("move") in RADIANS:
        return lr
    return _divide(lr, _root(reading.travel.gram.ww) ** (1 + reading.homogeneity))


def relative_update(reading: Reading) -> Tensor:
    r"""Return the length of the proposed step over the norm, :math:`lr\,|u|/\rho` (no unit).

    Expected: close to the angle while it is small; ``lr`` for moves in radians.
    """
    lr = reading.lr * torch.ones_like(reading.travel.norm)
    if reading.group.get("move") in RADIANS:
        return lr
    gram = reading.travel.gram
    return lr * _divide(_root(gram.uu), _root(gram.ww))


def radial_share(reading: Reading) -> Tensor:
    r"""Return the cosine :math:`\langle w,u\rangle/(|w||u|)` of weights and direction (no unit).

    Expected: zero for a tangent direction; positive where the step shrinks the weights (weight
    decay), negative where momentum or Adam's division lets them grow.
    """
    gram = reading.travel.gram
    return _divide(gram.wu, _root(gram.ww * gram.uu))


PROBES: dict[str, Callable[[Reading], Tensor]] = {
    "norm": norm,
    "angle": angle,
    "effective_lr": effective_lr,
    "relative_update": relative_update,
    "radial_share": radial_share,
}

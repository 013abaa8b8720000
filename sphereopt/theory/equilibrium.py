r"""Where weight decay and norm growth balance.

A scale-invariant block grows by every step, since its gradient is orthogonal to it, and shrinks by
weight decay. Where the two balance, its norm settles and every step turns it by the same angle on
average, whatever the loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Unpack

import numpy as np

from sphereopt.theory.errors import OutOfRangeError, number, whole
from sphereopt.theory.moments import Stationary, stationary, steps
from sphereopt.theory.rules import Hyperparameters, Rule, SecondMoment, rule
from sphereopt.theory.validity import DTYPES, warnings_at
from sphereopt.theory.words import Section

__all__ = ["Equilibrium", "equilibrium"]


@dataclass(frozen=True)
class Equilibrium:
    r"""What a scale-invariant block does where weight decay and norm growth balance.

    Attributes:
        optimizer: Name of the optimizer.
        kappa: :math:`\kappa`: how fast the direction is forgotten, per step:
            :math:`E\cos\angle(w_t, w_{t+T}) = e^{-\kappa T}`.
        memory: :math:`1/\kappa`, in steps.
        K: :math:`\theta_{diff}^2/\theta^2`: how much momentum aligns successive updates.
        angle: :math:`\theta`: root mean square angle between successive weights, in radians.
        diffusive_angle: :math:`\theta_{diff} = \sqrt{2\kappa}`: many steps turn the weights by
            about that times the root of their number; radians per root step.
        norm: Norm of the weights; ``None`` if it depends on what was not given.
        rms: Root mean square of the weights; ``None`` if it depends on what was not given.
        grad_ratio: Norm of the gradient over norm of the weights; ``None`` likewise.
        relaxation: Steps in which a small distance of the norm from equilibrium falls by e.
        warnings: Reasons to doubt the numbers, in words.
    """

    optimizer: str
    kappa: float
    memory: float
    K: float
    angle: float
    diffusive_angle: float
    norm: float | None
    rms: float | None
    grad_ratio: float | None
    relaxation: float
    warnings: tuple[str, ...] = ()

    @property
    def facts(self) -> dict[str, tuple[float | None, str]]:
        """Names in words, each with its value and what it is, in the order to read them."""
        degrees = f"rad per step ({math.degrees(self.angle):.3g} degrees)"
        rms = "root mean square weight, and init std without a transient"
        return {
            "angle": (self.angle, degrees),
            "diffusive angle": (self.diffusive_angle, "rad per root step"),
            "K": (self.K, "alignment of updates by momentum"),
            "memory": (self.memory, "steps until the direction is forgotten"),
            "relaxation": (self.relaxation, "steps until the norm is e times closer"),
            "norm": (self.norm, "of the weights"),
            "rms": (self.rms, rms),
            "gradient/weight": (self.grad_ratio, "ratio of norms"),
        }

    def __str__(self) -> str:
        known = tuple(
            (name, f"{x:.4g}", text) for name, (x, text) in self.facts.items() if x is not None
        )
        text = str(Section(f"{self.optimizer} at equilibrium", known))
        return "\n".join([text, *(f"  warning: {text}" for text in self.warnings)])


def equilibrium(
    optimizer: str,
    *,
    lr: float,
    weight_decay: float,
    dim: int | None = None,
    grad_norm: float | None = None,
    dtype: str = "float32",
    **hyper: Unpack[Hyperparameters],
) -> Equilibrium:
    r"""Return what a scale-invariant block does where weight decay and norm growth balance.

    To leading order in :math:`lr\,\lambda`, with :math:`\hat g = |w||g|`:

    .. math::
        \text{SGD:}\quad & \kappa=\tfrac{lr\,\lambda}{1-\mu},\quad
            \theta=\sqrt{\tfrac{2\,lr\,\lambda}{1+\mu}},\quad
            |w|^4=\tfrac{lr\,\hat g^2}{2\lambda(1-\mu)} \\
        \text{SGDW:}\quad & \kappa=lr\,\lambda,\quad
            \theta=\sqrt{2\,lr\,\lambda\tfrac{1-\mu}{1+\mu}},\quad
            |w|^4=\tfrac{lr\,\hat g^2}{2\lambda(1-\mu)^2} \\
        \text{AdamW:}\quad & \kappa=lr\,\lambda,\quad
            \theta=\sqrt{2\,lr\,\lambda\tfrac{1-\beta_1}{1+\beta_1}},\quad
            |w|^2=\tfrac{lr\,d}{2\lambda} \\
        \text{Adam:}\quad & \kappa=lr\,\lambda\sqrt d\,|w|/\hat g,\quad
            \theta=\sqrt{2\kappa\tfrac{1-\beta_1}{1+\beta_1}},\quad
            |w|^3=\tfrac{lr\sqrt d\,\hat g}{2\lambda} \\
        \text{sign, Lion, Muon:}\quad & \kappa=lr\,\lambda,\quad
            \theta=\sqrt{2\,lr\,\lambda/K},\quad |w|^2=\tfrac{lr\,U^2K}{2\lambda}

    What is returned is the fixed point of the recursion of :func:`~sphereopt.theory.trajectory`,
    exact in :math:`lr\,\lambda`.

    Args:
        optimizer: ``"sgd"`` (L2 in the gradient, as in torch), ``"sgdw"`` (the same with decoupled
            decay), ``"adam"`` (L2), ``"adamw"``, ``"sign"``, ``"signum"``, ``"lion"``, ``"muon"``
            (torch's).
        lr: Learning rate, as given to the optimizer.
        weight_decay: Weight decay :math:`\lambda`, as given to the optimizer.
        dim: Number of weights :math:`d` in the block.
        grad_norm: :math:`\hat g`: norm of the gradient of the block times norm of the block, which
            does not depend on the latter. A batch's gradient, as the optimizer sees it.
        dtype: Of the weights; what rounding loses is in the warnings.
        **hyper: See :class:`~sphereopt.theory.Hyperparameters`; defaults are torch's.

    Returns:
        The equilibrium. Its angle is also the ``lr`` that ``move="rotate"`` needs, with the same
        momentum or betas, to turn as fast.

    Raises:
        OutOfRangeError: If a value is out of range, or needed and not given.

    Notes:
        *Assumes* a random walk: gradients orthogonal to the weights whose noise dominates, and
        constant lr and decay. A block is what the network normalizes together: a filter before
        BatchNorm, a matrix before LayerNorm.
        *Valid when* the norm has had several times ``relaxation`` steps to settle; the ``warnings``
        name what else to look at. On small networks the angle was within 1 % (SGD) to 9 % (AdamW)
        and the norm within 12 %; Lion and Muon, whose momentum averages most of the noise away,
        were off by up to 27 %.

    References:
        * Spherical Motion Dynamics: Learning Dynamics of Normalized Neural Network using SGD and
          Weight Decay, Wan et al., 2021 (equilibrium angle and norm of SGD with momentum).
        * Rotational Equilibrium: How Weight Decay Balances Learning Across Neural Networks,
          Kosson et al., 2024 (AdamW, Adam with L2, Lion).

    Example:
        >>> found = equilibrium("sgd", lr=0.1, weight_decay=5e-4, momentum=0.9)
        >>> round(found.angle, 5), round(found.memory)
        (0.00725, 1990)
        >>> print(equilibrium("adamw", lr=3e-4, weight_decay=0.1, betas=(0.9, 0.95)))
        adamw at equilibrium
          angle            0.001769   rad per step (0.101 degrees)
          diffusive angle  0.007746   rad per root step
          K                19.18      alignment of updates by momentum
          memory           3.333e+04  steps until the direction is forgotten
          relaxation       1.667e+04  steps until the norm is e times closer
          rms              0.0383     root mean square weight, and init std without a transient
    """
    lr = number("lr", lr, above=0)
    if weight_decay == 0:
        raise OutOfRangeError(
            "weight_decay",
            weight_decay,
            "must be positive: without decay the norm grows for ever and nothing settles; "
            "theory.trajectory follows such a run",
        )
    weight_decay = number("weight_decay", weight_decay, above=0)
    if dtype not in DTYPES:
        raise OutOfRangeError("dtype", dtype, f"must be one of {', '.join(DTYPES)}")
    made, dim = sized(rule(optimizer, hyper), dim, grad_norm)
    if made.coupled and made.scale is not None and (dim is None or grad_norm is None):
        name = "dim" if dim is None else "grad_norm"
        raise OutOfRangeError(
            name, None, f"must be given: with L2 the angle of {optimizer} depends on it"
        )
    one = np.ones(1)
    need = steps(made, lr * one, weight_decay * one, dim or 1, math.inf * one)
    if not (need.shrink[0] < 1 and made.filter.fresh * lr * need.added[0] < 1):
        raise OutOfRangeError("lr", lr, f"times weight_decay={weight_decay!r} must be below 1")
    found = stationary(made, need, (grad_norm or 1.0) ** 2)
    return _record(made, found, lr, weight_decay, dim, grad_norm, dtype)


def sized(made: Rule, dim: int | None, grad_norm: float | None) -> tuple[Rule, int | None]:
    """Return the rule, with eps only where it means something, and the dimension if known."""
    if dim is not None:
        dim = whole("dim", dim, low=1)
    if grad_norm is not None:
        number("grad_norm", grad_norm, above=0)
    if made.dim is not None:
        if dim not in (None, made.dim):
            raise OutOfRangeError("dim", dim, f"contradicts the shape, of {made.dim} weights")
        dim = made.dim
    if isinstance(made.scale, SecondMoment) and (dim is None or grad_norm is None):
        made = replace(made, scale=replace(made.scale, eps=0.0))
    return made, dim


def _record(
    made: Rule,
    found: Stationary,
    lr: float,
    weight_decay: float,
    dim: int | None,
    grad_norm: float | None,
    dtype: str,
) -> Equilibrium:
    known = grad_norm is not None if made.needs_grad_norm else dim is not None
    norm = math.sqrt(found.square) if known else None
    if made.needs_grad_norm:
        rms = norm / math.sqrt(dim) if norm is not None and dim is not None else None
    else:
        rms = math.sqrt(found.square / (dim or 1))
    ratio = math.sqrt(found.grad_square / found.square)
    kappa = found.forgetting
    rate = sum(made.symmetry) * kappa
    result = Equilibrium(
        optimizer=made.name,
        kappa=kappa,
        memory=1 / kappa,
        K=2 * kappa / found.angle**2,
        angle=found.angle,
        diffusive_angle=math.sqrt(2 * kappa),
        norm=norm,
        rms=rms,
        grad_ratio=ratio if made.scale is None or (norm is not None and grad_norm) else None,
        relaxation=1 / rate,
    )
    found_warnings = warnings_at(
        made, found, lr * weight_decay, rate, _rms(ratio, norm, dim), dtype
    )
    return replace(result, warnings=found_warnings)


def _rms(ratio: float, norm: float | None, dim: int | None) -> float | None:
    """Return the root mean square of the gradient, if known."""
    return ratio * norm / math.sqrt(dim) if norm is not None and dim is not None else None

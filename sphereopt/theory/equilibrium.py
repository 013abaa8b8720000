r"""Where weight decay and norm growth balance.

A scale-invariant block grows by every step, since its update is orthogonal to it, and shrinks by
weight decay. Where the two balance, its norm settles and every step turns it by the same angle on
average, whatever the size of its gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Equilibrium", "equilibrium"]


@dataclass(frozen=True)
class Equilibrium:
    """What a scale-invariant block does at equilibrium.

    Attributes:
        angle: Root mean square angle between successive weights, in radians per step.
        relaxation: Steps in which the distance of the norm from equilibrium falls by e.
    """

    angle: float
    relaxation: float


def equilibrium(
    optimizer: str,
    *,
    lr: float,
    weight_decay: float,
    momentum: float = 0.0,
    beta1: float = 0.9,
) -> Equilibrium:
    r"""Return the equilibrium angle per step of a scale-invariant block, and its relaxation time.

    .. math::
        \text{SGD:}\quad   & \theta=\sqrt{\tfrac{2\,lr\,\lambda}{1+\mu}}, \qquad
                             \tau=\frac{1-\mu}{4\,lr\,\lambda} \\
        \text{AdamW:}\quad & \theta=\sqrt{2\,lr\,\lambda\tfrac{1-\beta_1}{1+\beta_1}}, \qquad
                             \tau=\frac{1}{2\,lr\,\lambda}

    Args:
        optimizer: ``"sgd"`` (heavy ball, L2 in the gradient) or ``"adamw"``.
        lr: Learning rate.
        weight_decay: Weight decay :math:`\lambda`, as given to ``torch.optim``.
        momentum: Momentum :math:`\mu` of SGD, without dampening.
        beta1: Decay of AdamW's first moment.

    Returns:
        The angle is also the ``lr`` that ``move="rotate"`` needs to turn as fast.

    Raises:
        ValueError: If the optimizer is another, or a value is out of range.

    Notes:
        *Assumes* a gradient orthogonal to the weights whose noise dominates, and constant lr and
        decay. *Valid when* lr*weight_decay is far below 1-momentum: the relative error is about
        lr*weight_decay/(1-momentum). Does not depend on the size of the gradient.

    References:
        Spherical Motion Dynamics: Learning Dynamics of Normalized Neural Network using SGD and
        Weight Decay, Wan et al., 2021 (equilibrium angle and norm of SGD with momentum).
        Rotational Equilibrium: How Weight Decay Balances Learning Across Neural Networks,
        Kosson et al., 2024 (the same for AdamW).

    Example:
        >>> found = equilibrium("sgd", lr=0.1, weight_decay=5e-4, momentum=0.9)
        >>> round(found.angle, 5), round(found.relaxation)
        (0.00725, 500)
    """
    if not (lr > 0 and weight_decay > 0):
        raise ValueError(
            f"lr={lr!r} and weight_decay={weight_decay!r} must be positive: without either there "
            "is no equilibrium"
        )
    if not (0 <= momentum < 1 and 0 <= beta1 < 1):
        raise ValueError(f"momentum={momentum!r} and beta1={beta1!r} must be in [0, 1)")
    decay = lr * weight_decay
    if optimizer == "sgd":
        return Equilibrium(math.sqrt(2 * decay / (1 + momentum)), (1 - momentum) / (4 * decay))
    if optimizer == "adamw":
        return Equilibrium(math.sqrt(2 * decay * (1 - beta1) / (1 + beta1)), 1 / (2 * decay))
    raise ValueError(f"optimizer={optimizer!r} is none of 'sgd', 'adamw'")

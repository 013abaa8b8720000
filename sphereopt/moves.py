r"""Moves: how a block of weights travels on its sphere.

Notation, used throughout the package. A *sphere* holds weights :math:`w` with norm :math:`|w|`; an
optimizer proposes a *direction* :math:`u` (what ``torch.optim`` would subtract, before the learning
rate); :math:`t = u - \frac{\langle w,u\rangle}{\langle w,w\rangle} w` is its tangent part. Every
move ends in the plane of :math:`w` and :math:`u`,

.. math:: w' = a\,w + b\,u,

and its two coefficients depend on three numbers only, the :class:`Gram` of the step. That is why
one code path serves rows, filters, heads, whole tensors and spheres that span several tensors
(their Grams add), and why the angle of a step costs no copy of the weights.

=============  =================================================  ======================  ==========
move           where the weights go (then the norm is set to r)   angle of the step       unit of lr
=============  =================================================  ======================  ==========
``retract``    :math:`w - lr\,t`                                  ``atan(lr |t| / |w|)``  gradient
``exp``        geodesic with velocity :math:`-lr\,t`              ``lr |t| / |w|``        gradient
``renorm``     :math:`w - lr\,u`                                  depends on u            gradient
``hyperball``  :math:`w - lr\,|w|\,u/|u|`                         about lr                radians
``rotate``     geodesic of length lr towards :math:`-t`           lr                      radians
=============  =================================================  ======================  ==========
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MOVES", "NORMALIZED", "RADIANS", "Gram", "coefficients", "step_angle"]


class Gram(NamedTuple):
    r"""The inner products of one step, one entry per sphere.

    Attributes:
        ww: :math:`\langle w,w\rangle`, shape ``(k,)``.
        wu: :math:`\langle w,u\rangle`, shape ``(k,)``.
        uu: :math:`\langle u,u\rangle`, shape ``(k,)``.

    Example:
        >>> Gram(*torch.tensor([[4.0], [2.0], [5.0]])).tangent_square()
        tensor([4.])
    """

    ww: Tensor
    wu: Tensor
    uu: Tensor

    def radial_rate(self) -> Tensor:
        r"""Return :math:`\langle w,u\rangle/\langle w,w\rangle`, zero where w is zero."""
        return _divide(self.wu, self.ww)

    def tangent_square(self) -> Tensor:
        r"""Return :math:`|t|^2 = \langle u,u\rangle - \langle w,u\rangle^2/\langle w,w\rangle`."""
        return (self.uu - self.wu * self.radial_rate()).clamp_min(0)


Lr = Tensor | float
Move = Callable[[Gram, Lr, Tensor], tuple[Tensor, Tensor]]


def _divide(x: Tensor, y: Tensor) -> Tensor:
    """Return x / y, and zero where y is zero."""
    zero = y == 0
    return (x / y.masked_fill(zero, 1)).masked_fill(zero, 0)


def _root(x: Tensor) -> Tensor:
    """Return sqrt(x), with derivative zero instead of infinity at x = 0."""
    if not torch.is_grad_enabled():
        return torch.sqrt(x)
    zero = x == 0
    return torch.sqrt(x.masked_fill(zero, 1)).masked_fill(zero, 0)


def _retract(gram: Gram, lr: Lr, radius: Tensor) -> tuple[Tensor, Tensor]:
    rate = gram.radial_rate()
    square = gram.ww + lr**2 * (gram.uu - gram.wu * rate).clamp_min(0)
    scale = _divide(radius, _root(square))
    return scale * (1 + lr * rate), -lr * scale


def _exp(gram: Gram, lr: Lr, radius: Tensor) -> tuple[Tensor, Tensor]:
    norm = _root(gram.ww)
    angle = lr * _divide(_root(gram.tangent_square()), norm)
    scale = _divide(radius, norm)
    # sin(angle)/angle has no 0/0 in torch's sinc, which is sin(pi x)/(pi x).
    b = -lr * scale * torch.sinc(angle / torch.pi)
    return scale * torch.cos(angle) - b * gram.radial_rate(), b


def _renorm(gram: Gram, lr: Lr, radius: Tensor) -> tuple[Tensor, Tensor]:
    before = gram.ww + lr**2 * gram.uu
    square = before - 2 * lr * gram.wu
    # What rounding leaves of a step into the origin has no direction, and no norm to divide by.
    square = square.masked_fill(square <= 8 * torch.finfo(square.dtype).eps * before, 0)
    scale = _divide(radius, _root(square))
    return scale, -lr * scale


def _hyperball(gram: Gram, lr: Lr, radius: Tensor) -> tuple[Tensor, Tensor]:
    return _renorm(gram, lr * _divide(_root(gram.ww), _root(gram.uu)), radius)


def _rotate(gram: Gram, lr: Lr, radius: Tensor) -> tuple[Tensor, Tensor]:
    angle = lr * gram.ww.new_ones(())  # not as_tensor: it makes a constant of lr under compile
    b = -torch.sin(angle) * _divide(radius, _root(gram.tangent_square()))
    scale = _divide(radius, _root(gram.ww))
    return scale * torch.cos(angle) - b * gram.radial_rate(), b


MOVES: dict[str, Move] = {
    "retract": _retract,
    "exp": _exp,
    "renorm": _renorm,
    "hyperball": _hyperball,
    "rotate": _rotate,
}

#: Moves whose ``lr`` is an angle in radians per step; for the others it has the unit of SGD's.
RADIANS = frozenset({"hyperball", "rotate"})

#: Moves that divide by :math:`|t|`. For them the optimizer forms :math:`t` itself: the difference
#: ``uu - wu**2/ww`` cancels when u is nearly radial (in float32 it is noise below |t|/|u| = 1e-3).
NORMALIZED = frozenset({"rotate"})


def coefficients(
    move: str, gram: Gram, lr: Tensor | float, radius: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Return the coefficients (a, b) of the new point :math:`w' = a\,w + b\,u` with norm r.

    Spheres that have nowhere to go (``lr`` zero, a zero direction, zero weights, or a step that
    ends at the origin, to the rounding of the Gram) get exactly ``(1, 0)``: the weights stay
    bitwise what they are.

    Args:
        move: A key of :data:`MOVES`.
        gram: Inner products of weights and direction, each of shape ``(k,)``.
        lr: Learning rate, in the unit of the move (see the table above).
        radius: Norm of the new point, shape ``(k,)``.

    Returns:
        Two tensors of shape ``(k,)``.

    Raises:
        ValueError: If there is no such move.

    Notes:
        ``retract`` is the projection retraction of Riemannian SGD, ``exp`` the exponential map of
        SGD-G, ``renorm`` a plain step that is then normalized, ``hyperball`` the step of the
        Hyperball optimizers (AdamH, MuonH), whose :math:`w-|w|\,lr\,u/|u|` is not projected first.

    References:
        Optimization Algorithms on Matrix Manifolds, Absil, Mahony and Sepulchre, 2008, chapter 4.
        Riemannian approach to batch normalization, Cho and Lee, 2017.

    Example:
        >>> right, up = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> gram = Gram(*torch.tensor([[1.0], [0.0], [1.0]]))
        >>> a, b = coefficients("rotate", gram, torch.pi / 2, torch.ones(1))
        >>> (a * right + b * up).round(decimals=3)
        tensor([-0., -1.])
    """
    if move not in MOVES:
        raise ValueError(f"there is no move {move!r}; the moves are {', '.join(MOVES)}")
    lr = lr.to(gram.ww.dtype) if isinstance(lr, Tensor) else lr
    a, b = MOVES[move](gram, lr, radius)
    still = (b == 0) | (torch.minimum(gram.ww, gram.uu) == 0)
    return a.masked_fill(still, 1), b.masked_fill(still, 0)


def step_angle(gram: Gram, a: Tensor, b: Tensor) -> Tensor:
    r"""Return the angle between :math:`w` and :math:`a\,w+b\,u`, in radians per step.

    .. math:: \theta = \operatorname{atan2}\bigl(|b|\,|w|\,|t|,\; a\langle w,w\rangle
                                                 + b\langle w,u\rangle\bigr)

    Args:
        gram: Inner products of the step, each of shape ``(k,)``.
        a: Coefficient of the weights, shape ``(k,)``.
        b: Coefficient of the direction, shape ``(k,)``.

    Returns:
        Angles in [0, pi], shape ``(k,)``. The norm of the new point plays no part.

    Notes:
        An arc cosine of ``<w, w'>`` loses every digit below 1e-4 rad in float32; this form does
        not.

    Example:
        >>> gram = Gram(*torch.tensor([[1.0], [0.0], [1.0]], dtype=torch.float64))
        >>> float(step_angle(gram, torch.ones(1), torch.full((1,), -1e-9)))
        9.99...e-10
    """
    across = b.abs() * _root(gram.ww * gram.tangent_square())
    return torch.atan2(across, a * gram.ww + b * gram.wu)

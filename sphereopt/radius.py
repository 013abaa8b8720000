r"""Radius policies: which norm the optimizer believes a sphere has.

A scale-invariant block feels only its direction :math:`v=w/|w|`, and its gradient at norm
:math:`\rho` is :math:`g(\rho v)=g(v)/\rho`. So every first-order step is a step on the sphere whose
length is set by the norm the optimizer *believes*, whatever norm the stored weights have:

* ``"fixed"``: the believed norm is the stored one, r, and never changes. Weight decay has nothing
  left to do.
* ``"free"``: the believed norm :math:`\rho` is one extra number per sphere that follows the plain
  optimizer's own recursion, growth and weight decay included,

  .. math:: \rho' = |(1-lr\,\lambda)\,\rho v - lr\,u| ,

  while the stored weights keep the norm r. Directions are those of the plain optimizer.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from sphereopt.moves import Gram, _divide, _root, coefficients

__all__ = ["POLICIES", "Travel", "plain_norm", "travel"]

POLICIES = ("fixed", "free")


class Travel(NamedTuple):
    r"""The numbers of one step, one entry per sphere.

    Attributes:
        gram: Inner products of the *believed* weights and the direction.
        a: Coefficient of the believed weights in the new stored point.
        b: Coefficient of the direction.
        keep: Coefficient of the stored weights: the new stored point is ``keep*w + b*u``.
        norm: Believed norm after the step.
    """

    gram: Gram
    a: Tensor
    b: Tensor
    keep: Tensor
    norm: Tensor


def plain_norm(gram: Gram, lr: Tensor | float) -> Tensor:
    r"""Return the norm after a plain step, :math:`|w-lr\,u|`, from inner products.

    .. math:: |w-lr\,u|^2 = \langle w,w\rangle - 2lr\langle w,u\rangle + lr^2\langle u,u\rangle

    Args:
        gram: Inner products, each of shape ``(k,)``.
        lr: Learning rate.

    Returns:
        Shape ``(k,)``.

    Notes:
        For u orthogonal to w this is the norm growth law of scale-invariant weights,
        :math:`|w'|^2=|w|^2+lr^2|g|^2`.

    References:
        Spherical Perspective on Learning with Normalization Layers, Roburin et al., 2022.

    Example:
        >>> plain_norm(Gram(*torch.tensor([[9.0], [0.0], [16.0]])), 1.0)
        tensor([5.])
    """
    return _root((gram.ww - 2 * lr * gram.wu + lr**2 * gram.uu).clamp_min(0))


def travel(
    gram: Gram,
    lr: Tensor | float,
    *,
    move: str,
    radius: Tensor,
    virtual_radius: Tensor | None = None,
    shrink: Tensor | float = 1.0,
) -> Travel:
    r"""Return the numbers of one step under a radius policy.

    Args:
        gram: Inner products of the stored weights and the direction, each of shape ``(k,)``.
        lr: Learning rate, in the unit of the move.
        move: A key of :data:`sphereopt.moves.MOVES`.
        radius: Stored norm r to return to, shape ``(k,)``.
        virtual_radius: Believed norm :math:`\rho`, shape ``(k,)``; None under ``"fixed"``.
        shrink: Decoupled weight decay, :math:`1-lr\,\lambda`; acts on :math:`\rho` only.

    Returns:
        The coefficients, the believed inner products and the believed norm after the step.

    Example:
        >>> gram = Gram(*torch.tensor([[1.0], [0.0], [1.0]]))
        >>> one = torch.ones(1)
        >>> travel(gram, 0.5, move="renorm", radius=one, virtual_radius=2 * one).norm
        tensor([2.0616])
    """
    if virtual_radius is None:
        a, b = coefficients(move, gram, lr, radius)
        return Travel(gram, a, b, a, radius)
    scale = _divide(shrink * virtual_radius, _root(gram.ww))
    seen = Gram(scale**2 * gram.ww, scale * gram.wu, gram.uu)
    a, b = coefficients(move, seen, lr, radius)
    # Weights that do not turn stay bitwise what they are, whatever norm they are believed to have.
    return Travel(seen, a, b, (a * scale).masked_fill(b == 0, 1), plain_norm(seen, lr))

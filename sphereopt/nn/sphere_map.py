r"""Standardization as a map onto a sphere, and its derivative.

For a vector x of n numbers with mean :math:`\mu` and (biased) standard deviation :math:`\sigma`,
with e the vector of ones and :math:`A = I - ee^\top/n`, which subtracts the mean,

.. math:: N(x) = \frac{x-\mu e}{\sigma} = \sqrt n\,\frac{A x}{\|A x\|}

so N(x) lies on the sphere of radius :math:`\sqrt n` in the hyperplane orthogonal to e: a sphere of
n - 2 dimensions. ``N(a x + b e) = sign(a) N(x)``: what scale and shift do is lost. With
:math:`u = N(x)/\sqrt n` the derivative is a projector onto what is left, times :math:`1/\sigma`:

.. math:: J = \partial N/\partial x = \frac1\sigma\Bigl(I - \frac{ee^\top}{n} - uu^\top\Bigr)

Every normalizer of activations does this to some set of them, before its gain and bias: batch norm
to each channel over the batch, layer norm to each sample, and so on. With an :math:`\epsilon` in
the root, :math:`s = \sqrt{\sigma^2+\epsilon}` in place of :math:`\sigma`, the image is the open
ball of that radius, :math:`J = \frac1s(A - \frac{\sigma^2}{s^2}uu^\top)`, and u is no null
direction any more: :math:`J u = \frac{\epsilon}{s^3}u`.

A vector of equal numbers has no direction. It is sent to zero, and J there is :math:`A/s`, with 1
for s where :math:`\epsilon=0`: a convention, since N has no derivative at such a point.

References:
    New interpretations of normalization methods in deep learning, Sun, Cao, Liang, Huang, Chen and
    Li, 2020.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sphereopt.products import widened

__all__ = [
    "standardize",
    "standardize_jacobian",
    "standardize_null",
    "standardize_pullback",
    "standardize_radius",
]

Dims = int | Sequence[int]


class _Parts(NamedTuple):
    """What all functions here are made of, per vector."""

    centered: Tensor  # A x
    sigma: Tensor
    s: Tensor  # sqrt(sigma^2 + eps), or 1 where that is zero
    n: int


def _parts(x: Tensor, dim: Dims, eps: float) -> _Parts:
    dims = [dim] if isinstance(dim, int) else list(dim)
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; standardize takes real floating-point numbers")
    if not dims or any(not -x.dim() <= d < x.dim() for d in dims):
        raise ValueError(f"dim={dim} does not name dims of a tensor of shape {tuple(x.shape)}")
    if eps < 0:
        raise ValueError(f"eps={eps} must not be negative")
    n = math.prod(x.shape[d] for d in dims)
    if n < 2:
        raise ValueError(
            f"dim={dim} of shape {tuple(x.shape)} holds {n} numbers per vector; a direction after "
            "subtracting the mean needs two or more"
        )
    wide = widened(x)
    centered = wide - wide.mean(dims, keepdim=True)
    # The norm and not the mean of squares: its gradient at zero is zero, not NaN.
    sigma = torch.linalg.vector_norm(centered, 2, dims, keepdim=True) / math.sqrt(n)
    s = (sigma.square() + eps).sqrt() if eps else sigma
    return _Parts(centered, sigma, torch.where(s > 0, s, 1.0), n)


def standardize(x: Tensor, dim: Dims = -1, eps: float = 0.0) -> Tensor:
    r"""Send every vector onto the sphere: zero mean, unit (biased) standard deviation.

    .. math:: N(x) = \frac{x-\mu e}{\sqrt{\sigma^2+\epsilon}}

    Args:
        x: any shape, real.
        dim: dim or dims over which entries form one vector, of n >= 2 numbers.
        eps: added to the variance.

    Returns:
        Tensor: shape and dtype of ``x``. Vectors of equal numbers become zero.

    Raises:
        ValueError: ``dim`` is not there or holds fewer than two numbers, or eps is negative.
        TypeError: ``x`` is not real floating-point.

    Notes:
        What ``F.batch_norm`` does over (N, H, W), ``F.layer_norm`` over features, and so on, for
        any set of dims; those are faster. Numbers equal up to rounding have a direction made of
        rounding, unless eps is larger.

    References:
        New interpretations of normalization methods in deep learning, Sun et al., 2020.

    Example:
        >>> x = torch.tensor([1.0, 2.0, 6.0])
        >>> torch.allclose(standardize(x), standardize(10 * x - 3), atol=1e-6)
        True
        >>> round(standardize(x).norm().item() ** 2, 4)
        3.0
    """
    parts = _parts(x, dim, eps)
    return (parts.centered / parts.s).to(x.dtype)


def standardize_radius(x: Tensor, dim: Dims = -1, eps: float = 0.0) -> Tensor:
    r"""Return how far from zero every vector is sent.

    .. math:: \|N(x)\| = \frac{\sqrt n\,\sigma}{\sqrt{\sigma^2+\epsilon}}

    Args:
        x: any shape, real.
        dim: dim or dims of one vector.
        eps: added to the variance; 0 puts all on one sphere.

    Returns:
        Tensor: norms, with the dims of a vector kept as 1, float32 or wider.

    Raises:
        ValueError: as :func:`standardize`.
        TypeError: as :func:`standardize`.

    References:
        New interpretations of normalization methods in deep learning, Sun et al., 2020.

    Example:
        >>> standardize_radius(torch.tensor([[1.0, 2.0, 6.0], [1.0, 1.0, 1.0]])).flatten()
        tensor([1.7321, 0.0000])
    """
    parts = _parts(x, dim, eps)
    return math.sqrt(parts.n) * parts.sigma / parts.s


def standardize_null(x: Tensor, dim: Dims = -1) -> tuple[Tensor, Tensor]:
    r"""Return the two directions that standardization does not see: shift and scale.

    .. math:: \frac{e}{\sqrt n},\qquad u = \frac{A x}{\|A x\|}

    Args:
        x: any shape, real.
        dim: dim or dims of one vector.

    Returns:
        tuple[Tensor, Tensor]: unit vectors of the shape of ``x``, orthogonal to each other;
        the second is zero for vectors of equal numbers.

    Raises:
        ValueError: as :func:`standardize`.
        TypeError: as :func:`standardize`.

    References:
        New interpretations of normalization methods in deep learning, Sun et al., 2020.

    Example:
        >>> shift, scale = standardize_null(torch.tensor([1.0, 2.0, 6.0]))
        >>> shift, scale
        (tensor([0.5774, 0.5774, 0.5774]), tensor([-0.5345, -0.2673,  0.8018]))
    """
    parts = _parts(x, dim, 0.0)
    root = math.sqrt(parts.n)
    return torch.full_like(x, 1 / root), (parts.centered / (parts.s * root)).to(x.dtype)


def standardize_pullback(x: Tensor, g: Tensor, dim: Dims = -1, eps: float = 0.0) -> Tensor:
    r"""Return :math:`J g`, without forming J: what backward and forward derivatives both are.

    .. math:: J g = \frac1s\Bigl(A g - \frac{\sigma^2}{s^2}\langle u, g\rangle u\Bigr)

    Args:
        x: the point, any shape, real.
        g: a gradient at N(x), or a tangent at x (J is symmetric); shape of ``x``.
        dim: dim or dims of one vector.
        eps: added to the variance.

    Returns:
        Tensor: shape and dtype of ``x``; zero mean, and for eps = 0 orthogonal to ``x``.

    Raises:
        ValueError: shapes differ, or as :func:`standardize`.
        TypeError: as :func:`standardize`.

    References:
        New interpretations of normalization methods in deep learning, Sun et al., 2020.

    Example:
        >>> x, g = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1.0, 0.0, 0.0])
        >>> x.requires_grad_()
        tensor([1., 2., 6.], requires_grad=True)
        >>> standardize(x).backward(g)
        >>> torch.allclose(x.grad, standardize_pullback(x.detach(), g), atol=1e-6)
        True
    """
    if g.shape != x.shape:
        raise ValueError(f"g has shape {tuple(g.shape)} and x {tuple(x.shape)}; they must agree")
    parts = _parts(x, dim, eps)
    dims = [dim] if isinstance(dim, int) else list(dim)
    wide = g.to(parts.centered.dtype)
    y = parts.centered / parts.s
    along = (y * wide).mean(dims, keepdim=True)
    return ((wide - wide.mean(dims, keepdim=True) - along * y) / parts.s).to(x.dtype)


def standardize_jacobian(x: Tensor, eps: float = 0.0) -> Tensor:
    r"""Return J of the last dim: :math:`\frac1s(I - ee^\top/n - \frac{\sigma^2}{s^2}uu^\top)`.

    Args:
        x: (..., n), real, n >= 2.
        eps: added to the variance.

    Returns:
        Tensor: (..., n, n), dtype of ``x``; symmetric. For eps = 0, s J is the orthogonal projector
        of rank n - 2 whose null space :func:`standardize_null` returns.

    Raises:
        ValueError: as :func:`standardize`.
        TypeError: as :func:`standardize`.

    References:
        New interpretations of normalization methods in deep learning, Sun et al., 2020.

    Example:
        >>> j = standardize_jacobian(torch.randn(7, dtype=torch.float64))
        >>> int(torch.linalg.matrix_rank(j))
        5
    """
    parts = _parts(x, -1, eps)
    y = parts.centered / parts.s
    n = parts.n
    a = torch.eye(n, dtype=y.dtype, device=y.device) - 1 / n
    projector = a - y.unsqueeze(-1) * y.unsqueeze(-2) / n
    return (projector / parts.s.unsqueeze(-1)).to(x.dtype)

"""The parametrizations of normalized weights: a direction for every channel, times a gain."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor, nn

from sphereopt.products import widened


def _over(dim: int, v: Tensor) -> list[int]:
    return [other for other in range(v.dim()) if other != dim % v.dim()]


def _centered(v: Tensor, centered: bool, dim: int) -> Tensor:
    rows = widened(v)
    return rows - rows.mean(_over(dim, v), keepdim=True) if centered else rows


def _lengths(v: Tensor, p: float, dim: int) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(widened(v), p, _over(dim, v), keepdim=True)
    return norms


def normalized_rows(
    v: Tensor, p: float = 2.0, centered: bool = False, dim: int = 0, eps: float = 1e-12
) -> Tensor:
    r"""Return every channel's weights divided by their p-norm.

    .. math:: u_i = \frac{A v_i}{\|A v_i\|_p + \epsilon}

    Args:
        v: weights, two dims or more.
        p: order of the norm, 1 or more; ``math.inf`` for the largest entry.
        centered: subtract each channel's mean first (:math:`A = I - ee^T/n`).
        dim: which dim counts output channels: 0, or 1 for transposed convolutions.
        eps: added to the norm; a channel of zeros stays zeros.

    Returns:
        Tensor: shape of ``v``, float32 or wider.

    Example:
        >>> normalized_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    rows = _centered(v, centered, dim)
    return rows / (_lengths(rows, p, dim) + eps)


class NormalizedRows(nn.Module, ABC):
    """The parametrization: direction of each row, times gains that a subclass says."""

    def __init__(self, p: float, centered: bool, dim: int, eps: float) -> None:
        super().__init__()
        self.p, self.centered, self.dim, self.eps = p, centered, dim, eps

    def direction(self, v: Tensor) -> Tensor:
        return normalized_rows(v, self.p, self.centered, self.dim, self.eps)

    def lengths(self, v: Tensor) -> Tensor:
        return _lengths(_centered(v, self.centered, self.dim), self.p, self.dim)

    @abstractmethod
    def right_inverse(self, w: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return what to start from, given the weight that the module has."""

    def extra_repr(self) -> str:
        centered = ", centered" if self.centered else ""
        return f"p={self.p:g}{centered}, dim={self.dim}, eps={self.eps:g}"


@final
class TrainableGains(NormalizedRows):
    """``scale * g_i``, with g free; it starts from a number, or from the weight's own norms."""

    def __init__(
        self, p: float, centered: bool, dim: int, eps: float, scale: float, start: float | None
    ) -> None:
        super().__init__(p, centered, dim, eps)
        self.scale, self.start = scale, start

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        return (self.scale * widened(g) * self.direction(v)).to(v.dtype)

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        lengths = self.lengths(w)
        own = (lengths + self.eps) / self.scale
        g = own if self.start is None else torch.full_like(lengths, self.start)
        return g.to(w.dtype), w


@final
class BoundedGains(NormalizedRows):
    """``total * g_i / |g|``: the layer keeps its norm, channels share it."""

    def __init__(self, p: float, dim: int, eps: float, w: Tensor, rho: float | None) -> None:
        super().__init__(p, False, dim, eps)
        total = self.lengths(w).norm()
        self.total: Tensor
        self.register_buffer("total", total if rho is None else torch.full_like(total, rho))

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        wide = widened(g)
        gains: Tensor = wide * (self.total / (wide.norm() + self.eps))
        return (gains * self.direction(v)).to(v.dtype)

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return self.lengths(w).to(w.dtype), w


@final
class FixedGain(NormalizedRows):
    """One number for every row of the layer: nothing to train but directions."""

    def __init__(self, p: float, dim: int, eps: float, w: Tensor, rho: float | None) -> None:
        super().__init__(p, False, dim, eps)
        kept = widened(w).norm() / self.direction(w).norm()
        self.rho: Tensor
        self.register_buffer("rho", kept if rho is None else torch.full_like(kept, rho))

    def forward(self, v: Tensor) -> Tensor:
        return (self.rho * self.direction(v)).to(v.dtype)

    def right_inverse(self, w: Tensor) -> Tensor:
        return w

r"""Updates of a given size: sign, and the Newton-Schulz iteration of Muon.

Both make of a Gaussian buffer :math:`c` an update :math:`\phi(c)` whose size does not depend on
that of :math:`c`. Two numbers say how such a map treats a signal buried in the past: its *power*
:math:`U^2 = E|\phi|^2`, and the *overlap* of the updates made of two buffers with correlation
:math:`\rho`,

.. math::
    f(\rho) = E\langle\phi(c), \phi(c')\rangle / U^2 = p_1\rho + p_3\rho^3 + \ldots, \qquad
    \textstyle\sum_n p_n = 1

The share :math:`p_1` acts like a linear optimizer, the rest like added noise with a shorter memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["Shape", "newton_schulz", "sign"]

Array = NDArray[np.float64]

#: Keller Jordan's quintic, as in ``torch.optim.Muon``: coefficients and number of iterations.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_NODES = 4096
#: Up to here the spectrum is far from that of the limit of large matrices.
_SMALL = 32
#: Singular values repel each other, so that few are near the jump of the sign: less is lost.
_CUBIC = 0.3


@dataclass(frozen=True)
class Shape:
    r"""A map from a buffer to an update of given size.

    Attributes:
        power: :math:`U^2`, the squared norm of an update; per weight if ``per_weight``.
        share: :math:`p_1`, the linear share of the power.
        per_weight: Whether ``power`` is to be multiplied by the number of weights.
        cubic: How much of what is not linear goes as :math:`\rho^3`.
    """

    power: float
    share: float
    per_weight: bool = False
    cubic: float = 0.0

    def overlap(self, rho: Array) -> Array:
        r"""Return :math:`f(\rho)`: correlation of updates made of buffers with correlation rho.

        .. math::
            f(\rho) = p_1\rho + (1 - p_1)\left[(1 - c)\frac{\arcsin\rho - \rho}{\pi/2 - 1}
                + c\,\rho^3\right]

        Notes:
            *Source*: exact for the sign of Gaussians, where :math:`c = 0` (van Vleck's arcsine
            law). For orthogonalization :math:`p_1` is that of the matrix's shape; :math:`c` is
            fitted, and the overlap within 0.02 of that of torch's iteration.
        """
        bent: Array = (1 - self.cubic) * (np.arcsin(rho) - rho) / (math.pi / 2 - 1)
        return self.share * rho + (1 - self.share) * (bent + self.cubic * rho**3)

    def tails(self, first: float, decay: float) -> Array:
        r"""Return what the powers over one add to the correlation of an update with the past.

        .. math:: \sum_{k=1}^n f(\rho_k) - p_1\rho_k, \qquad \rho_k = first\cdot decay^{k-1}

        Args:
            first: Correlation of the buffers of successive updates.
            decay: By which it falls from lag to lag.

        Returns:
            The sum over the n last updates, for n from 0 to where no more is added.
        """
        if first <= 0:
            return np.zeros(1)
        # Where rho is below 1e-5 the cube is nothing.
        lags = 1 if decay == 0 else 1 + int(max(0.0, math.log(1e-5 / first) / math.log(decay)))
        rho = np.minimum(first * decay ** np.arange(lags, dtype=np.float64), 1.0)
        added: Array = np.cumsum(self.overlap(rho) - self.share * rho)
        return np.concatenate([np.zeros(1), added])


def sign() -> Shape:
    r"""Return the sign of every entry: :math:`U^2 = d`, :math:`p_1 = 2/\pi`."""
    return Shape(1.0, 2 / math.pi, per_weight=True)


@lru_cache(maxsize=256)
def newton_schulz(rows: int, columns: int, ratio: float = 1.0) -> Shape:
    r"""Return Muon's orthogonalization of a Gaussian matrix.

    .. math::
        U^2 = ratio^2 \sum_i h(\sigma_i)^2, \qquad
        p_1 = \frac{(\sum_i h(\sigma_i)\sigma_i)^2}{\sum_i h(\sigma_i)^2\sum_i\sigma_i^2}

    over the singular values :math:`\sigma` of the matrix divided by its norm, where :math:`h` is
    what five iterations of the quintic make of one singular value.

    Args:
        rows: Rows of the matrix.
        columns: Its columns.
        ratio: What the step is multiplied by.

    Returns:
        Power and linear share.

    Notes:
        *Assumes* singular values as in the limit of large matrices (Marchenko-Pastur), where
        the shorter side is over 32; below they are those of a fixed set of random matrices. The
        result is not orthogonal: singular values end between 0.7 and 1.2, small ones below.
        *Valid when* there are some 16 weights or more.

    References:
        Muon: An optimizer for hidden layers in neural networks, Jordan et al., 2024.
        Distribution of eigenvalues for some sets of random matrices, Marchenko and Pastur, 1967.

    Example:
        >>> made = newton_schulz(256, 1024)
        >>> round(made.power / 256, 2)
        0.91
    """
    small = min(rows, columns)
    sigma, weight = _singular_values(small, max(rows, columns))
    made = sigma
    a, b, c = _QUINTIC
    for _ in range(_ITERATIONS):
        square = made * made
        made = made * (a + square * (b + c * square))
    power = float(np.sum(weight * made**2))
    share = float(np.sum(weight * made * sigma) ** 2 / (power * np.sum(weight * sigma**2)))
    # A vector is only divided by its norm: nothing is left to be fitted.
    return Shape(ratio**2 * small * power, share, cubic=_CUBIC if small > 1 else 0.0)


def _singular_values(small: int, large: int) -> tuple[Array, Array]:
    """Return singular values of a Gaussian matrix over its norm, and their probabilities."""
    if small <= _SMALL:
        return _sampled(small, large)
    aspect = small / large
    angle = (np.arange(_NODES) + 0.5) * math.pi / _NODES
    # Squared singular values over the number of the longer side, by the substitution that makes
    # the density's two roots smooth.
    squares = 1 + aspect + 2 * math.sqrt(aspect) * np.cos(angle)
    weight = np.sin(angle) ** 2 / squares
    weight /= weight.sum()
    return np.sqrt(squares / (small * np.sum(weight * squares))), weight


def _sampled(small: int, large: int) -> tuple[Array, Array]:
    """Return the singular values of a fixed set of random matrices, by Bartlett's decomposition."""
    random = np.random.default_rng(0)
    count = math.ceil(4 * _NODES / small)
    # A Gaussian matrix is a triangular one times an orthogonal one.
    factor = np.tril(random.standard_normal((count, small, small)), -1)
    freedom = large - np.arange(small)
    factor += np.sqrt(random.chisquare(freedom, (count, small)))[..., None] * np.eye(small)
    sigma = np.asarray(np.linalg.svd(factor, compute_uv=False), np.float64)
    sigma /= np.linalg.norm(sigma, axis=1, keepdims=True)
    return sigma.ravel(), np.full(sigma.size, 1 / sigma.size)

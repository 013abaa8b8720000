"""The ReLU that gives back zero mean and unit variance for standard normal input."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  torch's own documentation calls it F

__all__ = ["HALF_NORMAL_MEAN", "RELU_GAIN", "ScaledReLU", "TranslatedReLU", "scaled_relu"]

HALF_NORMAL_MEAN = 1 / math.sqrt(2 * math.pi)
"""Mean of ReLU(z), z standard normal."""

RELU_GAIN = math.sqrt(2 * math.pi / (math.pi - 1))
"""One over the standard deviation of ReLU(z), z standard normal: 1.7128."""


def scaled_relu(x: Tensor) -> Tensor:
    r"""Rectify, translate and scale, so that standard normal input gives mean 0 and variance 1.

    .. math:: y = \sqrt{\tfrac{2\pi}{\pi-1}}\,\bigl(\max(x,0) - \tfrac{1}{\sqrt{2\pi}}\bigr)

    Args:
        x: any shape.

    Returns:
        Tensor: same shape and dtype, entries from -0.683 on.

    Notes:
        Beyond BatchNorm calls it the scaled ReLU (it goes with weight normalization, which scales
        nothing by what the data are); the code of Norm matters the translated ReLU. The two are
        the same function: 1/sqrt((1 - 1/pi)/2) is the factor above.

    References:
        Characterizing signal propagation to close the performance gap in unnormalized ResNets,
        Brock, De and Smith, 2021 (the constant); Beyond BatchNorm, Lubana, Dick and
        Tanaka, 2021; Norm matters, Hoffer, Banner, Golan and Soudry, 2018 (authors' code).

    Example:
        >>> import torch
        >>> y = scaled_relu(torch.randn(100_000, generator=torch.Generator().manual_seed(0)))
        >>> print(f"{y.mean().abs():.2f} {y.std():.2f}")
        0.00 1.00
    """
    return RELU_GAIN * (F.relu(x) - HALF_NORMAL_MEAN)


class ScaledReLU(nn.Module):
    """:func:`scaled_relu` as a module, for the layers after weight normalization.

    Example:
        >>> import torch
        >>> ScaledReLU()(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-0.6833, -0.6833,  1.0295])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return :func:`scaled_relu` of ``x``."""
        return scaled_relu(x)


TranslatedReLU = ScaledReLU

"""Variance normalization: batch normalization that leaves the mean where it is."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sphereopt.nn._moments import count, moments, scale_shift, unbias
from sphereopt.nn._running import (
    RunningNorm,
    average_into,
    batch_dims,
    need_two_values,
    per_channel,
)
from sphereopt.products import widened

__all__ = ["VarianceNorm1d", "VarianceNorm2d", "VarianceNorm3d", "variance_norm"]


def variance_norm(
    x: Tensor,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    unbiased: bool = False,
) -> Tensor:
    r"""Divide each channel by its standard deviation over the batch; its mean stays.

    .. math::
        y = \gamma\,\frac{x}{\sqrt{\operatorname{var}_{N,\dots}(x)+\epsilon}} + \beta

    Args:
        x: (N, C, ...).
        running_var: (C,); moved towards the batch's variance in training, used otherwise.
        weight: Gain :math:`\gamma`, (C,); None for 1.
        bias: Shift :math:`\beta`, (C,); None for 0.
        training: Use the variance of this batch.
        momentum: Weight of this batch in ``running_var``.
        eps: Added to the variance.
        unbiased: Divide by n-1 instead of n in the batch's variance.

    Returns:
        y, of x's shape and dtype.

    Raises:
        ValueError: If there is neither a batch of two values per channel nor a running variance.

    Notes:
        The variance is that around the mean, although the mean is not subtracted:
        ``F.batch_norm(x, ...)`` plus the normalized mean. What is averaged is what is divided by,
        whereas ``F.batch_norm`` divides by the biased variance and averages the unbiased one.
        fp16 and bf16 are reduced in float32, without a copy of x.

    References:
        Batch normalization provably avoids rank collapse for randomly initialised deep networks,
        Daneshmand, Kohler, Bach, Hofmann, Lucchi, 2020.
        Beyond BatchNorm: towards a unified understanding of normalization in deep learning,
        Lubana, Dick, Tanaka, 2021.

    Example:
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> variance_norm(4 * x, training=True, eps=0.0)
        tensor([[1.],
                [3.]])
    """
    if training:
        need_two_values(x, "variance_norm")
        dims = batch_dims(x)
        var = unbias(moments(x, dims)[1], count(x, dims), unbiased)
        average_into(running_var, var, momentum)
    elif running_var is None:
        raise ValueError("running_var=None: outside of training variance_norm needs one")
    else:
        var = per_channel(widened(running_var), x)
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * per_channel(weight, x)
    return scale_shift(x, scale, None if bias is None else per_channel(bias, x))


class _VarianceNorm(RunningNorm):
    starts: ClassVar[dict[str, float]] = {"running_var": 1.0}
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        unbiased: bool = False,
    ) -> None:
        options = (eps, momentum, affine, track_running_stats, device, dtype)
        super().__init__(num_features, *options, bias=bias)
        self.unbiased = unbiased

    def normalize(self, x: Tensor, training: bool, momentum: float | Tensor) -> Tensor:
        return variance_norm(
            x, self.running_var, self.weight, self.bias, training, momentum, self.eps, self.unbiased
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + (", unbiased=True" if self.unbiased else "")


class VarianceNorm1d(_VarianceNorm):
    """Batch normalization without the subtraction of the mean; see :func:`variance_norm`.

    Takes (N, C) or (N, C, L); arguments and buffers are those of ``torch.nn.BatchNorm1d`` without
    ``running_mean``, and ``unbiased``: divide by n-1 in the batch's variance.

    Example:
        >>> y = VarianceNorm1d(2)(torch.randn(8, 2) + 100)
        >>> bool((y.var(0, correction=0) - 1).abs().max() < 1e-3 and (y.mean(0) > 10).all())
        True
    """

    ranks: ClassVar[tuple[int, ...]] = (2, 3)


class VarianceNorm2d(_VarianceNorm):
    """Batch normalization without the subtraction of the mean; see :func:`variance_norm`.

    Takes (N, C, H, W); arguments and buffers are those of ``torch.nn.BatchNorm2d`` without
    ``running_mean``, and ``unbiased``: divide by n-1 in the batch's variance.

    Example:
        >>> VarianceNorm2d(16)
        VarianceNorm2d(16, eps=1e-05, momentum=0.1, affine=True, bias=True,
            track_running_stats=True)
    """

    ranks: ClassVar[tuple[int, ...]] = (4,)


class VarianceNorm3d(_VarianceNorm):
    """Batch normalization without the subtraction of the mean; see :func:`variance_norm`.

    Takes (N, C, D, H, W); arguments and buffers are those of ``torch.nn.BatchNorm3d`` without
    ``running_mean``, and ``unbiased``: divide by n-1 in the batch's variance.

    Example:
        >>> VarianceNorm3d(4)(torch.randn(2, 4, 3, 3, 3)).shape
        torch.Size([2, 4, 3, 3, 3])
    """

    ranks: ClassVar[tuple[int, ...]] = (5,)

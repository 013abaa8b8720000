r"""Batch norms that divide by an L1, L-infinity, Top-k or Lp size instead of a standard deviation.

With :math:`c = x - \operatorname{mean}(x)` per channel and n values in it,

.. math:: y = \gamma\,\frac{c}{s(c)} + \beta,

======================  ==========================================================================
``L1BatchNorm*``        :math:`s = \sqrt{\pi/2}\;\frac1n\sum|c| + \epsilon`
``LInfBatchNorm*``      :math:`s = C_n \max|c| + \epsilon`
``TopKBatchNorm*``      :math:`s = C_n\,\frac1k\sum_{j\le k}|c|_{(j)} + \epsilon`, the k largest
``LpBatchNorm*``        :math:`s = C\,(\frac1n\sum|c|^p + \epsilon)^{1/p}`
======================  ==========================================================================

Every class takes what ``torch.nn.BatchNorm2d`` takes and behaves as it does, with the buffer
``running_scale`` for the divisor s itself, constant and eps included, in place of ``running_var``.

The authors' code differs in what is averaged: there the momentum multiplies the old average instead
of the newest batch, the average is that of 1/s, both buffers start at zero, their L1 norm has no
eps, and for :math:`p=\infty` the largest c is taken rather than the largest :math:`|c|`.

References:
    Norm matters: efficient and accurate normalization schemes in deep networks, Hoffer, Banner,
    Golan and Soudry, 2018.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from sphereopt.nn._running import RunningNorm
from sphereopt.nn._scales import Constants
from sphereopt.nn.batch_norm_functions import (
    check_choice,
    check_p,
    l1_batch_norm,
    linf_batch_norm,
    lp_batch_norm,
    need_k,
    topk_batch_norm,
)

__all__ = [
    "L1BatchNorm1d",
    "L1BatchNorm2d",
    "L1BatchNorm3d",
    "LInfBatchNorm1d",
    "LInfBatchNorm2d",
    "LInfBatchNorm3d",
    "LpBatchNorm1d",
    "LpBatchNorm2d",
    "LpBatchNorm3d",
    "TopKBatchNorm1d",
    "TopKBatchNorm2d",
    "TopKBatchNorm3d",
]


class _BatchNorm(RunningNorm):
    starts: ClassVar[dict[str, float]] = {"running_mean": 0.0, "running_scale": 1.0}
    running_mean: Tensor | None
    running_scale: Tensor | None

    def _options(self, training: bool, momentum: float | Tensor) -> dict[str, Any]:
        return {
            "running_mean": self.running_mean,
            "running_scale": self.running_scale,
            "weight": self.weight,
            "bias": self.bias,
            "training": training,
            "momentum": momentum,
            "eps": self.eps,
        }


class _L1BatchNorm(_BatchNorm):
    def normalize(self, x: Tensor, training: bool, momentum: float | Tensor) -> Tensor:
        return l1_batch_norm(x, **self._options(training, momentum))


class L1BatchNorm1d(_L1BatchNorm):
    """Batch norm that divides by the mean absolute deviation; see :func:`l1_batch_norm`.

    Takes (N, C) or (N, C, L); arguments as ``torch.nn.BatchNorm1d``.

    Example:
        >>> L1BatchNorm1d(4)(torch.randn(8, 4)).shape
        torch.Size([8, 4])
    """

    ranks: ClassVar[tuple[int, ...]] = (2, 3)


class L1BatchNorm2d(_L1BatchNorm):
    """Batch norm that divides by the mean absolute deviation; see :func:`l1_batch_norm`.

    Takes (N, C, H, W); arguments as ``torch.nn.BatchNorm2d``.

    Example:
        >>> L1BatchNorm2d(4)
        L1BatchNorm2d(4, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """

    ranks: ClassVar[tuple[int, ...]] = (4,)


class L1BatchNorm3d(_L1BatchNorm):
    """Batch norm that divides by the mean absolute deviation; see :func:`l1_batch_norm`.

    Takes (N, C, D, H, W); arguments as ``torch.nn.BatchNorm3d``.

    Example:
        >>> L1BatchNorm3d(4)(torch.randn(2, 4, 3, 3, 3)).shape
        torch.Size([2, 4, 3, 3, 3])
    """

    ranks: ClassVar[tuple[int, ...]] = (5,)


class _LInfBatchNorm(_BatchNorm):
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
        constants: Constants = "paper",
    ) -> None:
        check_choice(constants)
        options = (eps, momentum, affine, track_running_stats, device, dtype)
        super().__init__(num_features, *options, bias=bias)
        self.constants: Constants = constants

    def normalize(self, x: Tensor, training: bool, momentum: float | Tensor) -> Tensor:
        return linf_batch_norm(x, **self._options(training, momentum), constants=self.constants)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, constants={self.constants!r}"


class LInfBatchNorm1d(_LInfBatchNorm):
    """Batch norm that divides by the largest absolute deviation; see :func:`linf_batch_norm`.

    Takes (N, C) or (N, C, L); arguments as ``torch.nn.BatchNorm1d`` and, by keyword,
    constants: "paper" or "gaussian" of :func:`linf_batch_norm`.

    Example:
        >>> LInfBatchNorm1d(4)(torch.randn(8, 4)).shape
        torch.Size([8, 4])
    """

    ranks: ClassVar[tuple[int, ...]] = (2, 3)


class LInfBatchNorm2d(_LInfBatchNorm):
    """Batch norm that divides by the largest absolute deviation; see :func:`linf_batch_norm`.

    Takes (N, C, H, W); arguments as ``torch.nn.BatchNorm2d`` and, by keyword,
    constants: "paper" or "gaussian" of :func:`linf_batch_norm`.

    Example:
        >>> LInfBatchNorm2d(4)
        LInfBatchNorm2d(4, eps=1e-05, momentum=0.1, affine=True, bias=True,
            track_running_stats=True, constants='paper')
    """

    ranks: ClassVar[tuple[int, ...]] = (4,)


class LInfBatchNorm3d(_LInfBatchNorm):
    """Batch norm that divides by the largest absolute deviation; see :func:`linf_batch_norm`.

    Takes (N, C, D, H, W); arguments as ``torch.nn.BatchNorm3d`` and, by keyword,
    constants: "paper" or "gaussian" of :func:`linf_batch_norm`.

    Example:
        >>> LInfBatchNorm3d(4)(torch.randn(2, 4, 3, 3, 3)).shape
        torch.Size([2, 4, 3, 3, 3])
    """

    ranks: ClassVar[tuple[int, ...]] = (5,)


class _TopKBatchNorm(_BatchNorm):
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
        k: int = 10,
        constants: Constants = "paper",
    ) -> None:
        check_choice(constants)
        if k < 1:
            raise ValueError(f"k={k} must be at least 1")
        options = (eps, momentum, affine, track_running_stats, device, dtype)
        super().__init__(num_features, *options, bias=bias)
        self.k = k
        self.constants: Constants = constants

    def check(self, x: Tensor) -> None:
        need_k(x, self.k, type(self).__name__)

    def normalize(self, x: Tensor, training: bool, momentum: float | Tensor) -> Tensor:
        return topk_batch_norm(
            x, **self._options(training, momentum), k=self.k, constants=self.constants
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, k={self.k}, constants={self.constants!r}"


class TopKBatchNorm1d(_TopKBatchNorm):
    """Batch norm that divides by the mean of its k largest deviations; see :func:`topk_batch_norm`.

    Takes (N, C) or (N, C, L); arguments as ``torch.nn.BatchNorm1d`` and, by keyword,
    k and constants of :func:`topk_batch_norm`.

    Example:
        >>> TopKBatchNorm1d(4)(torch.randn(16, 4)).shape
        torch.Size([16, 4])
    """

    ranks: ClassVar[tuple[int, ...]] = (2, 3)


class TopKBatchNorm2d(_TopKBatchNorm):
    """Batch norm that divides by the mean of its k largest deviations; see :func:`topk_batch_norm`.

    Takes (N, C, H, W); arguments as ``torch.nn.BatchNorm2d`` and, by keyword,
    k and constants of :func:`topk_batch_norm`.

    Example:
        >>> TopKBatchNorm2d(4)
        TopKBatchNorm2d(4, eps=1e-05, momentum=0.1, affine=True, bias=True,
            track_running_stats=True, k=10, constants='paper')
    """

    ranks: ClassVar[tuple[int, ...]] = (4,)


class TopKBatchNorm3d(_TopKBatchNorm):
    """Batch norm that divides by the mean of its k largest deviations; see :func:`topk_batch_norm`.

    Takes (N, C, D, H, W); arguments as ``torch.nn.BatchNorm3d`` and, by keyword,
    k and constants of :func:`topk_batch_norm`.

    Example:
        >>> TopKBatchNorm3d(4)(torch.randn(2, 4, 3, 3, 3)).shape
        torch.Size([2, 4, 3, 3, 3])
    """

    ranks: ClassVar[tuple[int, ...]] = (5,)


class _LpBatchNorm(_BatchNorm):
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
        p: float = 2.0,
        constants: Constants = "paper",
    ) -> None:
        check_choice(constants)
        check_p(p)
        options = (eps, momentum, affine, track_running_stats, device, dtype)
        super().__init__(num_features, *options, bias=bias)
        self.p = p
        self.constants: Constants = constants

    def normalize(self, x: Tensor, training: bool, momentum: float | Tensor) -> Tensor:
        return lp_batch_norm(
            x, **self._options(training, momentum), p=self.p, constants=self.constants
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}, constants={self.constants!r}"


class LpBatchNorm1d(_LpBatchNorm):
    """Batch norm that divides by the p-th mean of the deviations; see :func:`lp_batch_norm`.

    Takes (N, C) or (N, C, L); arguments as ``torch.nn.BatchNorm1d`` and, by keyword,
    p and constants of :func:`lp_batch_norm`.

    Example:
        >>> LpBatchNorm1d(4, p=3.0)(torch.randn(8, 4)).shape
        torch.Size([8, 4])
    """

    ranks: ClassVar[tuple[int, ...]] = (2, 3)


class LpBatchNorm2d(_LpBatchNorm):
    """Batch norm that divides by the p-th mean of the deviations; see :func:`lp_batch_norm`.

    Takes (N, C, H, W); arguments as ``torch.nn.BatchNorm2d`` and, by keyword,
    p and constants of :func:`lp_batch_norm`.

    Example:
        >>> LpBatchNorm2d(4, p=3.0)
        LpBatchNorm2d(4, eps=1e-05, momentum=0.1, affine=True, bias=True,
            track_running_stats=True, p=3.0, constants='paper')
    """

    ranks: ClassVar[tuple[int, ...]] = (4,)


class LpBatchNorm3d(_LpBatchNorm):
    """Batch norm that divides by the p-th mean of the deviations; see :func:`lp_batch_norm`.

    Takes (N, C, D, H, W); arguments as ``torch.nn.BatchNorm3d`` and, by keyword,
    p and constants of :func:`lp_batch_norm`.

    Example:
        >>> LpBatchNorm3d(4, p=3.0)(torch.randn(2, 4, 3, 3, 3)).shape
        torch.Size([2, 4, 3, 3, 3])
    """

    ranks: ClassVar[tuple[int, ...]] = (5,)

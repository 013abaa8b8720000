"""EvoNorms: normalization and activation in one searched expression."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sphereopt.nn._moments import count, moments, scale_shift, unbias
from sphereopt.nn._running import (
    RunningNorm,
    average_into,
    need_two_values,
    per_channel,
)
from sphereopt.products import widened

__all__ = ["EvoNormB0", "EvoNormS0", "evonorm_b0", "evonorm_s0"]


def evonorm_s0(
    x: Tensor,
    v: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    groups: int = 32,
    eps: float = 1e-5,
    unbiased: bool = False,
) -> Tensor:
    r"""Swish over the standard deviation of a group of channels of each sample.

    .. math::
        y = \gamma\,\frac{x\,\operatorname{sigmoid}(v\,x)}
            {\sqrt{\operatorname{var}_{group,H,W}(x)+\epsilon}} + \beta

    Args:
        x: (N, C, ...) with at least one dim of positions, ``groups`` dividing C.
        v: (C,); None for 1.
        weight: Gain :math:`\gamma`, (C,); None for 1.
        bias: Shift :math:`\beta`, (C,); None for 0.
        groups: Number of groups.
        eps: Added to the variance.
        unbiased: Divide by n-1 in the variance, as the code of *Beyond BatchNorm* does.

    Returns:
        y, of x's shape and dtype.

    Raises:
        ValueError: If the groups do not divide the channels, or a group has a single value.

    Notes:
        Not scale-invariant: ``sigmoid(v*x)`` knows the scale of x. Only the weights before it
        jointly with 1/v are. fp16 and bf16 are reduced in float32, without a copy of x.

    References:
        Evolving normalization-activation layers, Liu, Brock, Simonyan, Le, 2020 (the code in
        its appendix: biased variance, v from 1).

    Example:
        >>> evonorm_s0(torch.tensor([[[-1.0, 1.0]]]), groups=1, eps=0.0)
        tensor([[[-0.2689,  0.7311]]])
    """
    if x.dim() < 3 or groups < 1 or x.shape[1] % groups:
        raise ValueError(
            f"groups={groups} must divide the channels of (N, C, ...), dim 1 of shape "
            f"{tuple(x.shape)}, with at least one dim of positions"
        )
    positions, size = list(range(2, x.dim())), x.shape[1] // groups
    n = size * count(x, positions)
    if n < 2:
        raise ValueError(
            f"evonorm_s0 takes its statistics over at least two values per group and got an input "
            f"of shape {tuple(x.shape)} in {groups} groups; use fewer groups"
        )
    mean, own = (s.reshape(len(x), groups, size) for s in moments(x, positions))
    # The variance within channels and that between them add up to the group's.
    var = own.mean(2, keepdim=True) + mean.var(2, correction=0, keepdim=True)
    scale = torch.rsqrt(unbias(var, n, unbiased) + eps).expand(-1, -1, size)
    scale = scale.reshape(*x.shape[:2], *[1] * len(positions))
    if weight is not None:
        scale = scale * per_channel(weight, x)
    gate = torch.sigmoid(x if v is None else per_channel(v, x).to(x.dtype) * x)
    return scale_shift(x * gate, scale, None if bias is None else per_channel(bias, x))


def evonorm_b0(
    x: Tensor,
    running_var: Tensor | None = None,
    v: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    unbiased: bool = False,
) -> Tensor:
    r"""Divide by the larger of the batch's deviation and an affine map of x.

    .. math::
        y = \gamma\,\frac{x}{\max\bigl(\sqrt{\operatorname{var}_{N,H,W}(x)+\epsilon},\;
            v\,x+\sqrt{\operatorname{var}_{H,W}(x)+\epsilon}\bigr)} + \beta

    Args:
        x: (N, C, ...) with at least one dim of positions.
        running_var: (C,); moved towards the batch's variance in training, used otherwise.
        v: (C,); None for 1.
        weight: Gain :math:`\gamma`, (C,); None for 1.
        bias: Shift :math:`\beta`, (C,); None for 0.
        training: Use the variance of this batch.
        momentum: Weight of this batch in ``running_var``.
        eps: Added to both variances.
        unbiased: Divide by n-1 in each sample's variance, as the code of *Beyond BatchNorm* does;
            the batch's stays biased, there as here.

    Returns:
        y, of x's shape and dtype.

    Raises:
        ValueError: If there is neither a batch of two values per channel nor a running variance,
            or no position, or one position with ``unbiased``.

    Notes:
        Scale-invariant per channel in training: both arguments of the maximum grow with x. With a
        single position a sample has no variance, which leaves ``v*x + sqrt(eps)``.

    References:
        Evolving normalization-activation layers, Liu, Brock, Simonyan, Le, 2020 (the code in
        its appendix: both variances biased, v from 1).

    Example:
        >>> x = torch.tensor([[[-1.0, 1.0]]])
        >>> evonorm_b0(x, training=True, eps=0.0)
        tensor([[[-1.0000,  0.5000]]])
    """
    positions = list(range(2, x.dim()))
    n = count(x, positions)
    if not positions or n < 1 + unbiased:
        raise ValueError(
            f"evonorm_b0 takes a variance over positions and got an input of shape "
            f"{tuple(x.shape)}; it takes (N, C, ...) with at least {1 + unbiased} positions"
        )
    mean, own = moments(x, positions)
    if training:
        need_two_values(x, "evonorm_b0")
        # The variance within samples and that between them add up to the batch's.
        var = own.mean(0, keepdim=True) + mean.var(0, correction=0, keepdim=True)
        average_into(running_var, var, momentum)
    elif running_var is None:
        raise ValueError("running_var=None: outside of training evonorm_b0 needs one")
    else:
        var = per_channel(widened(running_var), x)
    floor, own = (var + eps).sqrt(), (unbias(own, n, unbiased) + eps).sqrt()
    # max(a, b) = a + relu(b - a): its backward is one pass, torch.maximum's a masked fill of each.
    above = scale_shift(x, None if v is None else per_channel(v, x), own - floor).relu()
    y = x / (above + floor.to(x.dtype))
    return _affine(y, weight, bias)


class EvoNormS0(nn.Module):
    """EvoNorm-S0, activation included; see :func:`evonorm_s0`.

    Args:
        num_features: Channels C of the input (N, C, ...), with at least one dim of positions.
        groups: Number of groups, dividing C.
        eps: Added to the variance.
        affine: Learn ``weight`` and ``bias``, (C,).
        bias: False to learn no ``bias``.
        nonlinear: False for what the authors put where no activation belongs, before a residual
            addition: ``weight * x + bias`` alone, nothing normalized.
        unbiased: Divide by n-1 in the variance, as the code of *Beyond BatchNorm* does.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: If the groups do not divide the channels.

    Notes:
        ``v``, (C,), is learned from 1. The same in training and ``eval()``.

    Example:
        >>> EvoNormS0(64)(torch.randn(2, 64, 5, 5)).shape
        torch.Size([2, 64, 5, 5])
    """

    weight: Tensor | None
    bias: Tensor | None
    v: Tensor | None

    def __init__(
        self,
        num_features: int,
        groups: int = 32,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        bias: bool = True,
        nonlinear: bool = True,
        unbiased: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if groups < 1 or num_features < 1 or num_features % groups:
            raise ValueError(f"groups={groups} must divide num_features={num_features}")
        if eps < 0:
            raise ValueError(f"eps={eps} must not be negative")
        super().__init__()
        self.num_features, self.groups, self.eps, self.affine = num_features, groups, eps, affine
        self.nonlinear, self.unbiased = nonlinear, unbiased
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        for name, learned in (("weight", affine), ("bias", affine and bias), ("v", nonlinear)):
            value = nn.Parameter(torch.empty(num_features, **where)) if learned else None
            self.register_parameter(name, value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start over: gamma and v 1, beta 0."""
        for name, parameter in self.named_parameters():
            nn.init.constant_(parameter, 0.0 if name == "bias" else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized and activated input, of the same shape and dtype.

        Raises:
            ValueError: The input has other channels, or one value per group.
        """
        if x.dim() < 3 or x.shape[1] != self.num_features:
            raise ValueError(
                f"EvoNormS0({self.num_features}) takes (N, C, ...) with C={self.num_features} "
                f"channels and at least one dim of positions, not shape {tuple(x.shape)}"
            )
        if not self.nonlinear:
            return _affine(x, self.weight, self.bias)
        return evonorm_s0(x, self.v, self.weight, self.bias, self.groups, self.eps, self.unbiased)

    def extra_repr(self) -> str:
        """Return the options."""
        return (
            f"{self.num_features}, groups={self.groups}, eps={self.eps}, affine={self.affine}, "
            f"bias={self.bias is not None}" + _flags(self.nonlinear, self.unbiased)
        )


class EvoNormB0(RunningNorm):
    """EvoNorm-B0, activation included; see :func:`evonorm_b0`.

    Args:
        num_features: Channels C of the input (N, C, ...), with at least one dim of positions.
        eps: Added to the variances.
        momentum: As in ``torch.nn.BatchNorm2d``; the authors average with 0.1, or less.
        affine: Learn ``weight`` and ``bias``, (C,).
        track_running_stats: As in ``torch.nn.BatchNorm2d``.
        device: Of parameters and buffers.
        dtype: Of parameters and buffers.
        bias: False to learn no ``bias``.
        nonlinear: False for what the authors put where no activation belongs, before a residual
            addition: ``weight * x + bias`` alone, nothing normalized.
        unbiased: Divide by n-1 in each sample's variance, as the code of *Beyond BatchNorm* does.

    Notes:
        ``v``, (C,), is learned from 1.

    Example:
        >>> EvoNormB0(16)(torch.randn(2, 16, 5, 5)).shape
        torch.Size([2, 16, 5, 5])
    """

    starts: ClassVar[dict[str, float]] = {"running_var": 1.0}
    ranks: ClassVar[tuple[int, ...]] = (3, 4, 5)
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    v: Tensor | None

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
        nonlinear: bool = True,
        unbiased: bool = False,
    ) -> None:
        track = track_running_stats and nonlinear  # an affine map has nothing to track
        super().__init__(num_features, eps, momentum, affine, track, device, dtype, bias=bias)
        self.nonlinear, self.unbiased = nonlinear, unbiased
        v = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.register_parameter("v", v if nonlinear else None)

    def reset_parameters(self) -> None:
        """Start over: gamma and v 1, beta 0, and the running variance."""
        super().reset_parameters()
        v = self._parameters.get("v")  # not there yet when the base class first calls this
        if v is not None:
            nn.init.ones_(v)

    def normalize(self, x: Tensor, training: bool, momentum: float | Tensor) -> Tensor:
        """Return :func:`evonorm_b0` of the input, with this layer's parameters and average."""
        if not self.nonlinear:
            return _affine(x, self.weight, self.bias)
        return evonorm_b0(
            x,
            self.running_var,
            self.v,
            self.weight,
            self.bias,
            training,
            momentum,
            self.eps,
            self.unbiased,
        )

    def extra_repr(self) -> str:
        """Return the options."""
        return super().extra_repr() + _flags(self.nonlinear, self.unbiased)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    scale, shift = (None if p is None else per_channel(p, x) for p in (weight, bias))
    return scale_shift(x, scale, shift)


def _flags(nonlinear: bool, unbiased: bool) -> str:
    """Return the options that are not as usual, as they are printed."""
    return ("" if nonlinear else ", nonlinear=False") + (", unbiased=True" if unbiased else "")

"""Group normalization by number or size of groups, with either variance."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  torch's own documentation calls it F

__all__ = ["GroupNorm", "group_norm"]


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    unbiased: bool = False,
) -> Tensor:
    r"""Standardize each group of channels of each sample; ``F.group_norm`` with either variance.

    .. math::
        \frac{x-m}{\sqrt{\tfrac{n}{n-1}v+\epsilon}}
        = \sqrt{\tfrac{n-1}{n}}\;\frac{x-m}{\sqrt{v+\tfrac{n-1}{n}\epsilon}}

    with m and v the mean and the biased variance of the n values of a group: the unbiased one is
    torch's kernel with another gain and another eps, exactly.

    Args:
        x: (N, C, ...), ``num_groups`` dividing C.
        num_groups: Number of groups.
        weight: Gain :math:`\gamma`, (C,); None for 1.
        bias: Shift :math:`\beta`, (C,); None for 0.
        eps: Added to the variance.
        unbiased: Divide by n-1 in the variance, as the code of *Beyond BatchNorm* does.

    Returns:
        y, of x's shape and dtype.

    Raises:
        ValueError: If the groups do not divide the channels, or a group has a single value.

    References:
        Group normalization, Wu and He, 2018 (biased).
        Beyond BatchNorm, Lubana, Dick, Tanaka, 2021.

    Example:
        >>> x = torch.tensor([[1.0, 3.0, 10.0, 30.0]])
        >>> group_norm(x, 2, eps=0.0)
        tensor([[-1.,  1., -1.,  1.]])
        >>> group_norm(x, 2, eps=0.0, unbiased=True)
        tensor([[-0.7071,  0.7071, -0.7071,  0.7071]])
    """
    if x.dim() < 2 or num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(
            f"num_groups={num_groups} must divide the channels, dim 1 of shape {tuple(x.shape)}"
        )
    n = x.shape[1] // num_groups * math.prod(x.shape[2:])
    if n < 2:
        raise ValueError(
            f"group_norm takes its statistics over at least two values per group and got an input "
            f"of shape {tuple(x.shape)} in {num_groups} groups; use fewer groups"
        )
    if unbiased:
        shrunk = math.sqrt((n - 1) / n)
        weight = x.new_full((x.shape[1],), shrunk) if weight is None else weight * shrunk
        eps = eps * (n - 1) / n
    return F.group_norm(x, num_groups, weight, bias, eps)


class GroupNorm(nn.GroupNorm):
    """Group normalization, with groups by number or by size; see :func:`group_norm`.

    A ``torch.nn.GroupNorm`` in all else: attributes, parameters, ``state_dict``, kernel.

    Args:
        num_channels: Channels C of the input (N, C, ...).
        groups: Number of groups; or
        group_size: Channels per group. 1 is InstanceNorm; ``num_channels`` is LayerNorm over
            channels and positions.
        unbiased: Divide by n-1 in the variance, as the code of *Beyond BatchNorm* does.
        eps: Added to the variance.
        affine: Learn ``weight`` and ``bias``, (C,).
        bias: False to learn no ``bias``.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: If not exactly one of ``groups`` and ``group_size`` is given, or it does not
            divide the channels.

    Notes:
        *Beyond BatchNorm*'s argument ``p_grouping`` is ``groups`` above 1, and ``1 / group_size``
        up to 1.

    Example:
        >>> GroupNorm(64, group_size=16)
        GroupNorm(64, groups=4, group_size=16, eps=1e-05, affine=True, bias=True)
    """

    def __init__(
        self,
        num_channels: int,
        *,
        groups: int | None = None,
        group_size: int | None = None,
        unbiased: bool = False,
        eps: float = 1e-5,
        affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if (groups is None) == (group_size is None):
            raise ValueError(
                f"groups={groups}, group_size={group_size}: give exactly one of the two"
            )
        name, given = ("group_size", group_size) if groups is None else ("groups", groups)
        assert given is not None
        if given < 1 or num_channels < 1 or num_channels % given:
            raise ValueError(f"{name}={given} must divide num_channels={num_channels}")
        if eps < 0:
            raise ValueError(f"eps={eps} must not be negative")
        count = num_channels // given if groups is None else given
        super().__init__(count, num_channels, eps, affine, device, dtype, bias=bias)
        self.unbiased = unbiased

    def forward(self, input: Tensor) -> Tensor:
        """Return :func:`group_norm` of the input, (N, C, ...)."""
        if input.dim() < 2 or input.shape[1] != self.num_channels:
            raise ValueError(
                f"GroupNorm({self.num_channels}) takes inputs with {self.num_channels} channels "
                f"in dim 1, not shape {tuple(input.shape)}"
            )
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps, self.unbiased)

    def extra_repr(self) -> str:
        """Return channels, groups and options."""
        size = self.num_channels // self.num_groups
        return (
            f"{self.num_channels}, groups={self.num_groups}, group_size={size}, eps={self.eps}, "
            f"affine={self.affine}, bias={self.bias is not None}"
            + (", unbiased=True" if self.unbiased else "")
        )

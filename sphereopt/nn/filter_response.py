"""Filter response normalization and its thresholded linear unit."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sphereopt.nn._moments import mean_square, scale_shift
from sphereopt.nn._running import per_channel

__all__ = [
    "TLU",
    "FilterResponseNorm1d",
    "FilterResponseNorm2d",
    "FilterResponseNorm3d",
    "filter_response_norm",
]


def filter_response_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | Tensor = 1e-6,
) -> Tensor:
    r"""Divide each channel of each sample by its root mean square over the positions.

    .. math::
        y = \gamma\,\frac{x}{\sqrt{\operatorname{mean}_{H,W}(x^2)+|\epsilon|}} + \beta

    Args:
        x: (N, C, ...) with at least one dim of positions.
        weight: Gain :math:`\gamma`, (C,); None for 1.
        bias: Shift :math:`\beta`, (C,); None for 0.
        eps: Added to the mean square, by its absolute value: a number, or a tensor of one entry.

    Returns:
        y, of x's shape and dtype.

    Raises:
        ValueError: If x has no positions.

    Notes:
        The same in training and ``eval()``, and independent of the batch. Nothing is centred.
        With a single position it is ``x / sqrt(x**2 + eps)``, the sign of x but for eps: the
        authors then learn eps. fp16 and bf16 are squared in float32, without a copy of x.

    References:
        Filter response normalization layer: eliminating batch dependence in the training of deep
        neural networks, Singh and Krishnan, 2020.

    Example:
        >>> filter_response_norm(torch.tensor([[[3.0, 4.0, 0.0, 0.0]]]), eps=0.0)
        tensor([[[1.2000, 1.6000, 0.0000, 0.0000]]])
    """
    if x.dim() < 3 or 0 in x.shape[2:]:
        raise ValueError(
            f"filter_response_norm averages over positions and got an input of shape "
            f"{tuple(x.shape)}; it takes (N, C, ...) with at least one position"
        )
    scale = torch.rsqrt(
        mean_square(x, list(range(2, x.dim())))
        + (eps.abs() if isinstance(eps, Tensor) else abs(eps))
    )
    if weight is not None:
        scale = scale * per_channel(weight, x)
    return scale_shift(x, scale, None if bias is None else per_channel(bias, x))


class _FilterResponseNorm(nn.Module):
    rank: ClassVar[int]
    eps: float | Tensor
    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-6,
        affine: bool = True,
        *,
        bias: bool = True,
        learnable_eps: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_features < 1:
            raise ValueError(f"num_features={num_features} must be at least 1")
        if eps < 0:
            raise ValueError(f"eps={eps} must not be negative")
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_features, self.affine, self.initial_eps = num_features, affine, eps
        # One entry, not a scalar: sharded training takes no parameters without dims.
        self.eps = nn.Parameter(torch.empty(1, **where)) if learnable_eps else eps
        for name, learned in (("weight", affine), ("bias", affine and bias)):
            value = nn.Parameter(torch.empty(num_features, **where)) if learned else None
            self.register_parameter(name, value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start over: gamma 1, beta 0, and a learned eps where it began."""
        if isinstance(self.eps, Tensor):
            nn.init.constant_(self.eps, self.initial_eps)
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input, of the same shape and dtype.

        Raises:
            ValueError: The input has other dims or channels, or no positions.
        """
        if x.dim() != self.rank or x.shape[1] != self.num_features:
            raise ValueError(
                f"{type(self).__name__}({self.num_features}) takes {self.rank}-d inputs with "
                f"{self.num_features} channels in dim 1, not shape {tuple(x.shape)}"
            )
        return filter_response_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        """Return the options."""
        return (
            f"{self.num_features}, eps={self.initial_eps}, affine={self.affine}, "
            f"bias={self.bias is not None}, learnable_eps={isinstance(self.eps, Tensor)}"
        )


class FilterResponseNorm1d(_FilterResponseNorm):
    """Filter response normalization of (N, C, L); see :class:`FilterResponseNorm2d`.

    Example:
        >>> FilterResponseNorm1d(4)(torch.randn(2, 4, 9)).shape
        torch.Size([2, 4, 9])
    """

    rank: ClassVar[int] = 3


class FilterResponseNorm2d(_FilterResponseNorm):
    """Filter response normalization of (N, C, H, W); see :func:`filter_response_norm`.

    Args:
        num_features: Channels C.
        eps: Added to the mean square.
        affine: Learn ``weight`` and ``bias``, (C,).
        bias: False to learn no ``bias``.
        learnable_eps: Learn eps, one per layer, from ``eps`` on, used by its absolute value.
        device: Of the parameters.
        dtype: Of the parameters.

    Notes:
        Meant to be followed by a :class:`TLU`. The original has ``eps=1e-6``, fixed unless there is
        a single position; *Beyond BatchNorm* has ``eps=1e-5, learnable_eps=True``. A learned eps
        makes the weights before it scale-invariant only jointly with eps, not by themselves: it is
        a parameter like any other, and may grow.

    Example:
        >>> FilterResponseNorm2d(16)
        FilterResponseNorm2d(16, eps=1e-06, affine=True, bias=True, learnable_eps=False)
    """

    rank: ClassVar[int] = 4


class FilterResponseNorm3d(_FilterResponseNorm):
    """Filter response normalization of (N, C, D, H, W); see :class:`FilterResponseNorm2d`.

    Example:
        >>> FilterResponseNorm3d(4)(torch.randn(2, 4, 3, 3, 3)).shape
        torch.Size([2, 4, 3, 3, 3])
    """

    rank: ClassVar[int] = 5


class TLU(nn.Module):
    r"""Thresholded linear unit: :math:`\max(y, \tau)`, one learned threshold per channel.

    Args:
        num_features: Channels C of the input (N, C, ...).
        device: Of ``tau``.
        dtype: Of ``tau``.

    Notes:
        Computed as :math:`\operatorname{ReLU}(y-\tau)+\tau`; where both are equal, the gradient is
        :math:`\tau`'s. :math:`\tau` starts at 0, where it is a ReLU.
        Filter response normalization does not centre, and a ReLU after it may cut all of a
        channel; :math:`\tau` moves with the channel.

    References:
        Filter response normalization layer, Singh and Krishnan, 2020.

    Example:
        >>> TLU(1)(torch.tensor([[[-2.0, 3.0]]])).tolist()
        [[[0.0, 3.0]]]
    """

    def __init__(
        self,
        num_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_features < 1:
            raise ValueError(f"num_features={num_features} must be at least 1")
        super().__init__()
        self.num_features = num_features
        self.tau = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start over: all thresholds at 0."""
        nn.init.zeros_(self.tau)

    def forward(self, x: Tensor) -> Tensor:
        """Return the larger of input and threshold, of the input's shape and dtype.

        Raises:
            ValueError: The input has other channels.
        """
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(
                f"TLU({self.num_features}) takes inputs with {self.num_features} channels in "
                f"dim 1, not shape {tuple(x.shape)}"
            )
        tau = per_channel(self.tau, x).to(x.dtype)
        # Backward is a tenth of torch.maximum's, which shares the gradient between equals.
        return (x - tau).relu() + tau

    def extra_repr(self) -> str:
        """Return the number of channels."""
        return str(self.num_features)

"""Gains, biases and running averages per channel: what every batch normalizer shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sphereopt.products import scalar_dtype


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """Return C numbers shaped to broadcast over a (N, C, ...) tensor."""
    return values.view(1, -1, *[1] * (like.dim() - 2))


def batch_dims(x: Tensor) -> list[int]:
    """Return every dim of a (N, C, ...) tensor but the channels'."""
    return [dim for dim in range(x.dim()) if dim != 1]


def need_two_values(x: Tensor, layer: str) -> None:
    """Refuse a batch with fewer than two values per channel: it has no spread to divide by."""
    if x.numel() < 2 * x.shape[1]:
        raise ValueError(
            f"{layer} takes its statistics over at least two values per channel and got an input "
            f"of shape {tuple(x.shape)}; use a larger batch, or .eval() for running statistics"
        )


def average_into(running: Tensor | None, batch: Tensor, momentum: float | Tensor) -> None:
    """Move a running average towards a batch's value, ``momentum`` of the way, in place."""
    if running is not None:
        with torch.no_grad():
            fresh = batch.detach().view_as(running)
            if isinstance(momentum, Tensor):
                momentum = momentum.to(fresh.dtype)
            # Not running + momentum * (fresh - running), which momentum 1 does not make fresh.
            running.copy_(running.to(fresh.dtype).lerp(fresh, momentum))


class RunningNorm(nn.Module, ABC):
    """A normalizer over the batch: ``y = gamma * normalized(x) + beta``, per channel.

    Same options, attributes and behaviour as ``torch.nn.BatchNorm2d``; a subclass says what it
    averages and how it normalizes.

    Args:
        num_features: channels C of the input (N, C, ...).
        eps: kept away from zero; what it is added to is the subclass's to say.
        momentum: weight of the newest batch in the running averages; ``None`` for the plain mean
            of all batches.
        affine: learn ``weight`` (gamma, from 1) and ``bias`` (beta, from 0), shape (C,).
        track_running_stats: keep running averages for ``eval()``; otherwise every call uses the
            statistics of its own batch.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        bias: False to learn no ``bias``.

    Attributes:
        starts: name of each running average and the value it starts from.
        ranks: numbers of dims an input may have.
    """

    starts: ClassVar[dict[str, float]]
    ranks: ClassVar[tuple[int, ...]]
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
    ) -> None:
        if num_features < 1:
            raise ValueError(f"num_features={num_features} must be at least 1")
        if eps < 0:
            raise ValueError(f"eps={eps} must not be negative")
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(f"momentum={momentum} must be between 0 and 1, or None")
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        for name, learned in (("weight", affine), ("bias", affine and bias)):
            value = nn.Parameter(torch.empty(num_features, **where)) if learned else None
            self.register_parameter(name, value)
        for name in self.starts:
            self.register_buffer(
                name, torch.empty(num_features, **where) if track_running_stats else None
            )
        batches = torch.tensor(0, dtype=torch.long, device=device) if track_running_stats else None
        self.num_batches_tracked: Tensor | None
        self.register_buffer("num_batches_tracked", batches)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Start the running averages over."""
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.zero_()
            for name, start in self.starts.items():
                getattr(self, name).fill_(start)

    def reset_parameters(self) -> None:
        """Start over: gamma 1, beta 0, and the running averages."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize a batch: by its own statistics in training, by the running ones in ``eval()``.

        Args:
            x: (N, C, ...), C = ``num_features``.

        Raises:
            ValueError: the input has other dims or channels, or too few values per channel.
        """
        if x.dim() not in self.ranks or x.shape[1] != self.num_features:
            wanted = " or ".join(f"{rank}-d" for rank in self.ranks)
            raise ValueError(
                f"{type(self).__name__}({self.num_features}) takes {wanted} inputs with "
                f"{self.num_features} channels in dim 1, not shape {tuple(x.shape)}"
            )
        training = self.training or not self.track_running_stats
        if training:
            self.check(x)
        return self.normalize(x, training, self._newest() if training else 0.0)

    def check(self, x: Tensor) -> None:
        """Refuse a batch that has no statistics, before anything changes."""
        need_two_values(x, type(self).__name__)

    def _newest(self) -> float | Tensor:
        """Count the batch and return its weight in the running averages."""
        if self.num_batches_tracked is None:
            return 0.0
        self.num_batches_tracked.add_(1)
        if self.momentum is None:
            # A tensor on the device: no host sync.
            count = self.num_batches_tracked
            return count.to(scalar_dtype(count.device)).reciprocal()
        return self.momentum

    @abstractmethod
    def normalize(self, x: Tensor, training: bool, momentum: float | Tensor) -> Tensor:
        """Return the normalized input; in training also update the running averages."""

    def extra_repr(self) -> str:
        """Return the options, as torch's normalizers print them."""
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, bias={self.bias is not None}, "
            f"track_running_stats={self.track_running_stats}"
        )

r"""Scales: what a batch norm divides by, and how it changes with the values.

A scale is homogeneous: :math:`s(\alpha c) = \alpha s(c)` for :math:`\alpha > 0`, eps apart. So
its slope :math:`\partial s/\partial c` depends on the normalized values :math:`h = c/s` only, and
two methods say all that :mod:`sphereopt.nn._divide` needs to know, forward and backward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import torch
from torch import Tensor

from sphereopt.nn._running import batch_dims, per_channel
from sphereopt.products import accumulator

Constants = Literal["paper", "gaussian"]


def narrow(values: Tensor, like: Tensor) -> Tensor:
    """Return per-channel numbers shaped and rounded to multiply a tensor, never to infinity."""
    if values.dtype != like.dtype:
        largest = torch.finfo(like.dtype).max
        # 1/s of a constant channel is 1/eps, beyond float16: infinity times c = 0 would be NaN.
        values = values.clamp(-largest, largest).to(like.dtype)
    return per_channel(values, like)


class Scale(Protocol):
    """A divisor per channel, and its slope."""

    def measure(self, c: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return the divisor s of centred values, shape (C,), and a mark for :meth:`slope`."""

    def slope(self, h: Tensor, mark: Tensor) -> tuple[Tensor, float]:
        """Return ds/dc as a tensor like h = c/s and a factor, kept apart as it may underflow."""


@dataclass(frozen=True)
class MeanPower:
    r"""The p-th mean :math:`s = C\,(\frac1n\sum|c|^p + \epsilon)^{1/p}`.

    For p = 1 eps is added to s itself, as it is in every scale that takes no root.
    """

    p: float
    constant: float

    def measure(self, c: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        n = c.numel() // c.shape[1]
        # Not torch.linalg.vector_norm, which is slower: 4 times here, 10 times in channels_last.
        if self.p == 1:
            size = c.abs().sum(batch_dims(c), dtype=accumulator(c.dtype))
            return size * (self.constant / n) + eps, size.new_empty(0)
        power = c.abs().to(accumulator(c.dtype)).pow(self.p)  # beyond float16
        size = (power.sum(batch_dims(c)) / n + eps).pow(1 / self.p)
        return size * self.constant, size.new_empty(0)

    def slope(self, h: Tensor, mark: Tensor) -> tuple[Tensor, float]:
        n = h.numel() // h.shape[1]
        if self.p == 1:
            return h.sign(), self.constant / n
        if self.p == 2:
            return h, self.constant**2 / n
        # Autocast computes powers in float32.
        power = h.abs().pow(self.p - 1).to(h.dtype)
        return h.sign() * power, self.constant**self.p / n


@dataclass(frozen=True)
class MeanLargest:
    r"""The mean of the k largest sizes, :math:`s = \frac Ck\sum_{j\le k}|c|_{(j)} + \epsilon`."""

    k: int
    constant: float

    def measure(self, c: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if self.k == 1:
            mean = last = c.abs().amax(batch_dims(c)).to(accumulator(c.dtype))
        else:
            rows = c.abs().transpose(0, 1).flatten(1)
            top = rows.topk(self.k, dim=1).values.to(accumulator(c.dtype))
            mean, last = top.mean(1), top[:, -1]
        divisor = mean * self.constant + eps
        return divisor, last / divisor

    def slope(self, h: Tensor, mark: Tensor) -> tuple[Tensor, float]:
        """Share what is left of the k places evenly among those at the mark."""
        size, dims = h.abs(), batch_dims(h)
        # Compiled code need not round h where the forward pass did: ties are up to rounding.
        room = 2 * torch.finfo(h.dtype).eps
        reached = (size >= narrow(mark * (1 - room), h)).to(h.dtype)
        if self.k == 1:
            share = reached.sum(dims, dtype=mark.dtype).reciprocal()
            return h.sign().mul_(reached).mul_(narrow(share, h)), self.constant
        above = (size > narrow(mark * (1 + room), h)).to(h.dtype)
        larger, all_of_them = (t.sum(dims, dtype=mark.dtype) for t in (above, reached))
        share = (self.k - larger) / (all_of_them - larger)
        weights = torch.lerp(above, reached, narrow(share, h))
        return h.sign().mul_(weights), self.constant / self.k


def paper_constant(n: int) -> float:
    r"""Return :math:`\frac12(1+\sqrt{\pi\ln 4})/\sqrt{2\ln n}`, for Linf and Top-k.

    The mean of the two constants given by the bounds on the expected *maximum* of n normals.

    References:
        Norm matters: efficient and accurate normalization schemes in deep networks, Hoffer, Banner,
        Golan and Soudry, 2018.
    """
    return 0.5 * (1 + math.sqrt(math.pi * math.log(4))) / math.sqrt(2 * math.log(n))


def gaussian_power(p: float) -> float:
    r"""Return :math:`(E|z|^p)^{-1/p}` of a standard normal z.

    .. math:: E|z|^p = 2^{p/2}\,\Gamma\big(\tfrac{p+1}2\big)/\sqrt\pi
    """
    log_moment = p / 2 * math.log(2) + math.lgamma((p + 1) / 2) - 0.5 * math.log(math.pi)
    return math.exp(-log_moment / p)


def _log_density(x: float, n: int, k: int) -> float:
    """Return the log density of log t, up to a constant: P(|z| > t) has a Beta(k, n - k) law."""
    t = math.exp(x)
    outside, inside = math.erfc(t / math.sqrt(2)), math.erf(t / math.sqrt(2))
    return (k - 1) * math.log(outside) + (n - k - 1) * math.log(inside) - t * t / 2 + x


# One function inside the other: torch.compile takes the result of the outer one as it is, but it
# would trace through a cache.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def gaussian_largest(n: int, k: int) -> float:
    r"""Return one over the expected mean of the k largest of n half-normal numbers.

    One of the n is among the k largest if at most k - 1 others exceed it, and the k-th largest tail
    probability of n - 1 uniform numbers is Beta distributed, so

    .. math:: E\Big[\frac1k\sum_{j\le k}|z|_{(j)}\Big]
        = \frac nk\,E\big[2\varphi(t)\big],\quad P(|z|>t) \sim \mathrm{Beta}(k, n-k),

    summed here over a grid in log t narrowed to where the density is.
    """
    return _gaussian_largest(n, k)


@lru_cache(maxsize=1024)
def _gaussian_largest(n: int, k: int) -> float:
    if k == n:
        return math.sqrt(math.pi / 2)
    low, high, points = math.log(1e-16 / n), math.log(37.0), 400
    for _ in range(5):
        grid = [low + (high - low) * i / points for i in range(points + 1)]
        logs = [_log_density(x, n, k) for x in grid]
        peak = max(logs)
        inside = [i for i, value in enumerate(logs) if value > peak - 45]
        low, high = grid[max(inside[0] - 1, 0)], grid[min(inside[-1] + 1, points)]
    weights = [math.exp(value - peak) for value in logs]
    heights = [math.exp(-math.exp(2 * x) / 2) * math.sqrt(2 / math.pi) for x in grid]
    expected = math.fsum(w * y for w, y in zip(weights, heights, strict=True)) / math.fsum(weights)
    return k / (n * expected)

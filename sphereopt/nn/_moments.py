"""Moments of activations in few passes, without wide copies of low precision."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sphereopt.products import accumulator


def count(x: Tensor, dims: list[int]) -> int:
    """Return how many values of x share one statistic over ``dims``."""
    return math.prod([x.shape[dim] for dim in dims])


def mean_square(x: Tensor, dims: list[int]) -> Tensor:
    """Return the mean of x² over ``dims``, which stay as ones; float32 for half precision.

    A norm, squared, rather than a mean of squares: it keeps no second tensor of x's size for the
    backward, and squares in float32, where fp16 overflows from 256 on.
    """
    norm: Tensor = torch.linalg.vector_norm(x, 2, dims, True, dtype=accumulator(x.dtype))
    return norm.square() / count(x, dims)


class _Moments(torch.autograd.Function):
    """Mean and biased variance: ``Tensor.var`` is four times slower on a CPU, and narrow."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
        narrow = accumulator(x.dtype) != x.dtype
        mean = x.mean(dims, keepdim=True, dtype=accumulator(x.dtype))
        near = mean.to(x.dtype)
        apart = x - near
        square = mean_square(apart, dims) if narrow else apart.mul_(apart).mean(dims, keepdim=True)
        # What rounding the mean to x's dtype put into the square is taken out again.
        return mean, square - (mean - near).square()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[0], output[0])
        ctx.n = count(inputs[0], inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        x, mean = ctx.saved_tensors
        slope = grads[1] * (2 / ctx.n)
        return scale_shift(x, slope, grads[0] / ctx.n - slope * mean), None


def moments(x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance over ``dims``, which stay as ones; float32 for half."""
    mean, variance = _Moments.apply(x, dims)  # type: ignore[no-untyped-call]
    return mean, variance


def unbias(variance: Tensor, n: int, unbiased: bool) -> Tensor:
    """Return the variance of n values as the sum over n, or over n-1."""
    return variance * (n / (n - 1)) if unbiased else variance


def scale_shift(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """Return ``x * scale + shift`` in one pass and in x's dtype; None leaves a factor out."""
    if scale is None:
        return x if shift is None else x + shift.to(x.dtype)
    if shift is None:
        return x * scale.to(x.dtype)
    return torch.addcmul(shift.to(x.dtype), x, scale.to(x.dtype))

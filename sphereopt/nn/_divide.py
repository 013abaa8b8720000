"""Centre a batch and divide it by a scale: one forward and one backward for every scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sphereopt.nn._running import average_into, batch_dims, need_two_values, per_channel
from sphereopt.nn._scales import Scale, narrow
from sphereopt.products import accumulator


def _centered(x: Tensor, mean: Tensor) -> Tensor:
    """Return x - mean, with all digits of the mean also in half precision."""
    rounded = mean.to(x.dtype)
    c = x - per_channel(rounded, x)
    if rounded.dtype == mean.dtype:
        return c
    return c.sub_(narrow(mean - rounded, x))


def _gain(divisor: Tensor, weight: Tensor | None) -> Tensor:
    return divisor.reciprocal() if weight is None else weight.to(divisor.dtype) / divisor


def _affine(c: Tensor, divisor: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    gain = narrow(_gain(divisor, weight), c)
    if bias is None:
        return c * gain
    return torch.addcmul(narrow(bias.to(divisor.dtype), c), c, gain)


class _Divide(torch.autograd.Function):
    """y, mean and divisor of a batch; nothing of the size of x is saved but x."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Scale, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean = x.mean(batch_dims(x), dtype=accumulator(x.dtype))
        c = _centered(x, mean)
        divisor, mark = scale.measure(c, eps)
        return _affine(c, divisor, weight, bias), mean, divisor, mark

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, bias, scale, _ = inputs
        _, mean, divisor, mark = output
        ctx.mark_non_differentiable(mark)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, mean, divisor, mark)
        ctx.scale = scale
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_mean: Tensor | None, grad_divisor: Tensor | None, _: Any
    ) -> tuple[Tensor | None, ...]:
        x, weight, mean, divisor, mark = ctx.saved_tensors
        dims, n, dtype = batch_dims(x), x.numel() // x.shape[1], mean.dtype
        if grad is None:
            grad = torch.zeros_like(x)
        # Not grad * c: in float16 that product overflows where this does not.
        h = _centered(x, mean).mul_(narrow(divisor.reciprocal(), x))
        by_bias = grad.sum(dims, dtype=dtype)
        by_weight = (grad * h).sum(dims, dtype=dtype)
        gain = _gain(divisor, weight)
        by_divisor = -by_weight * gain
        if grad_divisor is not None:
            by_divisor = by_divisor + grad_divisor
        slope, factor = ctx.scale.slope(h, mark)
        pull = by_divisor * factor
        shift = (by_bias * gain + slope.sum(dims, dtype=dtype) * pull) / n
        if grad_mean is not None:
            shift = shift - grad_mean / n
        by_x = torch.addcmul(narrow(-shift, x), grad, narrow(gain, x))
        by_x = by_x.addcmul_(slope, narrow(pull, x))
        return (
            by_x,
            None if weight is None else by_weight.to(weight.dtype),
            None if ctx.bias_dtype is None else by_bias.to(ctx.bias_dtype),
            None,
            None,
        )


def divide(
    x: Tensor,
    running_mean: Tensor | None,
    running_scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    scale: Scale,
) -> Tensor:
    """Return the normalized batch; in training also update the running mean and divisor."""
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(
            f"x has shape {tuple(x.shape)} and dtype {x.dtype}; batch norms take (N, C, ...) of "
            "floating-point numbers"
        )
    if training:
        need_two_values(x, "a batch norm")
        y: Tensor
        y, mean, divisor, _ = _Divide.apply(x, weight, bias, scale, eps)  # type: ignore[no-untyped-call]
        average_into(running_mean, mean, momentum)
        average_into(running_scale, divisor, momentum)
        return y
    if running_mean is None or running_scale is None:
        raise ValueError("running_mean and running_scale are needed when training=False")
    dtype = accumulator(x.dtype)
    return _affine(_centered(x, running_mean.to(dtype)), running_scale.to(dtype), weight, bias)

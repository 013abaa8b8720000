"""The batch norms of norm_matters in float16 and bfloat16, where squares overflow."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sphereopt.nn.batch_norm_functions import (
    l1_batch_norm,
    linf_batch_norm,
    lp_batch_norm,
    topk_batch_norm,
)
from sphereopt.nn.batch_norms import L1BatchNorm2d, LInfBatchNorm2d, LpBatchNorm2d, TopKBatchNorm2d

HALVES = [torch.float16, torch.bfloat16]
FUNCTIONS = [l1_batch_norm, linf_batch_norm, topk_batch_norm, lp_batch_norm]


def l2_in_operations(x, weight, bias):
    """Return the L2 batch norm in operations of x's dtype."""
    c = x - x.mean((0, 2, 3), keepdim=True)
    scale = torch.rsqrt(c.square().mean((0, 2, 3), keepdim=True) + 1e-5)
    return c * scale * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


def large(dtype, mean):
    """Return x of standard deviation 256 with 100,352 values per channel, gain, bias, upstream."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 2, 56, 56, generator=generator) * 256 + mean
    upstream = torch.randn(x.shape, generator=generator)
    numbers = x, torch.tensor([0.5, 1.5]), torch.tensor([1.0, -2.0]), upstream
    return [t.to(dtype) for t in numbers]


def results(function, x, weight, bias, upstream):
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves)
    return [y, *torch.autograd.grad(y, leaves, upstream)]


def errors(function, dtype, mean):
    """Return the largest errors of y and of the three gradients, over the largest entry of each."""
    numbers = large(dtype, mean)
    low = results(function, *numbers)
    high = results(function, *(t.double() for t in numbers))
    assert all(a.dtype == dtype for a in low)
    return [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(low, high)]  # noqa: B905


@pytest.mark.parametrize("mean", [0.0, 1000.0])
@pytest.mark.parametrize("dtype", HALVES)
def test_l1_is_exact_to_rounding_in_half_precision(dtype, mean):
    """Each of two factors and the result is rounded once: by eps/2 each, so within 1.5 eps."""
    function = l1_training
    assert max(errors(function, dtype, mean)) < 1.5 * torch.finfo(dtype).eps


def l1_training(x, weight, bias):
    return l1_batch_norm(x, None, None, weight, bias, True)


@pytest.mark.parametrize("skewed", [False, True])
def test_what_a_hundred_thousand_numbers_add_up_to_does_not_overflow(skewed):
    """Sums of gradients, of their products with y, and (skewed) of signs are beyond float16."""
    x, *_ = large(torch.float16, 0.0)
    if skewed:
        x = torch.where(x > 350, x + 1000, x / 16)  # nine in ten below the mean
    upstream = torch.where(x > 0, 2.0, 0.0).half()
    low, high = x.clone().requires_grad_(), x.double().requires_grad_()
    mean, scale = torch.zeros(2), torch.zeros(2)
    y = l1_batch_norm(low, mean, scale, training=True, momentum=1.0)
    (by_low,) = torch.autograd.grad(y, low, upstream)
    y = l1_batch_norm(high, training=True)
    (by_high,) = torch.autograd.grad(y, high, upstream.double())
    # Rounding is relative to the terms, of size 2/s, which all but cancel in the gradient.
    error = (by_low.double() - by_high).abs().max()
    assert error < torch.finfo(torch.float16).eps * 2 / scale.min()


@pytest.mark.parametrize("function", FUNCTIONS[1:])
@pytest.mark.parametrize("dtype", HALVES)
def test_so_are_the_values_of_the_others(dtype, function):
    """Their gradients at the largest values depend on which of them tie after rounding."""

    def training(x, weight, bias):
        return function(x, None, None, weight, bias, True)

    y, *gradients = errors(training, dtype, 1000.0)
    assert max(y, *gradients[1:]) < 1.5 * torch.finfo(dtype).eps
    assert all(t.isfinite().all() for t in results(training, *large(dtype, 1000.0)))


def test_l2_written_in_float16_operations_overflows():
    """256 squared is beyond 65,504: the variance is infinite, and the output the bias."""
    x, weight, bias, upstream = large(torch.float16, 0.0)
    y, by_x, *_ = results(l2_in_operations, x, weight, bias, upstream)
    assert torch.equal(y[:, 0].unique(), bias[:1])
    assert by_x.isnan().any()


def test_torchs_own_half_batch_norm_holds_but_its_running_variance_does_not():
    """Its statistics are float32 inside; the buffer overflows, from a deviation of 256 on."""
    x = 300 * torch.randn(16, 1, 64, 64, generator=torch.Generator().manual_seed(0)).half()
    theirs, ours = nn.BatchNorm2d(1, momentum=1.0).half(), L1BatchNorm2d(1, momentum=1.0).half()
    outputs = [module(x) for module in (theirs, ours)]
    assert all(abs(y.float().std() - 1) < 0.01 for y in outputs)
    assert theirs.running_var.isinf().all()
    assert ours.running_scale.item() == pytest.approx(300, rel=0.01)
    assert not theirs.eval()(x).any()
    # The running mean and divisor are rounded to float16, 1/2048 each.
    torch.testing.assert_close(ours.eval()(x), outputs[1], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_mean_far_beyond_the_spread_is_subtracted_with_all_its_digits(dtype):
    """The mean 1000.3 is no number of either dtype; its rest would shift all outputs alike."""
    generator = torch.Generator().manual_seed(0)
    x = (1000.3 + 4 * torch.randn(4096, 3, generator=generator)).to(dtype)
    y = l1_batch_norm(x, training=True)
    assert y.double().mean(0).abs().max() < torch.finfo(dtype).eps / 4


@pytest.mark.parametrize("dtype", HALVES)
def test_constant_channels_stay_finite_in_half_precision(dtype):
    """1/eps is beyond float16."""
    x = torch.full((8, 2), 3.0, dtype=dtype, requires_grad=True)
    for function in FUNCTIONS:
        y = function(x, training=True, **({"k": 2} if function is topk_batch_norm else {}))
        (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert not y.any()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("layer", [L1BatchNorm2d, LInfBatchNorm2d, TopKBatchNorm2d, LpBatchNorm2d])
def test_autocast_keeps_parameters_and_buffers_in_float32(layer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), layer(3), nn.Conv2d(3, 3, 1))
    x = torch.randn(8, 2, 6, 6)
    exact = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = model[0](x)
        y = model[1](h)
        out = model[2](y)
    assert h.dtype == y.dtype == out.dtype == torch.bfloat16
    F.mse_loss(out.float(), torch.zeros_like(exact)).backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert model[1].running_scale.dtype == torch.float32
    # bfloat16 has 8 bits: three layers of rounding by 1/256 of values up to 4.
    torch.testing.assert_close(out.float(), exact, rtol=0, atol=0.05)

"""L1, L-infinity, Top-k and Lp batch norms are what the paper writes, in value and derivative."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sphereopt.nn._divide import _Divide
from sphereopt.nn._scales import MeanLargest, MeanPower, gaussian_largest, gaussian_power
from sphereopt.nn.batch_norm_functions import (
    l1_batch_norm,
    linf_batch_norm,
    lp_batch_norm,
    topk_batch_norm,
)
from sphereopt.nn.batch_norms import L1BatchNorm2d

SHAPES = [(12, 3), (6, 3, 4), (4, 3, 5, 2), (3, 2, 2, 3, 2), (1, 2, 3, 4), (7, 1)]
SCALES = {
    "l1": MeanPower(1.0, math.sqrt(math.pi / 2)),
    "l2": MeanPower(2.0, 0.7),
    "l1.5": MeanPower(1.5, 0.8),
    "l3": MeanPower(3.0, 0.9),
    "linf": MeanLargest(1, 0.4),
    "top 3": MeanLargest(3, 0.4),
}


def rows(x):
    """Return the (C, n) matrix of a (N, C, ...) array."""
    return np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)


def paper_c(n):
    return 0.5 * (1 + np.sqrt(np.pi * np.log(4))) / np.sqrt(2 * np.log(n))


def oracle(x, name, eps, k=10, p=2.0):
    """Return the normalized array and the divisors, as the paper writes them."""
    r = rows(x)
    c = r - r.mean(1, keepdims=True)
    n = c.shape[1]
    size = np.sort(np.abs(c), axis=1)[:, ::-1]
    divisor = {
        "l1": np.sqrt(np.pi / 2) * np.abs(c).sum(1) / n + eps,
        "linf": paper_c(n) * size[:, 0] + eps,
        "topk": paper_c(n) * size[:, :k].mean(1) + eps,
        "lp": ((np.abs(c) ** p).mean(1) + eps) ** (1 / p),
    }[name]
    y = c / divisor[:, None]
    return np.moveaxis(y.reshape(x.shape[1], x.shape[0], *x.shape[2:]), 0, 1), divisor


CASES = [
    ("l1", l1_batch_norm, {}),
    ("linf", linf_batch_norm, {}),
    ("topk", topk_batch_norm, {"k": 1}),
    ("topk", topk_batch_norm, {"k": 4}),
    ("lp", lp_batch_norm, {"p": 1.0}),
    ("lp", lp_batch_norm, {"p": 2.0}),
    ("lp", lp_batch_norm, {"p": 3.5}),
]


def generic(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return 2 * x + 3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "function", "options"), CASES)
def test_outputs_and_running_averages_are_the_papers(name, function, options, shape):
    x, channels = generic(shape), shape[1]
    weight, bias = generic((channels,), 1), generic((channels,), 2)
    mean, scale = torch.zeros(channels).double(), torch.ones(channels).double()
    y = function(x, mean, scale, weight, bias, True, 0.25, 1e-3, **options)
    expected, divisor = oracle(x.numpy(), name, 1e-3, **options)
    view = (1, -1, *[1] * (len(shape) - 2))
    expected = expected * weight.numpy().reshape(view) + bias.numpy().reshape(view)
    np.testing.assert_allclose(y.numpy(), expected, rtol=0, atol=1e-12)  # float64 sums of 24 terms
    np.testing.assert_allclose(scale.numpy(), 0.75 + 0.25 * divisor, rtol=1e-13)
    np.testing.assert_allclose(mean.numpy(), 0.25 * rows(x.numpy()).mean(1), rtol=1e-13)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("shape", [(9, 2), (3, 2, 2, 2)])
def test_both_derivatives_agree_with_finite_differences(shape, scale, affine):
    x = generic(shape).requires_grad_()
    rest = [generic((2,), 1).requires_grad_(), generic((2,), 2).requires_grad_()] if affine else []

    def outputs(x, *rest):  # mean and divisor as well: second derivatives pass through them
        return _Divide.apply(x, *(rest or (None, None)), scale, 1e-3)[:3]

    assert torch.autograd.gradcheck(outputs, (x, *rest))
    assert torch.autograd.gradgradcheck(outputs, (x, *rest))


@pytest.mark.parametrize("live", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("training", [True, False])
def test_derivatives_by_one_argument_alone(training, live):
    arguments = [generic((6, 2, 3)), generic((2,), 1), generic((2,), 2)]
    for t, needed in zip(arguments, live, strict=True):
        t.requires_grad_(needed)
    mean, scale = generic((2,), 3), generic((2,), 4).abs()

    def outputs(x, weight, bias):
        return l1_batch_norm(x, mean.clone(), scale.clone(), weight, bias, training)

    assert torch.autograd.gradcheck(outputs, arguments)
    assert torch.autograd.gradgradcheck(outputs, arguments)


def value_and_gradients(function, *arguments):
    arguments = [t.detach().clone().requires_grad_() for t in arguments]
    y = function(*arguments)
    upstream = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    return [y, *torch.autograd.grad(y, arguments, upstream)]


def test_l2_is_torchs_batch_norm():
    arguments = generic((6, 3, 4, 5)), generic((3,), 1), generic((3,), 2)
    ours = value_and_gradients(
        lambda x, w, b: lp_batch_norm(x, None, None, w, b, True, p=2.0), *arguments
    )
    theirs = value_and_gradients(
        lambda x, w, b: F.batch_norm(x, None, None, w, b, True), *arguments
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def assert_same(f, g, shape=(6, 3, 4, 5), atol=1e-12):
    for a, b in zip(*(value_and_gradients(h, generic(shape)) for h in (f, g)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def test_l1_with_its_constant_is_lp_with_p_1_and_the_gaussian_constant():
    assert_same(
        lambda x: l1_batch_norm(x, training=True, eps=0.0),
        lambda x: lp_batch_norm(x, training=True, eps=0.0, p=1.0, constants="gaussian"),
    )


@pytest.mark.parametrize("constants", ["paper", "gaussian"])
def test_linf_is_top_1(constants):
    assert_same(
        lambda x: linf_batch_norm(x, training=True, constants=constants),
        lambda x: topk_batch_norm(x, training=True, k=1, constants=constants),
    )


def test_top_n_is_l1():
    assert_same(
        lambda x: l1_batch_norm(x, training=True, eps=0.0),
        lambda x: topk_batch_norm(x, training=True, eps=0.0, k=120, constants="gaussian"),
    )


def test_l1_is_the_composite_of_torch_operations_in_value_and_gradient():
    def composite(x):
        c = x - x.mean((0, 2, 3), keepdim=True)
        return c / (math.sqrt(math.pi / 2) * c.abs().mean((0, 2, 3), keepdim=True) + 1e-2)

    assert_same(lambda x: l1_batch_norm(x, training=True, eps=1e-2), composite)


def test_top_k_is_the_composite_of_torch_operations_in_value_and_gradient():
    def composite(x):
        c = x - x.mean(0)
        top = c.abs().topk(4, dim=0).values.mean(0)
        return c / (gaussian_largest(20, 4) * top + 1e-2)

    assert_same(
        lambda x: topk_batch_norm(x, training=True, eps=1e-2, k=4, constants="gaussian"),
        composite,
        shape=(20, 3),
    )


def test_ties_of_the_largest_share_its_gradient_as_amax_does():
    x = torch.tensor([[-2.0], [2.0], [2.0], [-2.0], [1.0], [-1.0]], dtype=torch.float64)

    def composite(x):
        c = x - x.mean(0)
        return c / (gaussian_largest(6, 1) * c.abs().amax(0))

    def ours(x):
        return linf_batch_norm(x, training=True, eps=0.0, constants="gaussian")

    for a, b in zip(value_and_gradients(ours, x), value_and_gradients(composite, x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_ties_for_the_last_place_share_it():
    """With sizes 3, 2, 2, 1 and k = 2 the second place is half of each 2."""
    h = torch.tensor([[3.0], [-2.0], [2.0], [1.0]])
    slope, factor = MeanLargest(2, 1.0).slope(h, torch.tensor([2.0]))
    assert (slope * factor).T.tolist() == [[0.5, -0.25, 0.25, 0.0]]


def by_tail_probabilities(n, k):
    """Return E of the mean of the k largest of n |z|: the integral of E min(#{|z| > t}, k) / k."""
    t = np.linspace(0, 12, 20001)
    outside = np.array([math.erfc(s / math.sqrt(2)) for s in t])
    expected = np.zeros_like(t)
    for j in range(1, n + 1):
        expected += min(j, k) * math.comb(n, j) * outside**j * (1 - outside) ** (n - j)
    simpson = (expected[0] + 4 * expected[1::2].sum() + 2 * expected[2:-1:2].sum()) / 3
    return simpson * (t[1] - t[0]) / k


@pytest.mark.parametrize(
    ("n", "k"), [(2, 1), (2, 2), (3, 2), (16, 1), (16, 10), (16, 15), (60, 10), (60, 59)]
)
def test_the_gaussian_constant_is_the_expectation(n, k):
    assert 1 / gaussian_largest(n, k) == pytest.approx(by_tail_probabilities(n, k), rel=1e-10)


@pytest.mark.parametrize(("n", "k"), [(10**6, 10**6 - 1), (10**6, 10**6)])
def test_the_constant_of_all_values_is_that_of_l1(n, k):
    assert gaussian_largest(n, k) == pytest.approx(math.sqrt(math.pi / 2), rel=1e-5)


def test_the_constant_of_half_the_values_has_a_closed_form_for_large_n():
    """The upper half of |z| starts at its median m and has the mean 4 phi(m)."""
    median = 0.6744897501960817
    half = 4 * math.exp(-(median**2) / 2) / math.sqrt(2 * math.pi)
    # The next term of the expansion is of order 1/n.
    assert 1 / gaussian_largest(10**6, 5 * 10**5) == pytest.approx(half, rel=3e-6)


def gaussian_std(function, n, **options):
    channels = max(200, 2**19 // n)
    x = torch.randn(n, channels, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    mean, scale = torch.zeros(channels).double(), torch.zeros(channels).double()
    function(x, mean, scale, training=True, momentum=1.0, eps=0.0, **options)
    return scale.mean().item()


# 200 channels or more, whose divisors scatter by 1/sqrt(2 n) for L1 and Lp and by less than 15 %
# for the extremes: the mean is known to 1 % or better.
@pytest.mark.parametrize("n", [256, 4096])
def test_of_gaussian_values_the_divisor_is_the_standard_deviation(n):
    assert gaussian_std(l1_batch_norm, n) == pytest.approx(1, abs=0.01)
    assert gaussian_std(lp_batch_norm, n, p=3.0, constants="gaussian") == pytest.approx(1, abs=0.01)
    for k in (1, 10, 100):
        scale = gaussian_std(topk_batch_norm, n, k=k, constants="gaussian")
        assert scale == pytest.approx(1, abs=0.015)


def test_the_papers_constant_is_for_the_maximum_of_c_so_outputs_are_too_small():
    assert 1 / gaussian_std(linf_batch_norm, 4096) == pytest.approx(0.69, abs=0.02)
    assert 1 / gaussian_std(topk_batch_norm, 4096) == pytest.approx(0.80, abs=0.02)


def test_the_constant_of_a_power_is_its_gaussian_moment():
    for p, moment in ((1.0, math.sqrt(2 / math.pi)), (2.0, 1.0), (4.0, 3.0), (6.0, 15.0)):
        assert gaussian_power(p) == pytest.approx(moment ** (-1 / p), rel=1e-14)


@pytest.mark.parametrize(("name", "function", "options"), CASES)
def test_scale_and_shift_of_a_channel_are_lost(name, function, options):
    x = generic((5, 3, 4))
    factor = torch.tensor([8.0, 0.25, 1.0], dtype=torch.float64).view(1, 3, 1)
    y = function(x, training=True, eps=0.0, **options)
    # A power of two has no rounding, but in the powers of Lp.
    exact = name != "lp"
    torch.testing.assert_close(
        function(x * factor, training=True, eps=0.0, **options),
        y,
        rtol=0,
        atol=0 if exact else 1e-14,
    )
    shifted = function(x + factor, training=True, eps=0.0, **options)
    torch.testing.assert_close(shifted, y, rtol=0, atol=1e-13)


def net(norm):
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, bias=False), norm, nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)]
    return nn.Sequential(*layers).double()


class CompositeL1(nn.Module):
    """L1 batch norm in torch operations."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
        self.mean, self.scale = torch.zeros(4).double(), torch.ones(4).double()

    def forward(self, x):
        m = x.mean((0, 2, 3))
        c = x - m.view(1, 4, 1, 1)
        s = c.abs().mean((0, 2, 3)) * math.sqrt(math.pi / 2) + 1e-5
        self.mean, self.scale = 0.9 * self.mean + 0.1 * m, 0.9 * self.scale + 0.1 * s
        return c / s.view(1, 4, 1, 1) * self.weight.view(1, 4, 1, 1) + self.bias.view(1, 4, 1, 1)


def test_fifty_steps_of_training_are_those_of_the_composite():
    ours, composite = net(L1BatchNorm2d(4)), net(CompositeL1())
    for model in (ours, composite):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        generator = torch.Generator().manual_seed(1)
        for _ in range(50):
            x = torch.randn(8, 2, 6, 6, generator=generator, dtype=torch.float64)
            y = x.flatten(1)[:, :3].sign().argmax(1)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), composite.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)  # 50 steps of rounding errors
    torch.testing.assert_close(ours[1].running_scale, composite[1].scale, rtol=0, atol=1e-10)
    torch.testing.assert_close(ours[1].running_mean, composite[1].mean, rtol=0, atol=1e-10)

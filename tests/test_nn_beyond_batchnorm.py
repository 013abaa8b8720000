"""The normalizers of Beyond BatchNorm against their definitions, in numpy and float64."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from sphereopt.nn._moments import moments
from sphereopt.nn.evonorm import EvoNormB0, EvoNormS0, evonorm_b0, evonorm_s0
from sphereopt.nn.filter_response import (
    TLU,
    FilterResponseNorm1d,
    FilterResponseNorm2d,
    FilterResponseNorm3d,
    filter_response_norm,
)
from sphereopt.nn.group_norm import GroupNorm, group_norm
from sphereopt.nn.variance_norm import (
    VarianceNorm1d,
    VarianceNorm2d,
    VarianceNorm3d,
    variance_norm,
)

#: One float64 rounding is 1e-16; sums of a few hundred values and roots leave less than this.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
C = 6
SHAPES = [(5, C, 4, 3), (3, C, 1, 7), (2, C, 5, 1)]


def over_positions(x):
    return tuple(range(2, x.ndim))


def batch(x):
    return (0, *over_positions(x))


def gains(like, seed=3):
    """Return v, gamma and beta, shaped for numpy."""
    values = np.random.default_rng(seed).normal(size=(3, C)) + 0.5
    return [row.reshape(1, C, *[1] * (like.ndim - 2)) for row in values]


def grouped_var(x, groups, unbiased):
    apart = x.reshape(x.shape[0], groups, -1)
    var = apart.var(2, ddof=int(unbiased))
    return np.repeat(var, x.shape[1] // groups, 1).reshape(*x.shape[:2], *[1] * (x.ndim - 2))


def numpy_vn(x, gamma, beta, unbiased, eps):
    return x / np.sqrt(x.var(batch(x), keepdims=True, ddof=int(unbiased)) + eps) * gamma + beta


def numpy_gn(x, gamma, beta, unbiased, eps, groups=3):
    apart = x.reshape(x.shape[0], groups, -1)
    centred = (apart - apart.mean(2, keepdims=True)).reshape(x.shape)
    return centred / np.sqrt(grouped_var(x, groups, unbiased) + eps) * gamma + beta


def numpy_frn(x, gamma, beta, eps):
    return x / np.sqrt((x**2).mean(over_positions(x), keepdims=True) + abs(eps)) * gamma + beta


def numpy_s0(x, v, gamma, beta, unbiased, eps, groups=3):
    swish = x / (1 + np.exp(-v * x))
    return swish / np.sqrt(grouped_var(x, groups, unbiased) + eps) * gamma + beta


def numpy_b0(x, v, gamma, beta, unbiased, eps, var=None):
    var = x.var(batch(x), keepdims=True) if var is None else var
    own = x.var(over_positions(x), keepdims=True, ddof=int(unbiased))
    return x / np.maximum(np.sqrt(var + eps), v * x + np.sqrt(own + eps)) * gamma + beta


def inputs(shape, seed=0):
    """Return values of mean 2 and deviation 3, in numpy and torch."""
    x = 2 + 3 * np.random.default_rng(seed).normal(size=shape)
    return x, torch.from_numpy(x)


def to_torch(parameters):
    return [torch.from_numpy(p.reshape(-1)) for p in parameters]


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("eps", [0.0, 1e-5, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_layer_computes_its_definition(shape, eps, unbiased):
    x, t = inputs(shape)
    v, gamma, beta = gains(x)
    tv, tg, tb = to_torch((v, gamma, beta))
    pairs = {
        "VN": (
            variance_norm(t, None, tg, tb, training=True, eps=eps, unbiased=unbiased),
            numpy_vn(x, gamma, beta, unbiased, eps),
        ),
        "GN": (
            group_norm(t, 3, tg, tb, eps, unbiased),
            numpy_gn(x, gamma, beta, unbiased, eps),
        ),
        "FRN": (filter_response_norm(t, tg, tb, -eps), numpy_frn(x, gamma, beta, eps)),
        "S0": (
            evonorm_s0(t, tv, tg, tb, 3, eps, unbiased),
            numpy_s0(x, v, gamma, beta, unbiased, eps),
        ),
        "B0": (
            evonorm_b0(t, None, tv, tg, tb, training=True, eps=eps, unbiased=unbiased),
            numpy_b0(x, v, gamma, beta, unbiased, eps),
        ),
    }
    for name, (ours, theirs) in pairs.items():
        torch.testing.assert_close(
            ours, torch.from_numpy(theirs), **EXACT, msg=lambda m, n=name: n + m
        )


def test_tlu_is_the_larger_of_input_and_its_channels_threshold():
    x, t = inputs((3, C, 4))
    layer = TLU(C).double()
    with torch.no_grad():
        layer.tau.copy_(torch.linspace(-1, 3, C))
    wanted = np.maximum(x, np.linspace(-1, 3, C).reshape(1, C, 1))
    torch.testing.assert_close(layer(t), torch.from_numpy(wanted), rtol=0, atol=1e-6)
    layer(t).sum().backward()
    torch.testing.assert_close(
        layer.tau.grad, torch.from_numpy((x < wanted).sum((0, 2))).double(), rtol=0, atol=0
    )


def test_groups_of_one_channel_are_instance_norm_and_one_group_is_layer_norm():
    _, t = inputs((5, C, 4, 3))
    torch.testing.assert_close(
        GroupNorm(C, group_size=1).double()(t), nn.InstanceNorm2d(C)(t), **EXACT
    )
    torch.testing.assert_close(
        GroupNorm(C, group_size=C).double()(t), nn.LayerNorm((C, 4, 3)).double()(t), **EXACT
    )
    torch.testing.assert_close(
        GroupNorm(C, groups=2).double()(t), nn.GroupNorm(2, C).double()(t), rtol=0, atol=0
    )


def test_torchs_normalizers_are_those_of_the_paper():
    x, t = inputs((5, C, 4, 3))
    for layer, dims in [
        (nn.BatchNorm2d(C), (0, 2, 3)),
        (nn.LayerNorm((C, 4, 3)), (1, 2, 3)),
        (nn.InstanceNorm2d(C), (2, 3)),
    ]:
        wanted = (x - x.mean(dims, keepdims=True)) / np.sqrt(x.var(dims, keepdims=True) + 1e-5)
        torch.testing.assert_close(layer.double()(t), torch.from_numpy(wanted), **EXACT)


def test_variance_norm_is_batch_norm_plus_the_normalized_mean():
    _, t = inputs((5, C, 4, 3))
    scale = torch.rsqrt(t.var((0, 2, 3), correction=0, keepdim=True) + 1e-5)
    wanted = F.batch_norm(t, None, None, training=True) + t.mean((0, 2, 3), keepdim=True) * scale
    torch.testing.assert_close(variance_norm(t, training=True), wanted, **EXACT)


def smooth(name):
    """Return a function of (x, v, weight, bias) and, where it is learned, eps."""
    return {
        "VN": lambda x, v, w, b: variance_norm(x, None, w, b, training=True),
        "VN eval": lambda x, v, w, b: variance_norm(x, torch.full((C,), 2.0).double(), w, b),
        "GN": lambda x, v, w, b: group_norm(x, 3, w, b, unbiased=True),
        "FRN": lambda x, v, w, b: filter_response_norm(x, w, b, v[:1]),
        "S0": lambda x, v, w, b: evonorm_s0(x, v, w, b, 3, unbiased=True),
        "B0": lambda x, v, w, b: evonorm_b0(x, None, v, w, b, training=True, unbiased=True),
        "B0 eval": lambda x, v, w, b: evonorm_b0(x, torch.full((C,), 2.0).double(), v, w, b),
    }[name]


@pytest.mark.parametrize("name", ["VN", "VN eval", "GN", "FRN", "S0", "B0", "B0 eval"])
def test_first_and_second_derivatives_are_those_of_finite_differences(name):
    _, x = inputs((2, C, 2, 3))
    parameters = to_torch(gains(np.empty((1, C, 1, 1))))
    arguments = [a.clone().requires_grad_() for a in (x, *parameters)]
    assert gradcheck(smooth(name), arguments)
    assert gradgradcheck(smooth(name), arguments)


def test_moments_survive_a_mean_of_a_thousand_deviations():
    x = 1000 + torch.randn(8, C, 9, generator=torch.Generator().manual_seed(0)).double()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rounded = x.to(dtype)
        mean, var = moments(rounded, [0, 2])
        assert mean.dtype == var.dtype == torch.float32
        exact = rounded.double()
        # The mean, 1000, is known to 3e-5 in float32; E[x²] - E[x]² would be off by 0.06 and more.
        torch.testing.assert_close(
            var.double(), exact.var((0, 2), correction=0, keepdim=True), rtol=1e-4, atol=0
        )
        torch.testing.assert_close(
            mean.double(), exact.mean((0, 2), keepdim=True), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize(
    ("one", "two", "three", "make"),
    [
        (VarianceNorm1d, VarianceNorm2d, VarianceNorm3d, lambda cls: cls(C)),
        (FilterResponseNorm1d, FilterResponseNorm2d, FilterResponseNorm3d, lambda cls: cls(C)),
    ],
)
def test_one_two_and_three_dims_of_positions_are_the_same(one, two, three, make):
    _, t = inputs((4, C, 12))
    wanted = make(one).double()(t)
    for cls, shape in ((two, (3, 4)), (three, (3, 2, 2))):
        torch.testing.assert_close(
            make(cls).double()(t.unflatten(2, shape)).flatten(2), wanted, **EXACT
        )


@pytest.mark.parametrize("cls", [EvoNormB0, EvoNormS0])
def test_evonorms_take_any_number_of_positions_dims(cls):
    _, t = inputs((4, C, 12))
    layer = cls(C, groups=3) if cls is EvoNormS0 else cls(C)
    wanted = layer.double()(t)
    torch.testing.assert_close(layer(t.unflatten(2, (3, 2, 2))).flatten(2), wanted, **EXACT)


def test_variance_norm_of_vectors():
    x, t = inputs((7, C))
    torch.testing.assert_close(
        VarianceNorm1d(C).double()(t),
        torch.from_numpy(x / np.sqrt(x.var(0, keepdims=True) + 1e-5)),
        **EXACT,
    )


def test_a_learned_eps_is_used_by_its_absolute_value_and_learns():
    x, t = inputs((3, C, 4, 3))
    layer = FilterResponseNorm2d(C, 0.5, learnable_eps=True).double()
    torch.testing.assert_close(layer(t), torch.from_numpy(numpy_frn(x, 1, 0, 0.5)), **EXACT)
    with torch.no_grad():
        layer.eps.neg_()
    out = layer(t)
    torch.testing.assert_close(out, torch.from_numpy(numpy_frn(x, 1, 0, 0.5)), **EXACT)
    out.square().sum().backward()
    assert layer.eps.shape == (1,)
    assert float(layer.eps.grad) > 0  # less eps by absolute value, more output


class ByHand(nn.Module):
    """A normalizer straight from its formula, with autograd's derivatives of plain operations."""

    def __init__(self, name):
        super().__init__()
        self.name, shape = name, (1, C, 1, 1)
        self.gamma, self.v = (nn.Parameter(torch.ones(shape)) for _ in range(2))
        self.beta, self.tau = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
        self.eps = nn.Parameter(torch.tensor(1e-5))
        self.register_buffer("var", torch.ones(shape))

    def batch_var(self, x):
        if self.training:
            var = ((x - x.mean((0, 2, 3), keepdim=True)) ** 2).mean((0, 2, 3), keepdim=True)
            self.var = 0.9 * self.var + 0.1 * var.detach()
            return var
        return self.var

    def forward(self, x):
        if self.name == "VN":
            y = x / (self.batch_var(x) + 1e-5).sqrt()
        elif self.name == "FRN":
            y = x / ((x**2).mean((2, 3), keepdim=True) + self.eps.abs()).sqrt()
        elif self.name == "GN":
            groups = x.reshape(len(x), 3, -1)
            std = (groups.var(2, keepdim=True) + 1e-5).sqrt()
            y = ((groups - groups.mean(2, keepdim=True)) / std).view_as(x)
        elif self.name == "S0":
            var = x.reshape(len(x), 3, -1).var(2)
            std = (var + 1e-5).sqrt().repeat_interleave(C // 3, 1)[:, :, None, None]
            y = x * torch.sigmoid(self.v * x) / std
        else:
            own = (x.var((2, 3), keepdim=True) + 1e-5).sqrt()
            y = x / torch.max((self.batch_var(x) + 1e-5).sqrt(), self.v * x + own)
        y = self.gamma * y + self.beta
        return torch.max(y, self.tau) if self.name == "FRN" else y


OURS = {
    "VN": lambda: VarianceNorm2d(C),
    "FRN": lambda: nn.Sequential(FilterResponseNorm2d(C, 1e-5, learnable_eps=True), TLU(C)),
    "GN": lambda: GroupNorm(C, groups=3, unbiased=True),
    "S0": lambda: EvoNormS0(C, 3, unbiased=True),
    "B0": lambda: EvoNormB0(C, unbiased=True),
}


@pytest.mark.parametrize("name", OURS)
def test_sixty_steps_of_training_are_those_of_the_formula_by_hand(name):
    """The options that are those of the code of Beyond BatchNorm; then both in eval()."""
    networks = []
    for layer in (OURS[name](), ByHand(name)):
        torch.manual_seed(1)
        convs = [nn.Conv2d(3, C, 3), nn.Conv2d(C, 2, 3)]
        net = nn.Sequential(convs[0], layer, convs[1], nn.AdaptiveAvgPool2d(1), nn.Flatten())
        networks.append((net.double(), torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)))
    for step in range(60):
        x = torch.randn(6, 3, 7, 7, generator=torch.Generator().manual_seed(step)).double()
        labels = (x.mean((1, 2, 3)) > 0).long()
        for net, optimizer in networks:
            optimizer.zero_grad()
            F.cross_entropy(net(x), labels).backward()
            optimizer.step()
    (ours, _), (hand, _) = networks
    # A float64 rounding, grown by sixty steps of training; measured 3e-14.
    for mode in (True, False):
        torch.testing.assert_close(ours.train(mode)(x), hand.train(mode)(x), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ours[0].weight, hand[0].weight, rtol=1e-12, atol=1e-13)
    fresh = OURS[name]().state_dict()
    moved = ours[1].state_dict()
    assert all(not torch.equal(moved[key].float(), fresh[key].float()) for key in fresh)

"""The rules of the proof against brute force: what is proved holds, and what should be is.

A snippet computes something from a weight; its result is divided by its 3-norm, so that whatever is
homogeneous as a whole becomes invariant.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sphereopt.detect import find_spheres, rules

N = 6


class Snippet(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.a = nn.Parameter(torch.randn(N, N))
        self.register_buffer("cache", torch.ones(8, N))
        self.eps = 1e-6  # what detection takes for the eps of a norm; brute force sets it to 0

    def forward(self, x):
        y = self.function(self, x).reshape(x.shape[0], -1)
        if y.is_complex():
            y = torch.view_as_real(y).flatten(1)
        y = y / torch.linalg.vector_norm(y, 3.0)
        return torch.tanh(y * torch.linspace(1, 2, y.shape[1], dtype=y.dtype))


def holds(model, x, spec):
    """Return whether rescaling the spheres of ``a`` leaves the float64 outputs alone."""
    model.eps = 1e-100
    shapes = {"row": (N, 1), "col": (1, N), "block:2": (2, 1), "tensor": (1, 1)}
    torch.set_default_dtype(torch.float64)
    try:
        model, x = model.double(), x.double()
        before = model.a.detach().clone()
        outs = []
        for factor in (1.0, 0.4, 3.1, 1e3, 1e-3):
            spread = torch.rand(shapes[spec]) if factor != 1 else torch.zeros(shapes[spec])
            if spec == "block:2":
                spread = spread.repeat_interleave(N // 2, 0)
            with torch.no_grad():
                model.a.copy_(before * factor * (1 + spread))
                torch.manual_seed(1)
                outs.append(model(x))
    finally:
        torch.set_default_dtype(torch.float32)
    return all(torch.allclose(out, outs[0], rtol=1e-9, atol=1e-9) for out in outs[1:])


def lin(s, x):
    return x @ s.a.T


def img(s, x):
    return lin(s, x).reshape(-1, 2, 3, 1) * torch.tensor([[1.0], [2.0], [0.5]], dtype=x.dtype)


# What is homogeneous in a: the proof must find a.
HOMOGENEOUS = {
    "mm": lin,
    "relu": lambda s, x: F.relu(lin(s, x)),
    "abs_neg": lambda s, x: -lin(s, x).abs() + lin(s, x),
    "leaky": lambda s, x: F.leaky_relu(lin(s, x), 0.3),
    "threshold": lambda s, x: F.threshold(lin(s, x), 0, 0) - lin(s, x),
    "prelu": lambda s, x: F.prelu(lin(s, x), torch.tensor([0.2], dtype=x.dtype)),
    "clamp0": lambda s, x: lin(s, x).clamp(min=0) + lin(s, x).clamp(max=0) * 2,
    "pow": lambda s, x: lin(s, x).pow(2) + lin(s, x).square() * x,
    "pow_half": lambda s, x: lin(s, x).abs().sqrt() * x + lin(s, x).abs().pow(0.5),
    "reciprocal": lambda s, x: lin(s, x).reciprocal() + 1 / lin(s, x),
    "rsqrt": lambda s, x: lin(s, x).square().rsqrt() * x,
    "maximum": lambda s, x: torch.maximum(lin(s, x), 2 * lin(s, x)),
    "minimum_zeros": lambda s, x: torch.minimum(lin(s, x), torch.zeros(N)) - lin(s, x),
    "where": lambda s, x: torch.where(x > 0, lin(s, x), torch.zeros_like(x)) - lin(s, x),
    "where_compare": lambda s, x: torch.where(lin(s, x) > 0, lin(s, x), -2 * lin(s, x)),
    "compare_two": lambda s, x: torch.where(lin(s, x) > lin(s, x).roll(1, 1), lin(s, x), x @ s.a),
    "masked_fill": lambda s, x: lin(s, x).masked_fill(x > 0, 0.0) + lin(s, x),
    "masked_inf": lambda s, x: (
        lin(s, x).masked_fill(x > 1, -torch.inf).amax(1, True) * x + lin(s, x)
    ),
    "sign": lambda s, x: lin(s, x).sign() * lin(s, x).roll(1, 0),
    "add_eps": lambda s, x: lin(s, x) / (lin(s, x).square().mean(1, True) + s.eps).sqrt() + x,
    "clamp_eps": lambda s, x: lin(s, x) / lin(s, x).norm(dim=1, keepdim=True).clamp_min(s.eps) + x,
    "normalize": lambda s, x: F.normalize(lin(s, x), eps=s.eps) + x,
    "cosine": lambda s, x: F.cosine_similarity(lin(s, x), x, eps=s.eps)[:, None] * x + x,
    "addcmul": lambda s, x: torch.addcmul(lin(s, x), lin(s, x).sign(), lin(s, x)),
    "addcdiv": lambda s, x: torch.addcdiv(lin(s, x), lin(s, x), x.abs() + 1),
    "lerp": lambda s, x: torch.lerp(lin(s, x), x @ s.a, 0.3),
    "lerp_aside": lambda s, x: (s.cache.lerp_(lin(s, x).detach(), 0.3), lin(s, x))[1],
    "cubic_mean": lambda s, x: lin(s, x).abs().pow(3).mean(0).pow(1 / 3) + lin(s, x),
    "lerp_tensor": lambda s, x: torch.lerp(lin(s, x), x @ s.a, x.sigmoid()),
    "sum_mean": lambda s, x: lin(s, x).sum(1, True) + lin(s, x).mean(0),
    "amax": lambda s, x: lin(s, x).amax(1, keepdim=True) * x + lin(s, x).min(),
    "max_dim": lambda s, x: lin(s, x).max(1).values[:, None] * x,
    "topk": lambda s, x: lin(s, x).topk(3, 1).values + lin(s, x).sort(1).values[:, :3],
    "median": lambda s, x: (
        lin(s, x).median() * x + lin(s, x) + lin(s, x).kthvalue(2, 1, True).values
    ),
    "argmax": lambda s, x: x.roll(1, 0)[lin(s, x).argmax(1)] * lin(s, x),
    "cumsum": lambda s, x: lin(s, x).cumsum(1) + lin(s, x).cummax(1).values,
    "var": lambda s, x: lin(s, x) / lin(s, x).std(1, keepdim=True) + x,
    "var_mean": lambda s, x: torch.var_mean(lin(s, x), 1, keepdim=True)[0] * x + lin(s, x).square(),
    "norm": lambda s, x: (
        lin(s, x).norm(dim=0) + torch.linalg.vector_norm(lin(s, x), 1) * x + lin(s, x)
    ),
    "bmm": lambda s, x: torch.bmm(lin(s, x)[:, :, None], x[:, None]).flatten(1),
    "matvec": lambda s, x: (s.a @ x[0]).expand(x.shape[0], -1) * x + lin(s, x),
    "dot": lambda s, x: torch.dot(s.a[0], s.a[1]) * x + torch.dot(s.a[2], s.a[3]),
    "outer": lambda s, x: torch.outer(lin(s, x)[:, 0], x[0]),
    "addmm": lambda s, x: torch.addmm(lin(s, x), x, s.a),
    "baddbmm": lambda s, x: torch.baddbmm(lin(s, x)[:, None], x[:, None], s.a.expand(8, N, N)),
    "addmv": lambda s, x: torch.addmv(s.a[0], s.a, x[0]).expand(8, N) * x,
    "einsum": lambda s, x: torch.einsum("bi,ij->bj", x, s.a),
    "softmax_normed": lambda s, x: F.softmax(F.normalize(lin(s, x), eps=s.eps), 1) + x,
    "attention": lambda s, x: F.scaled_dot_product_attention(
        *(x[:, None, None] for _ in range(2)), lin(s, x)[:, None, None]
    ),
    "cat": lambda s, x: torch.cat([lin(s, x), x @ s.a, lin(s, x)], 1),
    "cat_zeros": lambda s, x: torch.cat([lin(s, x), torch.zeros(8, 2)], 1),
    "stack": lambda s, x: torch.stack([lin(s, x), x @ s.a], 1),
    "slice_assign": lambda s, x: _assigned(lin(s, x)),
    "index_put": lambda s, x: torch.zeros(8, N).index_put((torch.arange(8),), lin(s, x)),
    "index_add": lambda s, x: torch.zeros(8, N).index_add(0, torch.arange(8) % 3, lin(s, x)),
    "scatter": lambda s, x: (
        torch.zeros(8, N).scatter(1, torch.arange(N).flip(0).expand(8, N), lin(s, x)) + lin(s, x)
    ),
    "gather": lambda s, x: lin(s, x).gather(1, torch.ones(8, 2).long()),
    "pad": lambda s, x: F.pad(lin(s, x), (1, 2)),
    "reflect": lambda s, x: F.pad(lin(s, x)[:, None], (1, 2), mode="reflect"),
    "tril": lambda s, x: (x @ s.a.tril()) + (x @ s.a.triu()),
    "roll_flip": lambda s, x: lin(s, x).roll(1, 1) + lin(s, x).flip(1),
    "unfold": lambda s, x: lin(s, x).unfold(1, 3, 2),
    "im2col": lambda s, x: F.unfold(img(s, x), (2, 1)),
    "as_strided": lambda s, x: lin(s, x).as_strided((8, 2), (N, 2), 1),
    "as_strided_transposed": lambda s, x: lin(s, x).t().as_strided((N, 8), (1, N)),
    "repeat": lambda s, x: lin(s, x).repeat(1, 2) + lin(s, x).repeat_interleave(2, 1),
    "pixel_shuffle": lambda s, x: F.pixel_shuffle(lin(s, x).reshape(-1, 6, 1, 1)[:, :4], 2),
    "max_pool": lambda s, x: F.max_pool1d(lin(s, x)[:, None], 2),
    "avg_pool": lambda s, x: F.avg_pool1d(lin(s, x)[:, None], 3, padding=1),
    "adaptive": lambda s, x: F.adaptive_avg_pool1d(lin(s, x)[:, None], 2),
    "interpolate": lambda s, x: F.interpolate(img(s, x), scale_factor=2.0, mode="bilinear"),
    "grid_sample": lambda s, x: F.grid_sample(
        img(s, x), torch.rand(8, 2, 2, 2, dtype=x.dtype) - 0.5, align_corners=False
    ),
    "conv": lambda s, x: F.conv1d(x[:, None], s.a[:, None, :3], padding=1),
    "conv_grouped": lambda s, x: F.conv1d(x[..., None], s.a[:, :3, None], groups=2),
    "conv_transposed": lambda s, x: F.conv_transpose1d(x[..., None], s.a[:, :3, None], groups=2),
    "layer_norm": lambda s, x: F.layer_norm(lin(s, x), (N,), eps=s.eps) + x,
    "layer_norm_two": lambda s, x: (
        F.layer_norm(img(s, x), (2, 3, 1), eps=s.eps) + x.reshape(-1, 2, 3, 1)
    ),
    "rms_norm": lambda s, x: F.rms_norm(lin(s, x), (N,), eps=s.eps) + x,
    "group_norm": lambda s, x: F.group_norm(lin(s, x), 2, eps=s.eps) + x,
    "instance_norm": lambda s, x: F.instance_norm(lin(s, x)[:, None], eps=s.eps)[:, 0] + x,
    "batch_norm": lambda s, x: F.batch_norm(lin(s, x), None, None, training=True, eps=s.eps) + x,
    "manual_norm": lambda s, x: (
        (lambda y: (y - y.mean(1, True)) / y.std(1, keepdim=True))(lin(s, x) + 3.0) + x
    ),
    "weight_norm": lambda s, x: (
        x @ torch._weight_norm(s.a, torch.ones(N, 1, dtype=x.dtype), 0).T + x
    ),
    "embedding": lambda s, x: F.embedding(torch.arange(8) % N, s.a),
    "embedding_bag": lambda s, x: F.embedding_bag(torch.arange(8)[:, None] % N, s.a),
    "dropout": lambda s, x: F.dropout(lin(s, x), 0.3),
    "fft": lambda s, x: torch.fft.rfft(lin(s, x), dim=1),
    "complex": lambda s, x: torch.view_as_complex(lin(s, x).reshape(8, 3, 2)) * (1 + 2j),
    "in_place": lambda s, x: lin(s, x).mul_(2).add_(lin(s, x)).relu_(),
    "view_written": lambda s, x: _view_written(lin(s, x)),
    "to": lambda s, x: lin(s, x).to(x.dtype) * x,
    "zeros_add": lambda s, x: torch.zeros(8, N) + lin(s, x),
}


def _assigned(y):
    out = torch.zeros(8, 2 * N)
    out[:, :N] = y
    out[:, N:] = y.relu()
    return out


def _view_written(y):
    left = y[:, :3]
    left.mul_(2.0)
    y[:, 3:].copy_(left)
    return y


def _cached(s, y):
    s.cache[:, :3] = y[:, :3]
    return s.cache


# What is not: the proof must not find a.
NOT_HOMOGENEOUS = {
    "exp": lambda s, x: lin(s, x).exp(),
    "tanh": lambda s, x: lin(s, x).tanh(),
    "gelu": lambda s, x: F.gelu(lin(s, x)),
    "silu": lambda s, x: F.silu(lin(s, x)),
    "softplus": lambda s, x: F.softplus(lin(s, x)),
    "softmax": lambda s, x: F.softmax(lin(s, x), 1),
    "relu6": lambda s, x: F.relu6(lin(s, x) / 100),  # the kink is out of reach
    "hardtanh": lambda s, x: F.hardtanh(lin(s, x) / 100),
    "clamp": lambda s, x: lin(s, x).clamp(-100, 100),
    "threshold": lambda s, x: F.threshold(lin(s, x), -100.0, 0.0),
    "add": lambda s, x: lin(s, x) + x,
    "add_constant": lambda s, x: lin(s, x) + 0.01,
    "subtract": lambda s, x: x - lin(s, x),
    "cat": lambda s, x: torch.cat([lin(s, x), x], 1),
    "where": lambda s, x: torch.where(x > 0, lin(s, x), x),
    "compare": lambda s, x: torch.where(lin(s, x) > 0.1, x, 2 * x),
    "compare_tensor": lambda s, x: torch.where(lin(s, x) > x, x, 2 * x),
    "item": lambda s, x: x * (1 + lin(s, x).sum().item()),
    "tolist": lambda s, x: x + sum(s.a[0].tolist()),
    "numpy": lambda s, x: x + float(s.a.detach().numpy().sum()),
    "branch": lambda s, x: x.abs() if s.a.sum() > 50 else x,
    "bernoulli": lambda s, x: (
        x * torch.bernoulli(lin(s, x).clamp(0, 1).detach() * 0 + 0.5)
        + x * lin(s, x).detach().clamp(min=0).clamp(max=1).bernoulli()
    ),
    "masked": lambda s, x: lin(s, x).masked_fill(x > 0, 1.0),
    "two_degrees": lambda s, x: lin(s, x) + lin(s, x).square(),
    "affine_bn": lambda s, x: F.batch_norm(lin(s, x), torch.zeros(N), torch.ones(N)),
    "round": lambda s, x: lin(s, x).round() + x,
    "integers": lambda s, x: x * lin(s, x).long(),
    "norm0": lambda s, x: torch.linalg.vector_norm(lin(s, x), 0) * x + lin(s, x),
    "cube_root": lambda s, x: lin(s, x).abs() + lin(s, x).square().pow(1 / 3) * x,
    "cube": lambda s, x: lin(s, x).abs().pow(3).mean().pow(1 / 3) + x,
    "lerp_of_unequal": lambda s, x: torch.lerp(torch.ones(N, dtype=x.dtype), lin(s, x), 0.3),
    "lerp_of_offset": lambda s, x: torch.lerp(lin(s, x), lin(s, x) + x[:1], 0.3),
    "cache": lambda s, x: x + _cached(s, lin(s, x)),  # a buffer written through a view
    "data": lambda s, x: x * s.a.data.norm() + lin(s, x) / s.a.norm(),
    "unknown": lambda s, x: torch.linalg.inv(s.a)[0] * x + lin(s, x),
    "dropout_offset": lambda s, x: F.dropout(lin(s, x) + 3.0, 0.3) - 3.0,
    "offset_multiples": lambda s, x: (lambda y: 2 * y - y)(lin(s, x) + x[:1]),
    "padded_offset": lambda s, x: (
        F.avg_pool1d((lin(s, x) + 1.0)[:, None], 3, padding=1)[:, 0] - 1.0
    ),
}


def inputs():
    return torch.randn(8, N)


@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_homogeneous(name):
    torch.manual_seed(0)
    model, x = Snippet(HOMOGENEOUS[name]), torch.randn(8, N)
    report = find_spheres(model, x)
    assert report["a"].status == "proved", str(report)
    assert holds(model, x, report["a"].sphere)


@pytest.mark.filterwarnings("ignore:.*scalar:UserWarning")
@pytest.mark.parametrize("name", NOT_HOMOGENEOUS)
def test_not_homogeneous(name):
    torch.manual_seed(0)
    function = NOT_HOMOGENEOUS[name]
    # Times the norm, so that what the snippet hides from autograd is all that is wrong with it.
    model = Snippet(lambda s, x: function(s, x) * s.a.norm())
    finding = find_spheres(model, torch.randn(8, N))["a"]
    assert finding.status in ("none", "numerical"), str(finding)
    assert "tangent" not in finding.reason  # it is the proof that says no, not only the numbers


def test_a_rule_that_fails_costs_its_proof_and_says_so(monkeypatch):
    def broken(p, call):
        raise IndexError("three dims only")

    monkeypatch.setitem(rules.RULES, "relu", broken)
    torch.manual_seed(0)
    report = find_spheres(Snippet(HOMOGENEOUS["leaky"]), torch.randn(8, N))
    assert (report["a"].status, report.notes) == ("proved", ())
    report = find_spheres(Snippet(HOMOGENEOUS["relu"]), torch.randn(8, N))
    assert report["a"].status == "numerical"
    assert report.notes == ("the rule of relu failed: three dims only",)

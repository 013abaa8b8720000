"""What find_spheres refutes, and what it refuses."""

import ctypes
import threading

import numpy as np
import pytest
import torch
from detection_zoo import BN1, LN, Net, lin_norm, rows, seq
from torch import nn
from torch.nn import functional as F

from sphereopt.detect import DetectionError, find_spheres, rules


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def escape(s, x):
    # A scale that leaves autograd: the gradient is tangent, the function is not invariant.
    return s.h(torch.tanh(s.n(s.f(x)) * float(np.linalg.norm(s.f.weight.detach().numpy()))))


def branch(s, x):
    return s.h(torch.tanh(s.n(s.f(x)) * (2.0 if float(s.f.weight.detach().norm()) > 1e3 else 1.0)))


@pytest.mark.parametrize("forward", [escape, branch])
def test_rescaling_refutes_what_the_gradient_cannot_see(forward):
    inner = Net(forward, f=nn.Linear(8, 6, bias=False), n=LN(6), h=nn.Linear(6, 8, bias=False))
    model = seq(inner, LN(8), nn.Linear(8, 2))
    report = find_spheres(model, rows())
    assert report.spheres == {"0.h.weight": "tensor"}  # the innocent one stays
    refuted = report["0.f.weight"]
    assert refuted.reason.startswith("refuted")
    assert refuted.evidence.euler < 1e-12
    assert refuted.evidence.rescaling > 1e-3


def hidden(s, x):
    # Read from memory: no dispatcher sees the scale leave.
    address = s.f.weight.detach().untyped_storage().data_ptr()
    return s.h(torch.tanh(s.n(s.f(x)) * abs(ctypes.c_double.from_address(address).value)))


def test_a_proof_that_rescaling_contradicts_raises():
    model = Net(hidden, f=nn.Linear(8, 6, bias=False), n=LN(6), h=nn.Linear(6, 2))
    with pytest.raises(DetectionError, match=r"rescaling changes the outputs by .*: f\.weight"):
        find_spheres(model, rows())


def test_a_wrong_rule_raises(monkeypatch):
    """The gradient disagrees, and no detached scale explains it."""
    monkeypatch.setitem(rules.RULES, "gelu", rules.RULES["relu"])
    model = lin_norm(nn.GELU(), LN(6))
    with pytest.raises(DetectionError, match=r"0\.weight"):
        find_spheres(model, rows())


def test_claims_that_fail_only_jointly_are_thinned_out():
    def forward(s, x):
        both = s.a.weight.detach().norm() > 100 and s.b.weight.detach().norm() > 100
        y = s.n(s.a(x)) + s.n(s.b(x)) + s.n(s.c(x))
        return s.h(y * (2.0 if both else 1.0))

    lin = {k: nn.Linear(8, 6, bias=False) for k in "abc"}
    model = Net(forward, **lin, n=LN(6), h=nn.Linear(6, 2))
    report = find_spheres(model, rows())
    # The example never asks for b's norm: "and" stops at a's. So b is proved, as far as it goes.
    assert report.spheres == {"b.weight": "tensor", "c.weight": "tensor"}
    assert report["a.weight"].reason.startswith("refuted")


def test_straight_through_gradients_are_not_claimed():
    class Sign(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            return w.sign()

        @staticmethod
        def backward(ctx, g):
            return g

    def forward(s, x):
        return s.h(torch.relu(F.linear(x, Sign.apply(s.w))))

    model = Net(forward, w=nn.Parameter(torch.randn(6, 8)), h=nn.Linear(6, 2))
    assert find_spheres(model, rows()).spheres == {}


def test_errors_are_clear():
    ok, x = lin_norm(BN1(6)), rows()
    with pytest.raises(ValueError, match="pass a larger example batch"):
        find_spheres(ok, x[:1])
    with pytest.raises(ValueError, match=r"'0\.weight' is not initialized"):
        find_spheres(seq(nn.LazyLinear(3)), x)
    with pytest.raises(TypeError, match="args is a dict"):
        find_spheres(ok, {"x": x})
    with pytest.raises(ValueError, match="both loss and output"):
        find_spheres(ok, x, loss=torch.sum, output=torch.sum)
    with pytest.raises(ValueError, match="inf or NaN"):
        find_spheres(ok, x / 0)
    with pytest.raises(ValueError, match="no floating-point tensor"):
        find_spheres(ok, x, output=lambda out: out.argmax(-1))
    with pytest.raises(ValueError, match="no output of the model depends"):
        find_spheres(ok, x, output=lambda out: out.detach())
    with pytest.raises(RuntimeError) as caught:
        find_spheres(ok, x[:, :3])
    assert "float64 copy" in caught.value.__notes__[0]


def test_models_that_cannot_be_copied_or_are_sharded():
    locked = lin_norm(BN1(6))
    locked.lock = threading.Lock()
    with pytest.raises(TypeError, match="copying Sequential failed"):
        find_spheres(locked, rows())
    sharded = lin_norm(BN1(6))
    sharded[0].weight.placements = sharded[0].weight.device_mesh = ()  # what marks a DTensor
    with pytest.raises(ValueError, match=r"'0\.weight' is sharded"):
        find_spheres(sharded, rows())


def test_nothing_finite_next_to_the_weights():
    # sqrt of a parameter at the edge of its domain: finite here, NaN half of the time next to it.
    def forward(s, x):
        return s.f(x) * s.v.sqrt().sum()

    model = Net(forward, f=nn.Linear(8, 2), v=nn.Parameter(torch.zeros(64)))
    with pytest.raises(ValueError, match="not next to them"):
        find_spheres(model, rows())

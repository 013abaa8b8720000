"""constrain on the optimizers that are out there: torch's, schedule-free ones, low-bit ones."""

import pytest
import torch
from test_constrain import gradients, named, weights

from sphereopt.geometry import angle, norm
from sphereopt.optim import SphereError
from sphereopt.optim.constrain import constrain

T = torch.optim
TORCH = {
    "SGD": lambda p: T.SGD(p, lr=0.05, momentum=0.9),
    "AdamW fused": lambda p: T.AdamW(p, lr=0.01, weight_decay=0, fused=True),
    "Adafactor": lambda p: T.Adafactor(p, lr=0.01),
    "RAdam": lambda p: T.RAdam(p, lr=0.01),
    "NAdam": lambda p: T.NAdam(p, lr=0.01),
    "Muon": lambda p: T.Muon(p, lr=0.01, weight_decay=0),
    "RMSprop": lambda p: T.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "Adagrad": lambda p: T.Adagrad(p, lr=0.01),
    "Adadelta": lambda p: T.Adadelta(p, lr=1.0),
    "Adamax": lambda p: T.Adamax(p, lr=0.01),
    "ASGD": lambda p: T.ASGD(p, lr=0.01),
    "Rprop": lambda p: T.Rprop(p, lr=0.01),
}
MOMENTS = {"SGD": "momentum_buffer", "Muon": "momentum_buffer", "RMSprop": "momentum_buffer"}
MOMENTS |= dict.fromkeys(["AdamW fused", "RAdam", "NAdam", "Adamax"], "exp_avg")


@pytest.mark.parametrize("transport", ["none", "project", "rescale", "parallel"])
@pytest.mark.parametrize("name", TORCH)
def test_every_torch_optimizer_is_its_own_step_on_tangent_gradients_then_scaled(name, transport):
    # Step by step beside an unconstrained twin that starts every step from the same point.
    (w,), (v,) = weights((6, 8)), weights((6, 8))
    held, plain = TORCH[name](named([w])), TORCH[name](named([v]))
    handle = constrain(held, {"w0": "row"}, transport=transport)
    radius = handle.radius["w0"][:, None]
    for (g,) in gradients([(6, 8)]):
        w.grad, old = g, w.detach().clone()
        unit = old / old.norm(dim=1, keepdim=True)
        v.grad = g - (g * unit).sum(1, keepdim=True) * unit
        held.step()
        plain.step()
        assert w.grad is g
        with torch.no_grad():
            v.mul_(radius / v.norm(dim=1, keepdim=True))
        torch.testing.assert_close(w, v, rtol=1e-12, atol=1e-12)
        moment = plain.state[v].get(MOMENTS.get(name))
        if moment is not None and transport != "none":
            moment.copy_(carried(moment, old, v.detach(), transport))
        for key, value in plain.state[v].items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(held.state[w][key], value, rtol=1e-11, atol=1e-12)
    assert angle(weights((6, 8))[0].detach(), w.detach(), "row").min() > 1e-3


def carried(m, w, y, how):
    """Transport of rows, by rotation matrices: of the plane of w and y, or by projection."""
    out = torch.empty_like(m)
    for i in range(len(m)):
        a, b = w[i] / w[i].norm(), y[i] / y[i].norm()
        if how == "parallel":
            # The rotation that takes a to b and leaves what is orthogonal to both alone.
            e = b - (a @ b) * a
            e = e / e.norm()
            c, s = a @ b, (b - (a @ b) * a).norm()
            turn = torch.eye(len(a), dtype=a.dtype)
            turn += (c - 1) * (torch.outer(a, a) + torch.outer(e, e))
            turn += s * (torch.outer(e, a) - torch.outer(a, e))
            # A moment with a radial part is carried as if that had been tangent: by the formula.
            tangent = m[i] - (m[i] @ a) * a
            radial = (m[i] @ a) * a
            out[i] = turn @ tangent + radial - (radial @ b) / (1 + a @ b) * (a + b)
        else:
            moved = m[i] - (m[i] @ b) * b
            out[i] = moved * (m[i].norm() / moved.norm() if how == "rescale" else 1)
    return out


def test_schedule_free_turns_as_unconstrained_at_the_effective_lr_of_its_norm():
    # Scaling the gradient's point and the second weights alike is a symmetry of the algorithm for
    # an invariant loss: lr is the effective one, and all directions are those of a plain run.
    free = pytest.importorskip("schedulefree")
    x, y = torch.randn(32, 5, dtype=torch.float64), torch.randn(32, dtype=torch.float64)

    def loss(w):
        return (x @ (w / w.norm()) - y).square().mean()

    ours, theirs = weights((5,)), weights((5,))
    # weight_lr_power=0: the average does not weigh by lr, which differs between the two.
    options = {"lr": 0.05, "weight_lr_power": 0.0, "foreach": False}
    held = free.SGDScheduleFree(named(ours), **options)
    plain = free.SGDScheduleFree(named(theirs), **options)
    held.train()
    plain.train()
    handle = constrain(held, {"w0": "tensor"})
    for _ in range(100):
        grown = float(theirs[0].detach().norm() / handle.radius["w0"])
        plain.param_groups[0]["lr"] = 0.05 * grown**2
        for (w,), optimizer in ((ours, held), (theirs, plain)):
            optimizer.zero_grad()
            loss(w).backward()
            optimizer.step()
        assert angle(ours[0].detach(), theirs[0].detach()) < 1e-12
        z = [optimizer.state[w]["z"] for (w,), optimizer in ((ours, held), (theirs, plain))]
        assert angle(*z) < 1e-12
    assert abs(grown - 1) > 1e-3
    torch.testing.assert_close(norm(ours[0].detach()), handle.radius["w0"])
    on_sphere = ours[0].detach().clone()
    held.eval()
    plain.eval()
    assert angle(ours[0].detach(), theirs[0].detach()) < 1e-12, "the averages agree too"
    assert abs(norm(ours[0].detach()) / handle.radius["w0"] - 1) > 1e-3, "and are off the sphere"
    held.train()
    torch.testing.assert_close(ours[0].detach(), on_sphere)


@pytest.mark.parametrize("foreach", [True, False])
def test_schedule_free_adamw_is_held_and_no_longer_writes_to_the_gradient(foreach):
    free = pytest.importorskip("schedulefree")
    (w,) = weights((6, 8), dtype=torch.float32)
    optimizer = free.AdamWScheduleFree(named([w]), lr=0.02, foreach=foreach)
    optimizer.train()
    handle = constrain(optimizer, {"w0": "row"})
    for (g,) in gradients([(6, 8)], dtype=torch.float32):
        w.grad = g.clone()
        optimizer.step()
        assert torch.equal(w.grad, g)
    off = (norm(w.detach(), "row") / handle.radius["w0"] - 1).abs().max()
    assert off < 3e-7, "one rounding of float32"


def test_bitsandbytes_eight_bit_adamw_is_held():
    bnb = pytest.importorskip("bitsandbytes")
    (w,) = weights((64, 64), dtype=torch.float32)
    optimizer = bnb.optim.AdamW8bit(named([w]), lr=0.01, weight_decay=0.0)
    handle = constrain(optimizer, {"w0": "row"})
    before = w.detach().clone()
    for (g,) in gradients([(64, 64)], dtype=torch.float32):
        w.grad = g
        optimizer.step()
    assert optimizer.state[w]["state1"].dtype == torch.uint8
    assert (norm(w.detach(), "row") / handle.radius["w0"] - 1).abs().max() < 3e-7
    assert angle(before, w.detach(), "row").min() > 0.01


@pytest.mark.filterwarnings("ignore")  # of torch.compile, which this optimizer calls in its step
def test_torchao_eight_bit_adamw_is_held_and_its_momentum_cannot_be_carried():
    low = pytest.importorskip("torchao.optim")
    (w,) = weights((64, 64), dtype=torch.float32)
    optimizer = low.AdamW8bit(named([w]), lr=0.01, weight_decay=0.0)
    handle = constrain(optimizer, {"w0": "row"})
    before = w.detach().clone()
    grads = gradients([(64, 64)], dtype=torch.float32)
    for (g,) in grads:
        w.grad = g
        optimizer.step()
    assert (norm(w.detach(), "row") / handle.radius["w0"] - 1).abs().max() < 3e-7
    assert angle(before, w.detach(), "row").min() > 0.01
    handle.remove()
    constrain(optimizer, {"w0": "row"}, transport="project")
    with pytest.raises(SphereError, match=r"'w0' .* has a exp_avg that is quantized.*'none'"):
        optimizer.step()


class Quantized(T.Optimizer):
    """Keeps its momentum as bytes, as low-bit optimizers do."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            self.state[p]["exp_avg"] = p.grad.to(torch.int8)
            p.sub_(p.grad, alpha=0.1)


def test_a_momentum_of_bytes_is_refused_by_name_if_it_is_to_be_carried():
    (w,) = weights((4, 6))
    optimizer = Quantized(named([w]))
    handle = constrain(optimizer, {"w0": "row"}, transport="project")
    w.grad = torch.randn(4, 6, dtype=torch.float64)
    message = r"'w0' of shape \(4, 6\) has a exp_avg .*torch.int8.*; use transport='none'"
    with pytest.raises(SphereError, match=message):
        optimizer.step()
    torch.testing.assert_close(norm(w.detach(), "row"), handle.radius["w0"])


class Nested(T.SGD):
    """A step around torch's: torch then runs the step hooks twice, one pair inside the other."""

    @torch.no_grad()
    def step(self, closure=None):
        return super().step(closure)


def test_hooks_that_run_twice_in_a_step_do_their_work_once():
    (w,), (v,) = weights((6, 8)), weights((6, 8))
    Nested(named([v]), lr=0.1)
    nested, plain = Nested(named([w]), lr=0.05, momentum=0.9), TORCH["SGD"](named([v]))
    for optimizer in (nested, plain):
        constrain(optimizer, {"w0": "row"}, transport="parallel")
    for (g,) in gradients([(6, 8)]):
        w.grad, v.grad = g, g.clone()
        nested.step()
        plain.step()
        assert w.grad is g
    assert torch.equal(w, v)

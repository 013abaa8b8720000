"""Equilibrium against simulation of torch's own optimizers."""

import math

import pytest
import torch
from torch import nn

from sphereopt.geometry import angle, norm, tangent
from sphereopt.theory import equilibrium


def simulate(optimizer, w, steps, skip):
    """Run on pure noise that is orthogonal to w and scales as 1/|w|; return (rms angle, norms)."""
    generator = torch.Generator().manual_seed(0)
    squares, norms = [], []
    for step in range(steps):
        noise = torch.randn(w.shape, generator=generator, dtype=w.dtype)
        old = w.detach().clone()
        w.grad = tangent(old, noise, "row") / norm(old, "row")[:, None]
        optimizer.step()
        norms.append(norm(w.detach(), "row").mean().item())
        if step >= skip:
            squares.append(angle(old, w.detach(), "row").square().mean().item())
    return math.sqrt(sum(squares) / len(squares)), norms


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_sgd_angle_at_equilibrium(momentum):
    w = nn.Parameter(torch.randn(16, 128, dtype=torch.float64))
    lr, decay = 0.1, 0.02
    optimizer = torch.optim.SGD([w], lr=lr, momentum=momentum, weight_decay=decay)
    found, _ = simulate(optimizer, w, 1500, 700)
    expected = equilibrium("sgd", lr=lr, weight_decay=decay, momentum=momentum).angle
    # lr*decay/(1-momentum) = 2 % at 0.9, and 800 steps of 16 rows leave some 0.5 % of noise.
    assert found == pytest.approx(expected, rel=0.025)


def test_adamw_angle_at_equilibrium():
    # Started near the equilibrium size, an rms of sqrt(lr/(2*decay)) for noise.
    w = nn.Parameter(0.22 * torch.randn(16, 128, dtype=torch.float64))
    optimizer = torch.optim.AdamW([w], lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99))
    found, _ = simulate(optimizer, w, 1800, 1000)
    expected = equilibrium("adamw", lr=1e-2, weight_decay=0.1).angle
    # lr*decay/(1-beta1) = 1 %, and as much for the lag of the second moment.
    assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_sgd_relaxes_in_the_predicted_time(momentum):
    lr, decay = 0.1, (0.02 if momentum == 0 else 0.01)
    time = equilibrium("sgd", lr=lr, weight_decay=decay, momentum=momentum).relaxation
    w = nn.Parameter(torch.randn(64, 256, dtype=torch.float64))
    settled = torch.optim.SGD([w], lr=lr, momentum=momentum, weight_decay=decay)
    goal = sum(simulate(settled, w, 1200, 0)[1][-100:]) / 100
    with torch.no_grad():
        w.mul_(1.05)
    later = torch.optim.SGD([w], lr=lr, momentum=momentum, weight_decay=decay)
    later.load_state_dict(settled.state_dict())
    away = [n / goal - 1 for n in simulate(later, w, int(time), 0)[1]]
    # After one relaxation time 1/e is left; norms fluctuate by some 0.1 %, which is 2 % of 5 %.
    assert away[-1] / 0.05 == pytest.approx(math.exp(-1), abs=0.06)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.1, "weight_decay": 0.0}, "weight_decay=0.0 must be positive"),
        ({"lr": -1.0, "weight_decay": 0.1}, "lr=-1.0 must be positive"),
        (
            {"lr": 0.1, "weight_decay": 0.1, "momentum": 1.0},
            "momentum=1.0 must be 0 or more and below 1",
        ),
    ],
)
def test_out_of_range_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        equilibrium("sgd", **options)


def test_unknown_optimizers_are_refused():
    with pytest.raises(ValueError, match="optimizer='lamb' must be one of sgd, sgdw"):
        equilibrium("lamb", lr=0.1, weight_decay=0.1)

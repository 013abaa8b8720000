"""What the papers say of their optimizers, measured."""

import math

import pytest
import torch
from torch import nn

from sphereopt.geometry import angle, distance, norm, tangent
from sphereopt.optim.literature import (
    SGDG,
    AdamG,
    AdamH,
    AdamS,
    AdamSRT,
    MuonH,
    RotationalAdamW,
    RotationalLion,
    RotationalSGD,
)


def mean_angle(optimizer, w, steps, burn):
    """Return the root mean square angle per step under the noise of a scale-invariant loss."""
    squares = []
    for _ in range(steps):
        before = w.detach().clone()
        size = norm(before, "row")[:, None].float()
        w.grad = tangent(before, torch.randn_like(before), "row") / size
        optimizer.step()
        squares.append(angle(before, w.detach(), "row").square().mean())
    return torch.stack(squares[burn:]).mean().sqrt().item()


ADAMW = {"lr": 0.02, "weight_decay": 0.1, "betas": (0.9, 0.999)}
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
LION = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.99)}
ADAMW_ANGLE = math.sqrt(2 * 0.02 * 0.1 * (1 - 0.9) / (1 + 0.9))
SGD_ANGLE = math.sqrt(2 * 0.1 * 0.01 / (1 + 0.9))
LION_ANGLE = math.sqrt(math.pi * 0.01 * 0.1 * (0.1**2 + 0.9**2 * 0.01 / 1.99))


@pytest.mark.parametrize(
    ("cls", "options", "expected"),
    [
        (RotationalAdamW, ADAMW, ADAMW_ANGLE),
        (RotationalSGD, SGD, SGD_ANGLE),
        (RotationalSGD, {**SGD, "nesterov": True}, SGD_ANGLE),
        (RotationalLion, LION, LION_ANGLE),
    ],
    ids=["adamw", "sgd", "nesterov", "lion"],
)
def test_rotational_optimizers_turn_by_the_equilibrium_angle(cls, options, expected):
    w = nn.Parameter(torch.randn(16, 64))
    measured = mean_angle(cls([w], zero_mean=False, **options), w, 600, burn=50)
    # The root mean square of updates lags behind by its decay; 1e-3 was measured in 1500 steps.
    assert measured == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("make", "expected", "rel"),
    [
        (lambda p: torch.optim.AdamW(p, **ADAMW), ADAMW_ANGLE, 0.01),
        (lambda p: torch.optim.SGD(p, **SGD), SGD_ANGLE, 0.01),
        # Theory beyond the authors' formula: sqrt(1 + 2 mu - 2 mu^3) more with Nesterov momentum.
        (lambda p: torch.optim.SGD(p, nesterov=True, **SGD), 1.158 * SGD_ANGLE, 0.01),
        # Lion's formula takes the sign for linear: 2.3 % were measured.
        (lambda p: RotationalLion(p, sphere=None, **LION), LION_ANGLE, 0.04),
    ],
    ids=["adamw", "sgd", "nesterov", "lion"],
)
def test_which_is_the_angle_that_the_plain_optimizers_settle_at(make, expected, rel):
    w = nn.Parameter(0.3 * torch.randn(16, 64))
    assert mean_angle(make([w]), w, 3500, burn=2300) == pytest.approx(expected, rel=rel)


def test_a_row_of_vanishing_gradients_turns_as_fast_as_the_others():
    # Rotational equilibrium normalizes updates: noise of any size is amplified to one angle.
    w = nn.Parameter(torch.randn(2, 64, dtype=torch.float64))
    optimizer = RotationalSGD([w], zero_mean=False, **SGD)
    turned = []
    for _ in range(300):
        before = w.detach().clone()
        w.grad = torch.randn(2, 64, dtype=torch.float64) * torch.tensor([[1.0], [1e-4]])
        optimizer.step()
        turned.append(angle(before, w.detach(), "row"))
    small, large = torch.stack(turned[50:]).mean(0)[[1, 0]]
    assert small / large == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("cls", [AdamH, MuonH])
def test_a_hyperball_step_is_a_chord_of_length_lr_brought_back(cls):
    w = nn.Parameter(torch.randn(8, 8, dtype=torch.float64))
    optimizer = cls([w], lr=0.1)
    start = w.detach().clone()
    for _ in range(50):
        before = w.detach().clone()
        w.grad = torch.randn(8, 8, dtype=torch.float64)
        optimizer.step()
        # A point at distance lr R from a sphere's point is seen at no more than asin(lr).
        assert angle(before, w.detach()) <= math.asin(0.1) + 1e-12
    torch.testing.assert_close(w.detach().norm(), start.norm())
    w.grad = tangent(w.detach(), torch.randn(8, 8, dtype=torch.float64))
    before = w.detach().clone()
    AdamH([w], lr=0.1, betas=(0.0, 0.0), eps=1e8).step()  # u is the gradient, scaled: tangent
    assert angle(before, w.detach()).item() == pytest.approx(math.atan(0.1), rel=1e-6)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (6, 2, 3, 3)])
def test_muon_h_evens_out_singular_values(shape):
    # With lr large beside the weights, the new weights are the direction.
    w = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    w.grad = torch.randn(shape, dtype=torch.float64).flatten(1).cumsum(1).view(shape)
    MuonH([w], lr=1e6).step()
    found = torch.linalg.svdvals(w.detach().flatten(1))
    given = torch.linalg.svdvals(w.grad.flatten(1))
    # Five steps map singular values from 0.005 of the norm to 0.68-1.13 of one another's mean.
    assert given[0] / given[-1] > 6
    assert found[0] / found[-1] < 2.5


def test_sgd_g_moves_along_geodesics_with_parallel_transport():
    w = nn.Parameter(torch.randn(4, 6, dtype=torch.float64))
    optimizer = SGDG([w], lr=0.1, momentum=1.0)
    w.grad = torch.randn(4, 6, dtype=torch.float64)
    optimizer.step()
    m = optimizer.state[w]["momentum_buffer"]
    speed, start = norm(m, "row"), w.detach().clone()
    for t in range(1, 6):
        w.grad = torch.zeros_like(w)
        optimizer.step()
        torch.testing.assert_close(norm(w.detach(), "row"), torch.ones(4, dtype=torch.float64))
        torch.testing.assert_close(norm(m, "row"), speed)
        torch.testing.assert_close(distance(start, w.detach(), "row"), t * speed)
        assert (m * w.detach()).sum(1).abs().max() < 1e-14


def test_adam_g_keeps_its_momentum_tangent_and_its_length():
    w = nn.Parameter(torch.randn(4, 6, dtype=torch.float64))
    optimizer = AdamG([w], lr=0.3, momentum=0.9)
    for _ in range(50):
        w.grad = torch.randn(4, 6, dtype=torch.float64)
        optimizer.step()
        m = optimizer.state[w]["momentum_buffer"]
        assert (m * w.detach()).sum(1).abs().max() < 1e-13
    size = norm(m, "row")
    w.grad = torch.zeros_like(w)
    optimizer.step()
    torch.testing.assert_close(norm(m, "row"), 0.9 * size)


def test_cho_and_lee_bug_omega_of_the_constructor_makes_rows_orthogonal():
    # The authors' constructor writes 0 into the defaults whatever it is given.
    w = nn.Parameter(torch.randn(4, 6, dtype=torch.float64))
    optimizer = SGDG([w], lr=0.1, omega=0.5)
    for _ in range(300):
        w.grad = torch.zeros_like(w)
        optimizer.step()
    eye = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(w.detach() @ w.detach().T, eye, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1e-12, 1e-8, 1e-4])
def test_cho_and_lee_bug_tiny_steps_keep_their_length(size):
    # Dividing by the norm plus 1e-8 halves a step of 1e-8 radians.
    w = nn.Parameter(torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    w.grad = torch.tensor([[0.0, size]], dtype=torch.float64)
    SGDG([w], lr=1.0).step()
    assert w.detach()[0, 1].item() == pytest.approx(-size, rel=1e-7)


def test_adam_srt_carries_the_first_moment_and_rescales_both():
    w = nn.Parameter(torch.randn(5, 8, dtype=torch.float64))
    twin = nn.Parameter(w.detach().clone())
    srt, s = AdamSRT([w], lr=0.1, eps=0.0), AdamS([twin], lr=0.1, eps=0.0)
    g = torch.randn(5, 8, dtype=torch.float64)
    before = w.detach().clone()
    w.grad, twin.grad = tangent(before, g, "row"), tangent(before, g, "row")
    srt.step()
    s.step()
    torch.testing.assert_close(w, twin, rtol=0, atol=0)  # the step itself is that of AdamS
    ratio = norm(before, "row") / norm(w.detach(), "row")
    m, v = srt.state[w]["exp_avg"], srt.state[w]["exp_avg_sq"]
    assert (m * w.detach()).sum(1).abs().max() < 1e-14
    # A tangent vector along the path keeps its length in transport; units go with 1/norm.
    torch.testing.assert_close(norm(m, "row"), norm(s.state[twin]["exp_avg"], "row") * ratio)
    torch.testing.assert_close(v, s.state[twin]["exp_avg_sq"] * ratio[:, None] ** 2)
    assert torch.equal(v, v[:, :1].expand(5, 8))  # one number per sphere

"""AdamP and SGDP against the authors' package, adamp 0.3.0."""

import pytest
import torch
from torch import nn

from sphereopt.geometry import tangent
from sphereopt.optim.literature import SGDP, AdamP

adamp = pytest.importorskip("adamp")

SHAPES = [(6, 5), (4, 3, 3, 3), (7,), (1, 9), (9, 1), (3, 1, 2, 2)]
ADAM = {"lr": 0.01, "weight_decay": 0.1}
SGD = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01}
CASES = [
    (AdamP, adamp.AdamP, ADAM),
    (AdamP, adamp.AdamP, {**ADAM, "nesterov": True, "betas": (0.8, 0.95), "eps": 1e-4}),
    (AdamP, adamp.AdamP, {**ADAM, "delta": 0.5, "wd_ratio": 0.4}),
    (SGDP, adamp.SGDP, SGD),
    (SGDP, adamp.SGDP, {**SGD, "nesterov": True}),
    (SGDP, adamp.SGDP, {**SGD, "dampening": 0.3, "delta": 0.5, "eps": 1e-4}),
    (SGDP, adamp.SGDP, {"lr": 0.01}),
]
every_case = pytest.mark.parametrize(
    ("ours", "theirs", "options"), CASES, ids=lambda x: "" if isinstance(x, type) else str(x)
)


def gradient(w: torch.Tensor, kind: str) -> torch.Tensor:
    """Return noise: generic, or orthogonal to every row, or to the whole tensor."""
    g = torch.randn_like(w)
    return g if kind == "generic" or (kind == "row" and w.ndim < 2) else tangent(w, g, kind)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["generic", "row", "tensor"])
@every_case
def test_trajectories_equal_those_of_the_authors_package(ours, theirs, options, kind, dtype):
    mine = [nn.Parameter(torch.randn(s, dtype=dtype)) for s in SHAPES]
    peers = [nn.Parameter(p.detach().clone()) for p in mine]
    left, right = ours(mine, **options), theirs(peers, **options)
    for _ in range(60):
        for p, q in zip(mine, peers, strict=True):
            p.grad = gradient(q.detach(), kind)
            q.grad = p.grad.clone()
        left.step()
        right.step()
    # Rounding: 8e-16 and 4e-7 of the largest weight were measured over 200 steps.
    rtol = {torch.float64: 1e-14, torch.float32: 2e-6}[dtype]
    for p, q in zip(mine, peers, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=rtol * q.detach().abs().max().item())


def test_authors_bug_channels_last_weights_are_stepped():
    # The original calls .view on them and raises.
    start = torch.randn(4, 3, 3, 3)
    odd = nn.Parameter(start.to(memory_format=torch.channels_last))
    odd.grad = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="view"):
        adamp.AdamP([nn.Parameter(odd.detach().clone())], lr=0.1)._channel_view(odd)
    plain = nn.Parameter(start.clone())
    plain.grad = odd.grad.contiguous()
    for p in (odd, plain):
        AdamP([p], lr=0.1).step()
        SGDP([p], lr=0.1).step()
    torch.testing.assert_close(odd.detach().contiguous(), plain.detach())
    assert odd.stride() == (27, 1, 9, 3)


@pytest.mark.parametrize("project_buffer", [True, False])
def test_the_buffer_is_projected_only_on_request_and_never_with_nesterov(project_buffer):
    options = {"lr": 0.5, "momentum": 0.9, "project_buffer": project_buffer}
    for nesterov in (False, True):
        w = nn.Parameter(torch.randn(4, 6, dtype=torch.float64))
        optimizer = SGDP([w], nesterov=nesterov, **options)
        for _ in range(3):  # tangent gradients, at three points: the buffer has a radial part
            w.grad, before = gradient(w.detach(), "row"), w.detach().clone()
            optimizer.step()
        radial = (optimizer.state[w]["momentum_buffer"] * before).sum(1).abs().max()
        assert (radial < 1e-7) == (project_buffer and not nesterov)


def test_the_condition_holds_by_chance_on_eight_percent_of_steps():
    # cos is normal of variance 1/n for a random gradient, and |cos| sqrt(n) < 0.1 has probability
    # 0.0797; 4000 trials put three standard deviations at 0.013. One row has one view.
    w = nn.Parameter(torch.randn(1, 400, dtype=torch.float64))
    optimizer, hits = SGDP([w], lr=0.0, weight_decay=0.0, project_buffer=True), 0
    for _ in range(4000):
        w.grad = torch.randn(1, 400, dtype=torch.float64)
        optimizer.step()
        hits += not torch.equal(optimizer.state[w]["momentum_buffer"], w.grad)
    assert hits / 4000 == pytest.approx(0.0797, abs=0.013)


def test_a_zero_gradient_counts_as_tangent_as_in_the_authors_code():
    w = nn.Parameter(torch.ones(2, 3))
    w.grad = torch.zeros(2, 3)
    AdamP([w], lr=0.1, weight_decay=1.0, wd_ratio=0.25).step()
    torch.testing.assert_close(w.detach(), torch.full((2, 3), 1 - 0.1 * 0.25))


def test_steps_are_orthogonal_and_slow_the_growth_of_norms():
    # Heo et al. 2021: momentum makes norms grow faster; a projected step of length d makes
    # |w'|^2 = |w|^2 + d^2, and no more.
    w = nn.Parameter(torch.randn(4, 256, dtype=torch.float64) / 16)
    plain = nn.Parameter(w.detach().clone())
    projected = SGDP([w], lr=1e-3, momentum=0.9)
    ambient = torch.optim.SGD([plain], lr=1e-3, momentum=0.9)
    start = w.detach().norm()
    for _ in range(500):
        before = w.detach().clone()
        g = torch.randn(4, 256, dtype=torch.float64)
        w.grad, plain.grad = tangent(w.detach(), g, "row"), tangent(plain.detach(), g, "row")
        projected.step()
        ambient.step()
        step = w.detach() - before
        expected = before.square().sum(1) + step.square().sum(1)
        # eps=1e-8 beside a norm of 1 leaves that much of the radial part.
        torch.testing.assert_close(w.detach().square().sum(1), expected, rtol=1e-7, atol=0)
    growth, without = w.detach().norm() / start - 1, plain.detach().norm() / start - 1
    assert 0 < 5 * growth < without

"""Against oracles: numpy loops over rows, and geoopt, over whole trajectories."""

import geoopt
import numpy as np
import pytest
import torch
from reference import trajectories
from torch import nn

import sphereopt as so
from sphereopt.geometry import norm, tangent, transport

MOVES = ["retract", "exp", "renorm", "hyperball", "rotate"]
TRANSPORTS = ["project", "parallel", "rescale", "none"]
STEPS = 60


def gradients(kind: str, shape: tuple[int, ...]):
    """Return a gradient rule: generic (a quadratic), or exactly orthogonal to every row."""
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(shape, generator=generator, dtype=torch.float64)
    noise = torch.randn((STEPS, *shape), generator=generator, dtype=torch.float64)

    def rule(w: torch.Tensor, step: int) -> torch.Tensor:
        g = w - target + 0.3 * noise[step]
        return g if kind == "generic" else tangent(w, g, "row") / norm(w, "row")[:, None]

    return rule


def compare(optimizer, w, rows, rule, schedule):
    for step in range(STEPS):
        lr = schedule(step)
        optimizer.param_groups[0]["lr"] = lr
        g = rule(w.detach(), step)
        w.grad = g
        optimizer.step()
        for row, grad in zip(rows, g.numpy(), strict=True):
            row.step(grad, lr)
    expected = np.stack([row.w for row in rows])
    # 60 steps of a contraction in float64; 1e-12 leaves room for the order of summation.
    np.testing.assert_allclose(w.detach().numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["generic", "invariant"])
@pytest.mark.parametrize("transport_name", TRANSPORTS)
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.0, "dampening": 0.0, "nesterov": False},
        {"momentum": 0.9, "dampening": 0.2, "nesterov": False},
        {"momentum": 0.9, "dampening": 0.0, "nesterov": True},
    ],
    ids=["plain", "heavy", "nesterov"],
)
def test_sgd_follows_the_oracle(options, move, transport_name, kind):
    w = nn.Parameter(torch.randn(5, 7, dtype=torch.float64))
    rows = [
        trajectories.SGD(x.copy(), move=move, transport=transport_name, **options)
        for x in w.detach().numpy()
    ]
    optimizer = so.SphereSGD([w], sphere="row", move=move, transport=transport_name, **options)
    compare(optimizer, w, rows, gradients(kind, w.shape), lambda t: 0.1 / (1 + 0.1 * t))


@pytest.mark.parametrize("kind", ["generic", "invariant"])
@pytest.mark.parametrize("transport_name", TRANSPORTS)
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("second_moment", ["entry", "sphere"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam_follows_the_oracle(amsgrad, second_moment, move, transport_name, kind):
    w = nn.Parameter(torch.randn(5, 7, dtype=torch.float64))
    options = {"betas": (0.8, 0.95), "eps": 1e-3, "amsgrad": amsgrad}
    options["second_moment"] = second_moment
    rows = [
        trajectories.Adam(x.copy(), move=move, transport=transport_name, **options)
        for x in w.detach().numpy()
    ]
    optimizer = so.SphereAdam([w], sphere="row", move=move, transport=transport_name, **options)
    compare(optimizer, w, rows, gradients(kind, w.shape), lambda t: 0.05 / (1 + 0.1 * t))


@pytest.mark.parametrize("kind", ["generic", "invariant"])
@pytest.mark.parametrize("transport_name", TRANSPORTS)
@pytest.mark.parametrize("move", MOVES)
def test_lion_follows_the_oracle(move, transport_name, kind):
    w = nn.Parameter(torch.randn(5, 7, dtype=torch.float64))
    options = {"betas": (0.8, 0.95), "move": move, "transport": transport_name}
    rows = [trajectories.Lion(x.copy(), **options) for x in w.detach().numpy()]
    optimizer = so.SphereLion([w], sphere="row", **options)
    compare(optimizer, w, rows, gradients(kind, w.shape), lambda t: 0.05 / (1 + 0.1 * t))


@pytest.mark.parametrize("amsgrad", [False, True])
def test_geoopt_adam_gives_the_same_rows_up_to_the_unit_of_lr(amsgrad):
    # geoopt's second moment is the sum over a row, ours the mean: lr and eps differ by its root.
    n = 5
    start = torch.nn.functional.normalize(torch.randn(6, n, dtype=torch.float64), dim=1)
    rule = gradients("generic", start.shape)
    theirs = geoopt.ManifoldParameter(start.clone(), manifold=geoopt.Sphere())
    ours = nn.Parameter(start.clone())
    peer = geoopt.optim.RiemannianAdam([theirs], lr=0.05, amsgrad=amsgrad, eps=1e-3)
    options = {"lr": 0.05 / n**0.5, "eps": 1e-3 / n**0.5, "move": "retract", "amsgrad": amsgrad}
    options["transport"] = "project"
    mine = so.SphereAdam([ours], sphere="row", second_moment="sphere", **options)
    for step in range(50):
        theirs.grad = rule(theirs.detach().as_subclass(torch.Tensor), step)
        ours.grad = rule(ours.detach(), step)
        peer.step()
        mine.step()
    torch.testing.assert_close(
        ours.detach(), theirs.detach().as_subclass(torch.Tensor), rtol=0, atol=1e-12
    )


def test_one_second_moment_per_sphere_keeps_the_direction_tangent():
    # Per entry, the division brings a radial part back: renorm and retract then differ.
    start, grads = torch.randn(4, 9, dtype=torch.float64), torch.randn(20, 4, 9).double()

    def end(move, second_moment):
        w = nn.Parameter(start.clone())
        options = {"move": move, "second_moment": second_moment, "transport": "project"}
        optimizer = so.SphereAdam([w], lr=0.05, sphere="row", **options)
        for g in grads:
            w.grad = g.clone()
            optimizer.step()
        return w.detach()

    def gap(second_moment):
        return (end("retract", second_moment) - end("renorm", second_moment)).abs().max()

    assert gap("sphere") < 1e-12
    assert gap("entry") > 1e-3


@pytest.mark.parametrize("nesterov", [False, True])
def test_geoopt_sgd_gives_the_same_rows(nesterov):
    # geoopt seeds its buffer with the raw gradient and then adds the gradient again (its first
    # step is 1+momentum too long): zeroing that buffer first makes the two algorithms one.
    start = torch.nn.functional.normalize(torch.randn(6, 5, dtype=torch.float64), dim=1)
    rule = gradients("generic", start.shape)
    theirs = geoopt.ManifoldParameter(start.clone(), manifold=geoopt.Sphere())
    ours = nn.Parameter(start.clone())
    peer = geoopt.optim.RiemannianSGD([theirs], lr=0.05, momentum=0.9, nesterov=nesterov)
    peer.state[theirs]["momentum_buffer"] = torch.zeros_like(start)
    options = {"momentum": 0.9, "nesterov": nesterov, "transport": "project"}
    mine = so.SphereSGD([ours], lr=0.05, sphere="row", **options)
    for step in range(50):
        theirs.grad = rule(theirs.detach().as_subclass(torch.Tensor), step)
        ours.grad = rule(ours.detach(), step)
        peer.step()
        mine.step()
    torch.testing.assert_close(
        ours.detach(), theirs.detach().as_subclass(torch.Tensor), rtol=0, atol=1e-12
    )


def test_geoopt_bug_first_momentum_step_is_not_doubled():
    w = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    before = w.detach().clone()
    g = torch.randn(3, 4, dtype=torch.float64)
    w.grad = g.clone()
    so.SphereSGD([w], lr=1e-3, momentum=0.9, sphere="row").step()
    expected = so.geometry.retract(before, -1e-3 * g, "row")
    torch.testing.assert_close(w.detach(), expected, rtol=0, atol=1e-14)


def test_momentum_is_made_tangent_where_it_is_used():
    # Carrying the raw buffer instead of its tangent part goes unnoticed with invariant gradients
    # and is 30 % wrong with these.
    w = nn.Parameter(torch.randn(4, 6, dtype=torch.float64))
    optimizer = so.SphereSGD([w], lr=0.2, momentum=0.9, sphere="row", transport="parallel")
    rule = gradients("generic", w.shape)
    for step in range(20):
        w.grad = rule(w.detach(), step)
        optimizer.step()
        m = optimizer.state[w]["momentum_buffer"]
        assert (m * w.detach()).sum(dim=1).abs().max() < 1e-13


@pytest.mark.parametrize("sphere", ["row", "col", "tensor", "block:2"])
@pytest.mark.parametrize("name", ["SphereSGD", "SphereAdam", "SphereLion"])
def test_every_granularity_is_rows_of_the_right_matrix(sphere, name):
    cls = getattr(so, name)
    w = torch.randn(4, 3, 2, 5, dtype=torch.float64)
    grads = torch.randn(20, 4, 3, 2, 5, dtype=torch.float64)

    def matrix(x):
        x = x.movedim(1, 0) if sphere == "col" else x
        return x.reshape({"row": 4, "col": 3, "tensor": 1, "block:2": 2}[sphere], -1)

    a, b = nn.Parameter(w.clone()), nn.Parameter(matrix(w).clone())
    left = cls([a], lr=0.1, sphere=sphere)
    right = cls([b], lr=0.1, sphere="row")
    for g in grads:
        a.grad, b.grad = g.clone(), matrix(g).clone()
        left.step()
        right.step()
    torch.testing.assert_close(matrix(a.detach()), b.detach(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["SphereSGD", "SphereAdam", "SphereLion"])
@pytest.mark.parametrize("sphere", ["row", "tensor"])
def test_joint_sphere_is_the_sphere_of_the_concatenation(sphere, name):
    cls = getattr(so, name)
    weight, bias = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    grads = torch.randn(20, 4, 7, dtype=torch.float64)
    w, b = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
    whole = nn.Parameter(torch.cat([weight, bias[:, None]], dim=1))
    left = cls([{"params": [w, b], "joint": True}], lr=0.1, sphere=sphere)
    right = cls([whole], lr=0.1, sphere=sphere)
    for g in grads:
        w.grad, b.grad, whole.grad = g[:, :6].clone(), g[:, 6].clone(), g.clone()
        left.step()
        right.step()
    together = torch.cat([w.detach(), b.detach()[:, None]], dim=1)
    torch.testing.assert_close(together, whole.detach(), rtol=0, atol=1e-13)


def test_transport_keeps_what_it_promises_over_a_run():
    w = nn.Parameter(torch.randn(3, 8, dtype=torch.float64))
    optimizer = so.SphereSGD([w], lr=0.1, momentum=1.0, sphere="row", transport="parallel")
    w.grad = torch.randn(3, 8, dtype=torch.float64)
    optimizer.step()
    size = norm(optimizer.state[w]["momentum_buffer"], "row")
    for _ in range(100):
        w.grad = torch.zeros_like(w)
        optimizer.step()
    torch.testing.assert_close(norm(optimizer.state[w]["momentum_buffer"], "row"), size)


def test_transport_of_the_step_is_the_transport_of_geometry():
    w = nn.Parameter(torch.randn(3, 8, dtype=torch.float64))
    before, g = w.detach().clone(), torch.randn(3, 8, dtype=torch.float64)
    optimizer = so.SphereSGD([w], lr=0.5, momentum=0.9, sphere="row", transport="rescale")
    w.grad = g
    optimizer.step()
    expected = transport(before, w.detach(), tangent(before, g, "row"), "row", "rescale")
    torch.testing.assert_close(optimizer.state[w]["momentum_buffer"], expected)

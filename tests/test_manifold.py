"""Spheres inside geoopt: its own spheres as the other side, and its optimizers and samplers."""

from __future__ import annotations

import copy
import subprocess
import sys

import geoopt
import pytest
import torch
from torch import Tensor

from sphereopt import geometry
from sphereopt.manifold import Spheres

# Ten or so float64 operations on numbers of order one.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
PAIRS = [
    (Spheres("row", 1.0), geoopt.Sphere()),
    (Spheres("row", 1.0, move="exp"), geoopt.SphereExact()),
    (Spheres("row"), geoopt.Sphere()),
]
SPECS = [
    ("row", (6, 5)),
    ("row", (4, 3, 3, 3)),
    ("row", (1, 7)),
    ("row", (7, 1)),
    ("col", (5, 6)),
    ("col", (3, 4, 2, 2)),
    ("tensor", (5,)),
    ("tensor", (4, 3)),
    ("block:2", (6, 3)),
    ("block:3", (6,)),
    ("block:2@0:4,row@4:7", (7, 3)),
    ("row", (0, 3)),
]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def with_tangents(manifold: Spheres, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return a point and two vectors tangent there."""
    x = manifold.random(*shape, dtype=torch.float64).as_subclass(Tensor)
    return x, manifold.proju(x, normal(*shape)), manifold.proju(x, normal(*shape))


# Against geoopt's spheres, on unit rows


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=str)
def test_every_function_is_geoopts_on_unit_rows(ours, theirs):
    x, y, v = theirs.projx(normal(6, 9)), theirs.projx(normal(6, 9)), normal(6, 9)
    u = theirs.proju(x, 0.3 * normal(6, 9))
    v = theirs.proju(x, v)
    calls = {
        "proju": (x, v),
        "egrad2rgrad": (x, y),
        "retr": (x, u),
        "expmap": (x, u),
        "logmap": (x, y),
        "transp": (x, y, v),
        "inner": (x, u, v),
        "norm": (x, u),
        "dist": (x, y),
        "dist2": (x, y),
        "component_inner": (x, u),
        "retr_transp": (x, u, v),
        "expmap_transp": (x, u, v),
        "transp_follow_retr": (x, u, v),
        "transp_follow_expmap": (x, u, v),
    }
    for name, arguments in calls.items():
        torch.testing.assert_close(
            getattr(ours, name)(*arguments),
            getattr(theirs, name)(*arguments),
            **EXACT,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    if ours.radius is not None:
        torch.testing.assert_close(ours.projx(3 * v), theirs.projx(3 * v), **EXACT)
    for name in ("inner", "norm", "dist"):
        assert getattr(ours, name)(x, u, keepdim=True).shape == (6, 1)


def test_a_whole_vector_gives_geoopts_shapes():
    ours, theirs = Spheres("tensor", 1.0), geoopt.Sphere()
    x, u = theirs.projx(normal(5)), normal(5)
    for keepdim in (False, True):
        mine = ours.inner(x, u, keepdim=keepdim)
        torch.testing.assert_close(mine, theirs.inner(x, u, keepdim=keepdim), **EXACT)


def on(manifold, start: Tensor) -> geoopt.ManifoldParameter:
    return geoopt.ManifoldParameter(start.clone(), manifold=manifold)


OPTIMIZERS = {
    "sgd": lambda p: geoopt.optim.RiemannianSGD(p, lr=0.05),
    "momentum": lambda p: geoopt.optim.RiemannianSGD(p, lr=0.05, momentum=0.9),
    "nesterov": lambda p: geoopt.optim.RiemannianSGD(p, lr=0.05, momentum=0.8, nesterov=True),
    "adam": lambda p: geoopt.optim.RiemannianAdam(p, lr=0.05),
    "amsgrad": lambda p: geoopt.optim.RiemannianAdam(p, lr=0.05, amsgrad=True, stabilize=7),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=str)
def test_fifty_steps_of_geoopts_optimizers_are_those_on_its_own_spheres(ours, theirs, name):
    start, target = geoopt.Sphere().projx(normal(5, 7)), normal(60, 5, 7)
    ends = []
    for manifold in (ours, theirs):
        p = on(manifold, start)
        optimizer = OPTIMIZERS[name]([p])
        for i, goal in enumerate(target):  # radial parts, a new direction at every step
            p.grad = (goal - 0.3 * p).detach().as_subclass(Tensor)
            if i == 0:
                # geoopt's SGD starts its buffer with the raw gradient; its sphere then moves by
                # the radial part too, ours does not. Without a radial part they agree.
                p.grad = geometry.tangent(start, p.grad, "row")
            optimizer.step()
        ends.append(p.detach().as_subclass(Tensor))
    # The two round differently, and sixty steps carry that along: some 1e-15 each.
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-11, atol=1e-11)
    assert geometry.angle(start, ends[0], "row").min() > 0.1


@pytest.mark.parametrize(("sphere", "shape"), [("row", (6, 8)), ("tensor", (8,))])
def test_line_search_ends_where_geoopts_does(sphere, shape):
    matrix = torch.diag(torch.linspace(1, 3, 8, dtype=torch.float64))
    start, ends = geoopt.Sphere().projx(normal(*shape)), []
    for manifold in (Spheres(sphere, 1.0), geoopt.Sphere()):
        p = on(manifold, start)
        optimizer = geoopt.optim.RiemannianLineSearch([p], line_search_method="wolfe")

        def closure(p=p, optimizer=optimizer):
            optimizer.zero_grad()
            value = ((p @ matrix) * p).sum()
            value.backward()
            return value.item()

        for _ in range(30):
            optimizer.step(closure)
        ends.append(p.detach().as_subclass(Tensor))
    # A line search branches on comparisons, but both see the same numbers to rounding.
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-8, atol=1e-8)
    quotient = (ends[0] @ matrix * ends[0]).sum(-1)
    assert (quotient < 1.01).all()  # the smallest eigenvalue


# Any granularity, any radius


def radii(sphere: str, shape: tuple[int, ...]) -> list[float | Tensor | None]:
    count = len(geometry.norm(normal(*shape), sphere))
    return [None, 2.5, torch.linspace(0.5, 3, count)]


@pytest.mark.parametrize(("sphere", "shape"), SPECS)
def test_maps_stay_on_the_manifold_and_undo_each_other(sphere, shape):
    for radius in radii(sphere, shape):
        for transport in ("project", "parallel", "rescale"):
            m = Spheres(sphere, radius, transport=transport)
            x, u, v = with_tangents(m, shape)
            y = m.expmap(x, u)
            for point in (
                x,
                y,
                m.retr(x, u),
                m.projx(normal(*shape)),
                m.origin(*shape, dtype=torch.float64),
            ):
                assert m.check_point_on_manifold(point, rtol=1e-12, atol=0)
            for at, vector in ((x, u), (y, m.transp(x, y, v)), (x, m.logmap(x, y))):
                assert m.check_vector_on_tangent(at, vector, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(m.expmap(x, m.logmap(x, y)), y, **EXACT)
            torch.testing.assert_close(m.norm(x, m.logmap(x, y)), m.dist(x, y), **EXACT)
            torch.testing.assert_close(m.dist(x, y), m.dist(y, x), **EXACT)
            if transport != "project":
                moved = m.transp(x, y, u)
                torch.testing.assert_close(m.norm(y, moved), m.norm(x, u), **EXACT)


@pytest.mark.parametrize(("sphere", "shape"), SPECS)
def test_kept_dimensions_give_every_entry_its_own_spheres_number(sphere, shape):
    m = Spheres(sphere)
    x, u, v = with_tangents(m, shape)
    spread = m.component_inner(x, u, v).expand_as(x)
    # The gradient of sum_i <u_i, v_i>^2 by u is 2 <u_i, v_i> v: autograd as the other side.
    u.requires_grad_()
    m.inner(x, u, v).square().sum().backward()
    torch.testing.assert_close(2 * spread * v, u.grad, **EXACT)


@pytest.mark.parametrize("move", ["retract", "exp"])
@pytest.mark.parametrize("transport", ["parallel", "rescale"])
def test_a_reversible_manifold_goes_back_where_it_came_from(move, transport):
    m = Spheres("block:3", 2.0, move=move, transport=transport)
    assert m.reversible
    x, u, _ = with_tangents(m, (6, 4))
    y, moved = m.retr_transp(x, u, u)
    back, returned = m.retr_transp(y, -moved, -moved)
    torch.testing.assert_close(back, x, **EXACT)
    torch.testing.assert_close(returned, -u, **EXACT)


def test_a_point_off_its_spheres_is_told_and_brought_back():
    m = Spheres("row", torch.tensor([1.0, 2.0, 3.0]))
    x, u, _ = with_tangents(m, (3, 5))
    assert not m.check_point_on_manifold(1.1 * x)
    for function in (m.retr, m.expmap):
        assert m.check_point_on_manifold(function(1.1 * x, u), rtol=1e-12, atol=0)
    assert not m.check_vector_on_tangent(x, u + 1e-3 * x)


def test_projected_transport_is_not_called_reversible():
    assert not Spheres("row", 1.0).reversible
    assert not geoopt.Sphere.reversible


@pytest.mark.parametrize("sphere", ["row", "tensor", "block:2"])
def test_autograd_goes_through_the_maps(sphere):
    for radius in (None, 1.5):
        m = Spheres(sphere, radius)
        x, u, _ = with_tangents(m, (4, 3))
        y = m.random(4, 3, dtype=torch.float64).as_subclass(Tensor)
        for function in (m.expmap, m.retr, m.dist, m.logmap):
            other = y if function in (m.dist, m.logmap) else u
            inputs = (x.clone().requires_grad_(), other.clone().requires_grad_())
            torch.autograd.gradcheck(function, inputs)
        torch.autograd.gradcheck(m.projx, x.clone().requires_grad_())


def test_derivatives_are_finite_where_formulas_divide_zero_by_zero():
    m = Spheres("row", 1.0)
    x = m.random(3, 4).as_subclass(Tensor)
    for function in (m.dist, m.norm, m.expmap, m.logmap):
        y = (torch.zeros_like(x) if function in (m.norm, m.expmap) else x).clone().requires_grad_()
        function(x, y).sum().backward()
        assert y.grad.isfinite().all()


# Where geoopt's spheres break


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("move", ["retract", "exp"])
def test_half_precision_keeps_the_radius_for_a_hundred_steps(dtype, move):
    manifold = Spheres("row", 3.0, move=move)
    p = geoopt.ManifoldParameter(manifold.random(4, 1024, dtype=dtype))
    optimizer = geoopt.optim.RiemannianSGD([p], lr=0.1)
    for _ in range(100):
        p.grad = torch.randn(4, 1024).to(dtype)
        optimizer.step()
    norms = geometry.norm(p.detach().as_subclass(Tensor), "row")
    # One rounding in bfloat16 changes each of 1024 entries by up to 2e-3, the norm by about 1e-4;
    # a norm that is rounded, rescaled and rounded again stays wrong by up to 2e-3.
    torch.testing.assert_close(norms / 3, torch.ones(4, dtype=torch.float64), rtol=0, atol=6e-4)


def test_zero_spheres_stay_zero_and_the_others_move():
    for radius in (None, 1.0):
        m = Spheres("row", radius)
        x = torch.randn(3, 5)
        x[1] = 0
        assert not m.check_point_on_manifold(x)
        for result in (m.projx(x), m.retr(x, x + 1), m.expmap(x, x + 1), m.logmap(x, x + 1)):
            assert result.isfinite().all()
            assert (result[1] == 0).all()
        assert m.retr(x, torch.ones(3, 5))[0].ne(x[0]).any()


def test_small_and_near_straight_angles_are_accurate():
    m, angles = Spheres("row", 1.0), torch.tensor([1e-9, 1e-5, torch.pi - 1e-7])
    x = torch.tensor([[1.0, 0.0]] * 3, dtype=torch.float64)
    angles = angles.double()
    y = torch.stack([angles.cos(), angles.sin()], 1)
    torch.testing.assert_close(m.dist(x, y), angles, rtol=1e-9, atol=0)
    assert not torch.allclose(geoopt.Sphere().dist(x, y), angles, rtol=1e-3, atol=0)


def test_channels_last_and_strided_points_are_like_contiguous_ones():
    m = Spheres("row", 2.0)
    x, u, _ = with_tangents(m, (4, 3, 2, 2))
    last = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(m.retr(last, u), m.retr(x, u), **EXACT)
    assert m.retr(last, u).is_contiguous(memory_format=torch.channels_last)
    wide = torch.zeros(4, 6, 2, 2, dtype=torch.float64)[:, ::2].copy_(x)
    torch.testing.assert_close(m.expmap(wide, u), m.expmap(x, u), **EXACT)


def test_the_manifold_of_a_parameter_survives_copies():
    p = on(Spheres("block:2", torch.tensor([1.0, 2.0])), normal(4, 3))
    twin = copy.deepcopy(p)
    assert twin.manifold.sphere == "block:2"
    assert torch.equal(twin.manifold.radius, p.manifold.radius)
    assert repr(twin.manifold) == "Spheres('block:2', radius=(2,)) manifold"


# geoopt's samplers: with a flat density, each row is one chain


def test_samplers_refuse_a_manifold_that_is_not_reversible():
    with pytest.raises(ValueError, match="reversible"):
        geoopt.samplers.RSGLD([on(Spheres("row", 1.0), normal(3, 3))])


SAMPLERS = {
    "rhmc": lambda p: geoopt.samplers.RHMC(p, epsilon=0.4, n_steps=3),
    "sgrhmc": lambda p: geoopt.samplers.SGRHMC(p, epsilon=0.4, n_steps=3, alpha=0.3),
    "rsgld": lambda p: geoopt.samplers.RSGLD(p, epsilon=0.3),
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("move", ["exp", "retract"])
def test_samplers_spread_chains_evenly_over_their_spheres(name, move):
    chains, n, radius = 4000, 3, 2.0
    start = torch.zeros(chains, n, dtype=torch.float64)
    start[:, 0] = radius  # all chains at one pole: what does not mix shows in the mean
    p = on(Spheres("row", radius, move=move, transport="parallel"), start)
    sampler = SAMPLERS[name]([p])
    for _ in range(60):
        sampler.step(lambda: (p * 0).sum())
    x = p.detach().as_subclass(Tensor)
    torch.testing.assert_close(x.norm(dim=1), torch.full((chains,), radius).double(), **EXACT)
    x = x / radius
    # Uniform: E x = 0, E xx' = I/3, with standard errors sqrt(1/3/4000) = 0.009 and at most
    # sqrt(4/45/4000) = 0.005; five of them.
    assert x.mean(0).abs().max() < 0.046
    assert (x.T @ x / chains - torch.eye(n) / n).abs().max() < 0.024


# What cannot be a manifold


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sphere": "row@2:4"}, "leaves rows 0 to 2 without a sphere"),
        ({"sphere": "row@0:2,row@3:4"}, "leaves rows 2 to 3 without a sphere"),
        ({"sphere": "rows"}, "not a sphere spec"),
        ({"radius": 0.0}, "must be positive"),
        ({"radius": torch.tensor([1.0, float("nan")])}, "must be positive"),
        ({"radius": torch.ones(2, 2)}, "one number"),
        ({"move": "rotate"}, "move='rotate' is none of 'retract', 'exp'"),
        ({"transport": "none"}, "transport='none' is none of"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        Spheres(**arguments)


@pytest.mark.parametrize(
    ("manifold", "shape", "message"),
    [
        (Spheres("row@0:4"), (6, 3), "leaves rows from 4 on of 6"),
        (Spheres("block:4"), (6, 3), "dim 0 that 4 divides"),
        (Spheres("row", torch.ones(3)), (4, 3), r"4 spheres, and radius has shape \(3,\)"),
        (Spheres("row"), (4,), "two or more dimensions"),
        (Spheres("tensor"), (), "no dimensions"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(manifold, shape, message):
    with pytest.raises(ValueError, match=message):
        geoopt.ManifoldParameter(torch.ones(shape), manifold=manifold)


def test_sphereopt_itself_does_without_geoopt():
    code = (
        "import sys; sys.modules['geoopt'] = None; import sphereopt, torch; "
        "w = torch.nn.Parameter(torch.ones(2, 2)); w.grad = torch.eye(2); "
        "sphereopt.SphereSGD([w], sphere='row', lr=0.1).step(); print('stepped')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "stepped\n"

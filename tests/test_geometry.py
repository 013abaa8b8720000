"""Geometry against geoopt, vector formulas, differential equations, and its own laws."""

from __future__ import annotations

from itertools import product

import geoopt
import numpy as np
import pytest
import torch
from geometry_points import EXACT, TRANSPORTS, normal, points
from reference import vectors
from torch import Tensor

from sphereopt import geometry

# Against geoopt, which knows unit vectors in the last dimension


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (geometry.tangent, geoopt.Sphere.proju),
        (
            lambda w, x, s: geometry.retract(w, geometry.tangent(w, x, s), s),
            lambda b, w, x: b.retr(w, b.proju(w, x)),
        ),
        (
            lambda w, x, s: geometry.exp(w, geometry.tangent(w, x, s), s),
            lambda b, w, x: b.expmap(w, b.proju(w, x)),
        ),
        (geometry.log, lambda b, w, x: b.logmap(w, b.projx(x))),
        (geometry.angle, lambda b, w, x: b.dist(w, b.projx(x))),
        (geometry.distance, lambda b, w, x: b.dist(w, b.projx(x))),
        (
            lambda w, x, s: geometry.transport(w, x, w.roll(1, 0), s, "project"),
            lambda b, w, x: b.transp(w, b.projx(x), w.roll(1, 0)),
        ),
    ],
    ids=["tangent", "retract", "exp", "log", "angle", "distance", "transport"],
)
def test_unit_rows_are_geoopts(ours, theirs):
    ball = geoopt.Sphere()
    w, x = ball.projx(normal(6, 9)), normal(6, 9)
    torch.testing.assert_close(ours(w, x, "row"), theirs(ball, w, x), **EXACT)


# Every granularity, shape, dtype and layout against float64 vectors in numpy

FUNCTIONS = {
    "norm": (lambda w, x, m, s: geometry.norm(w, s), lambda w, x, m: vectors.norm(w)),
    "tangent": (
        lambda w, x, m, s: geometry.tangent(w, x, s),
        lambda w, x, m: vectors.tangent(w, x),
    ),
    "retract": (
        lambda w, x, m, s: geometry.retract(w, x, s),
        lambda w, x, m: vectors.retract(w, x),
    ),
    "exp": (lambda w, x, m, s: geometry.exp(w, x, s), lambda w, x, m: vectors.exp(w, x)),
    "log": (lambda w, x, m, s: geometry.log(w, x, s), lambda w, x, m: vectors.log(w, x)),
    "angle": (lambda w, x, m, s: geometry.angle(w, x, s), lambda w, x, m: vectors.angle(w, x)),
    "distance": (
        lambda w, x, m, s: geometry.distance(w, x, s),
        lambda w, x, m: vectors.distance(w, x),
    ),
    "project": (
        lambda w, x, m, s: geometry.transport(w, x, m, s, "project"),
        lambda w, x, m: vectors.transport_project(w, x, m),
    ),
    "rescale": (
        lambda w, x, m, s: geometry.transport(w, x, m, s, "rescale"),
        lambda w, x, m: vectors.transport_rescale(w, x, m),
    ),
    "parallel": (
        lambda w, x, m, s: geometry.transport(w, x, m, s),
        lambda w, x, m: vectors.transport_parallel(w, x, m),
    ),
}
CASES = [
    *(
        ("tensor", s)
        for s in [(), (1,), (5,), (1, 7), (7, 1), (4, 6), (6, 4, 3, 3), (0, 3), (3, 0)]
    ),
    *(("row", s) for s in [(1, 7), (7, 1), (4, 6), (6, 4, 3, 3), (0, 3), (3, 0)]),
    *(("col", s) for s in [(1, 7), (7, 1), (4, 6), (6, 4, 3, 3), (0, 3), (3, 0)]),
    *(("block:1", s) for s in [(1,), (5,), (1, 7), (0, 3), (3, 0)]),
    *(("block:2", s) for s in [(4, 6), (6, 4, 3, 3), (0, 3)]),
    ("block:5", (5,)),
    ("block:7", (7, 1)),
]
NUMBERS = ("norm", "angle", "distance")
# Every other one meets every layout: a wide, a half and a complex one.
DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.complex128,
    torch.complex64,
    torch.float16,
)


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def sliced(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2]


def expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


def contiguous(x: Tensor) -> Tensor:
    return x.clone()


def layouts(shape: tuple[int, ...]):
    """Return the ways a tensor of this shape may lie in memory."""
    found = [contiguous]
    if len(shape) >= 1:
        found += [sliced, expanded]
    if len(shape) >= 2:
        found += [transposed]
    if len(shape) == 4:
        found += [channels_last]
    return found


def strides(x: Tensor) -> list[int]:
    """Return the strides that decide where entries lie: not those of dimensions of one entry."""
    return [step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def oracle(name: str, sphere: str, *arrays: Tensor) -> Tensor:
    """Return the float64 result, complex if the arguments are."""
    wide = [x.to(torch.promote_types(x.dtype, torch.float64)).numpy() for x in arrays]
    shaped = vectors.numbers if name in NUMBERS else vectors.tensor
    return torch.from_numpy(shaped(FUNCTIONS[name][1], arrays[0].shape, sphere, *wide))


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        *product(DTYPES, (contiguous, channels_last)),
        *product(DTYPES[::2], (sliced, expanded, transposed)),
    ],
    ids=lambda x: getattr(x, "__name__", str(x).removeprefix("torch.")),
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_granularity_shape_dtype_and_layout(name, dtype, layout):
    eps = torch.finfo(dtype).eps
    # Half precision is rounded once, at the end, by half an eps; before it float32 has its 1e-5:
    # the smallest of these one-entry spheres are 1/100 of the vectors that move them.
    rtol, atol = (eps / 2 + 5e-5, 5e-5) if eps > 1e-6 else (400 * eps, 400 * eps)
    for sphere, shape in (case for case in CASES if layout in layouts(case[1])):
        w, x, m = (torch.randn(shape, dtype=dtype) for _ in range(3))
        # Not next to the antipode, where 1 + cos(angle) in the parallel transport cancels.
        x, m = x + w, geometry.tangent(w, m, sphere)
        # An expanded tensor is constant along dim 0: one of them is enough, two are collinear.
        w, x, m = layout(w), *((x, m) if layout is expanded else (layout(x), layout(m)))
        kept = [z.clone() for z in (w, x, m)]
        got, want = FUNCTIONS[name][0](w, x, m, sphere), oracle(name, sphere, w, x, m)
        say = lambda text, case=(sphere, shape): f"{case}: {text}"  # noqa: E731
        torch.testing.assert_close(got.to(want.dtype), want, rtol=rtol, atol=atol, msg=say)
        assert got.dtype == (torch.float64 if name in NUMBERS else dtype)
        if name not in NUMBERS and w.numel() and layout is not expanded:
            assert strides(got) == strides(torch.empty_like(w)), (sphere, shape)
        assert all(torch.equal(z, k) for z, k in zip((w, x, m), kept, strict=True))


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n not in NUMBERS])
@pytest.mark.parametrize("sphere", ["tensor", "row", "col", "block:2"])
def test_result_lies_in_memory_like_its_argument_when_the_others_do_not(name, sphere):
    shape = (6, 4, 3, 3)
    w, x, m = (channels_last(normal(*shape)), normal(*shape), normal(*shape))
    if name == "tangent":  # its result is like the vector, that of a move like the point
        w, x = x, w
    if name in TRANSPORTS:
        w, m = m, w
    got = FUNCTIONS[name][0](w, x, m, sphere)
    assert got.is_contiguous(memory_format=torch.channels_last)
    plain = FUNCTIONS[name][0](w.contiguous(), x.contiguous(), m.contiguous(), sphere)
    torch.testing.assert_close(got, plain.to(memory_format=torch.channels_last), **EXACT)


def test_bf16_scale_factors_are_not_rounded_to_bf16():
    # Rounded factors put every entry off the same way: the norm was wrong by 2e-3. Rounding the
    # entries, each its own way, averages out to 2**-9 / sqrt(2000) = 4e-5.
    w, t = torch.randn(2000).bfloat16(), torch.randn(2000).bfloat16()
    for move in (geometry.retract, geometry.exp):
        got = geometry.norm(move(w, t))
        torch.testing.assert_close(got, geometry.norm(w), rtol=3e-4, atol=0)


# Laws


@pytest.mark.parametrize("entries", [2, 3, 9])
def test_log_undoes_exp_and_exp_undoes_log(entries):
    w, y, t = points(8, entries)
    r = w.norm(dim=1, keepdim=True)
    # Up to half a turn: to there, and no further, log finds the way it came.
    t = t / t.norm(dim=1, keepdim=True) * r * torch.linspace(0.1, 3.1, 8)[:, None].double()
    torch.testing.assert_close(geometry.exp(w, geometry.log(w, y, "row"), "row"), y, **EXACT)
    # Next to half a turn (3.1 of 3.14 rad) sine divides an error by 0.04.
    got = geometry.log(w, geometry.exp(w, t, "row"), "row")
    torch.testing.assert_close(got, t, rtol=1e-11, atol=1e-11)


def test_log_ignores_the_norm_of_its_target():
    w, y, _ = points(4, 6)
    torch.testing.assert_close(geometry.log(w, 7 * y, "row"), geometry.log(w, y, "row"), **EXACT)


def test_retract_and_exp_ignore_the_radial_part():
    w, _, t = points(4, 6)
    for move in (geometry.retract, geometry.exp):
        torch.testing.assert_close(move(w, t + 0.7 * w, "row"), move(w, t, "row"), **EXACT)


@pytest.mark.parametrize("angle", [1e-2, 1e-3, 1e-4, 1e-5])
def test_angle_keeps_its_digits_in_float32_where_an_arc_cosine_has_none(angle):
    w, t = (torch.randn(1000, dtype=torch.float64) for _ in range(2))
    t = geometry.tangent(w, t)
    y = w + angle * w.norm() * t / t.norm()
    got = geometry.angle(w.float(), y.float())
    # Entries rounded to 6e-8 put unit vectors, whose 1000 roundings are independent, 3e-8 apart.
    torch.testing.assert_close(got.item(), np.arctan(angle), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_angle_goes_from_exactly_zero_to_half_a_turn(dtype):
    w = torch.randn(50, 9, dtype=dtype)
    assert not geometry.angle(w, w, "row").any()
    eps = torch.finfo(dtype).eps
    half = torch.full((50,), torch.pi, dtype=torch.float64)
    torch.testing.assert_close(geometry.angle(w, -2 * w, "row"), half, rtol=4 * eps, atol=0)


# Zero spheres, antipodes

ALL = pytest.mark.parametrize("name", FUNCTIONS)


@ALL
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_spheres_stay_zero_and_leave_the_others_alone(name, dtype):
    w, x, m = (torch.randn(4, 6).to(dtype) for _ in range(3))
    w[0], x[1], w[2], x[2], m[3] = 0, 0, 0, 0, 0
    call = FUNCTIONS[name][0]
    got = call(w, x, m, "row")
    assert got.isfinite().all()
    assert torch.equal(got[3], call(w[3:], x[3:], m[3:], "row")[0])
    # A zero sphere has no radial part to take away, and no way leads to it or from it.
    if name in ("retract", "exp"):
        assert torch.equal(got[:3], w[:3])
    elif name == "tangent":
        assert torch.equal(got[[0, 2]], x[[0, 2]])
        assert not got[1].any()
    elif name in TRANSPORTS:
        # Rescaling multiplies by a ratio of norms, 1 to the rounding.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(got[1:3], m[1:3], rtol=2 * eps, atol=0)
    elif name == "norm":
        assert got[[0, 2]].tolist() == [0, 0]
    else:
        assert not got[:3].any()


@ALL
def test_gradients_are_finite_at_zero_spheres_zero_vectors_and_equal_points(name):
    w, x, m = normal(5, 6), normal(5, 6), normal(5, 6)
    w[0], x[1], w[2], x[2], x[3], m[3], m[4] = 0, 0, 0, 0, w[3], 0, 0
    leaves = [z.requires_grad_() for z in (w, x, m)]
    result = FUNCTIONS[name][0](*leaves, "row")
    for gradient in torch.autograd.grad(result.sum(), leaves, allow_unused=True):
        assert gradient is None or gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("c", [-1, -3, -0.1])
def test_log_of_the_antipode_is_zero_not_stretched_rounding(dtype, c):
    w = torch.randn(20, 7, dtype=dtype)
    assert not geometry.log(w, c * w, "row").any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("how", TRANSPORTS)
def test_transport_to_the_antipode_keeps_the_vector(how, dtype):
    w = torch.randn(20, 7, dtype=dtype)
    m = geometry.tangent(w, torch.randn(20, 7, dtype=dtype), "row")
    got = geometry.transport(w, -3 * w, m, "row", how)
    # Every half circle is a shortest way and carries m elsewhere; staying is as good as any. The
    # rounding of 1 + cos(angle) divides that of <y, m>: some ten eps remain.
    tolerance = 50 * torch.finfo(dtype).eps
    torch.testing.assert_close(got, m, rtol=tolerance, atol=tolerance)


# Derivatives


@ALL
def test_derivatives_are_right(name):
    leaves = [normal(3, 4).requires_grad_() for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *args: FUNCTIONS[name][0](*args, "row"), leaves)


@pytest.mark.parametrize("move", [geometry.retract, geometry.exp])
def test_moves_start_with_the_velocity_asked_for(move):
    w, _, t = points(3, 5)
    start, velocity = torch.func.jvp(lambda s: move(w, s, "row"), (torch.zeros_like(t),), (t,))
    torch.testing.assert_close(start, w, **EXACT)
    torch.testing.assert_close(velocity, t, **EXACT)


@pytest.mark.parametrize("name", ["tangent", "retract", "exp"])
def test_vmap_is_a_loop(name):
    w, x, call = normal(4, 3, 5), normal(4, 3, 5), FUNCTIONS[name][0]
    got = torch.func.vmap(lambda w, x: call(w, x, None, "row"))(w, x)
    want = torch.stack([call(a, b, None, "row") for a, b in zip(w, x, strict=True)])
    torch.testing.assert_close(got, want, **EXACT)


# Random points


def test_random_points_are_uniform():
    # On the sphere in three dimensions every coordinate is uniform on [-r, r] (Archimedes).
    n = 4000
    x = geometry.random((n, 3), "row", 2.0, dtype=torch.float64)
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    for column in x.T:
        gap = ((column.sort().values + 2) / 4 - grid).abs().max()
        # Kolmogorov-Smirnov: 1.95 / sqrt(n) is passed once in a thousand seeds.
        assert gap < 1.95 / n**0.5


@pytest.mark.parametrize(("sphere", "shape"), vectors.SPECS)
def test_random_points_have_the_radius_asked_for(sphere, shape):
    k = len(vectors.masks(shape, sphere))
    radius = torch.linspace(1, 3, k, dtype=torch.float64)
    x = geometry.random(shape, sphere, radius, dtype=torch.float64)
    want = torch.from_numpy(vectors.numbers(vectors.norm, shape, sphere, x.numpy()))
    torch.testing.assert_close(want, radius, **EXACT)


def test_random_follows_its_generator_and_dtype():
    draws = [
        geometry.random((3, 4), generator=torch.Generator().manual_seed(s), dtype=torch.bfloat16)
        for s in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert {x.dtype for x in draws} == {torch.bfloat16}


# Errors

W, FLAT = torch.ones(6, 4), torch.ones(6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: geometry.norm(W, "filter"), "sphere='filter' is not a sphere spec; use 'tensor'"),
        (lambda: geometry.norm(W, "block:4"), "'block:4' needs a dim 0 that 4 divides"),
        (lambda: geometry.norm(FLAT, "row"), "'row' needs two or more dimensions; use 'tensor'"),
        (lambda: geometry.norm(FLAT, "col"), "'col' needs two or more dimensions; use 'tensor'"),
        (lambda: geometry.norm(torch.ones(()), "block:1"), "'block:1' needs a dim 0"),
        (lambda: geometry.tangent(W, W.T, "row"), r"the point has shape \(6, 4\) .* \(4, 6\)"),
        (lambda: geometry.transport(W, W, FLAT), r"the point has shape \(6, 4\) .* \(6,\)"),
        (lambda: geometry.transport(W, W, W, how="slide"), "no transport 'slide'; use one of proj"),
        (lambda: geometry.random((5, 2), "block:2"), "'block:2' needs a dim 0 that 2 divides"),
    ],
)
def test_error_says_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()

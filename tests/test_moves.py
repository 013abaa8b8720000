"""Moves against vector formulas, geoopt, high-precision arithmetic, and their own laws."""

from __future__ import annotations

import geoopt
import mpmath
import numpy as np
import pytest
import torch
from reference import vectors
from torch import Tensor

from sphereopt import products, spheres
from sphereopt.moves import MOVES, NORMALIZED, RADIANS, Gram, coefficients, step_angle

# Ten or so float64 operations on numbers of order one.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
ALL = pytest.mark.parametrize("move", MOVES)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def numbers(w: Tensor, u: Tensor, move: str, lr: float | Tensor, radius: Tensor, sphere: str):
    """Return the Gram and the coefficients of one step."""
    gram = products.gram([spheres.view(w, sphere)], [spheres.view(u, sphere)])
    return gram, *coefficients(move, gram, lr, radius)


def moved(w: Tensor, u: Tensor, move: str, lr: float, radius: Tensor, sphere: str) -> Tensor:
    """Return the new point, shaped like w."""
    _, a, b = numbers(w, u, move, lr, radius, sphere)
    wv, uv, result = spheres.view(w, sphere), spheres.view(u, sphere), torch.empty_like(w)
    spheres.view(result, sphere).copy_(products.combine(a, [wv], b, [uv])[0])
    return result


def one(*entries: float) -> Tensor:
    """Return one sphere with these entries, as a row."""
    return torch.tensor([entries], dtype=torch.float64)


# Against vector formulas


@ALL
@pytest.mark.parametrize(("sphere", "shape"), vectors.SPECS)
@pytest.mark.parametrize("lr", [1e-3, 0.3, 2.5])
def test_move_is_its_vector_formula(move, sphere, shape, lr):
    w, u = normal(*shape), 3 * normal(*shape)
    # A radius of its own for every sphere, none the norm of its weights.
    radius = torch.linspace(0.5, 4, spheres.count(sphere, shape), dtype=torch.float64)
    want = np.empty(shape)
    for mask, r in zip(vectors.masks(shape, sphere), radius.tolist(), strict=True):
        want[mask] = vectors.MOVES[move](w.numpy()[mask], u.numpy()[mask], lr, r)
    got = moved(w, u, move, lr, radius, sphere)
    torch.testing.assert_close(got, torch.from_numpy(want), **EXACT)


def _geoopt_step(move: str, w: Tensor, u: Tensor, lr: float) -> Tensor:
    ball = geoopt.Sphere()
    t = ball.proju(w, u)
    if move == "retract":
        return ball.retr(w, -lr * t)
    if move == "exp":
        return ball.expmap(w, -lr * t)
    if move == "renorm":
        return ball.projx(w - lr * u)
    if move == "hyperball":
        return ball.projx(w - lr * ball.projx(u))
    return ball.expmap(w, -lr * ball.projx(t))


@ALL
@pytest.mark.parametrize("lr", [1e-3, 0.3, 2.5])
def test_move_on_unit_rows_is_geoopts(move, lr):
    w, u = geoopt.Sphere().projx(normal(6, 9)), normal(6, 9)
    got = moved(w, u, move, lr, torch.ones(6, dtype=torch.float64), "row")
    torch.testing.assert_close(got, _geoopt_step(move, w, u, lr), **EXACT)


# Angles


@pytest.mark.parametrize(
    ("move", "angle"),
    [
        ("retract", lambda lr, w, t, u: np.arctan(lr * t / w)),
        ("exp", lambda lr, w, t, u: lr * t / w),
        ("rotate", lambda lr, w, t, u: lr),
    ],
)
@pytest.mark.parametrize("lr", [1e-4, 0.1, 0.7])
def test_angle_is_the_closed_form_of_the_table(move, angle, lr):
    w, u = normal(5, 8), normal(5, 8)
    gram, a, b = numbers(w, u, move, lr, torch.ones(5, dtype=torch.float64), "row")
    rows = zip(w.numpy(), u.numpy(), strict=True)
    norm = vectors.norm
    want = [angle(lr, norm(x), norm(vectors.tangent(x, y)), norm(y)) for x, y in rows]
    torch.testing.assert_close(
        step_angle(gram, a, b), torch.tensor(want, dtype=torch.float64), **EXACT
    )


@pytest.mark.parametrize("lr", [1e-4, 0.1, 0.7])
def test_hyperball_turns_by_atan_lr_if_the_direction_is_tangent(lr):
    gram, a, b = numbers(one(3, 0, 0), one(0, 5, 12), "hyperball", lr, torch.ones(1), "row")
    torch.testing.assert_close(step_angle(gram, a, b).item(), np.arctan(lr), **EXACT)


def _true_angle(w: Tensor, u: Tensor, a: Tensor, b: Tensor) -> float:
    """The angle between w and a*w + b*u, these very floats, in 60 digits."""
    with mpmath.workdps(60):
        x = [mpmath.mpf(v) for v in w.tolist()]
        y = [
            mpmath.mpf(a.item()) * p + mpmath.mpf(b.item()) * q
            for p, q in zip(x, u.tolist(), strict=True)
        ]
        cosine = mpmath.fdot(x, y) / mpmath.sqrt(mpmath.fdot(x, x) * mpmath.fdot(y, y))
        return float(mpmath.acos(cosine))


@ALL
@pytest.mark.parametrize("lr", [1e-3, 0.3, 2.0])
def test_step_angle_is_the_angle(move, lr):
    w, u = normal(1, 12), normal(1, 12)
    gram, a, b = numbers(w, u, move, lr, torch.ones(1), "row")
    torch.testing.assert_close(
        step_angle(gram, a, b).item(), _true_angle(w[0], u[0], a, b), **EXACT
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("angle", [1e-5, 1e-6, 1e-7, 1e-8, 1e-9])
def test_step_angle_keeps_its_digits_where_an_arc_cosine_has_none(angle, dtype):
    w, u = normal(1, 50).to(dtype), normal(1, 50).to(dtype)
    gram, a, b = numbers(w, u, "rotate", angle, torch.ones(1, dtype=torch.float64), "row")
    got, want = step_angle(gram, a, b).item(), _true_angle(w[0], u[0], a, b)
    # Inner products of float32 vectors are summed in float32: some 1e-7.
    assert got == pytest.approx(want, rel=1e-6 if dtype == torch.float32 else 1e-12)
    assert got == pytest.approx(angle, rel=1e-6)


def test_step_angle_passes_a_right_angle_and_a_half_turn():
    gram = Gram(*one(4, 0, 9).T.unbind())
    cosine, sine = one(0, -1, -1)[0], one(-1, -1, 0)[0]
    want = one(np.pi / 2, np.pi - np.arctan(1.5), np.pi)[0]
    torch.testing.assert_close(step_angle(gram, cosine, sine), want, **EXACT)


def test_exp_leaves_retract_at_third_order():
    w, t = normal(1, 9), normal(1, 9)
    r, lrs = w.norm().reshape(1), np.logspace(-1, -3, 9)
    ends = [[moved(w, t, move, lr, r, "row") for lr in lrs] for move in ("exp", "retract")]
    apart = [(x - y).norm().item() for x, y in zip(*ends, strict=True)]
    slope = np.polyfit(np.log(lrs), np.log(apart), 1)[0]
    # theta - atan(theta) = theta**3/3 - theta**5/5: the next order bends the slope by 0.02.
    assert slope == pytest.approx(3, abs=0.1)


# Where there is nowhere to go


@ALL
@pytest.mark.parametrize(
    ("w", "u", "lr"),
    [
        pytest.param(one(3, 4), one(1, 2), 0.0, id="zero-lr"),
        pytest.param(one(3, 4), one(0, 0), 0.5, id="zero-direction"),
        pytest.param(one(0, 0), one(1, 2), 0.5, id="zero-weights"),
        pytest.param(one(0, 0), one(0, 0), 0.0, id="zero-everything"),
    ],
)
def test_no_way_to_go_is_exactly_one_and_zero(move, w, u, lr):
    _, a, b = numbers(w, u, move, lr, torch.full((1,), 7.0, dtype=torch.float64), "row")
    assert (a.item(), b.item()) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("move", "w", "u", "lr"),
    [
        ("renorm", one(2, -4), one(4, -8), 0.5),
        ("hyperball", one(3, 4), one(6, 8), 1.0),
    ],
)
def test_step_into_the_origin_is_exactly_one_and_zero(move, w, u, lr):
    _, a, b = numbers(w, u, move, lr, torch.ones(1, dtype=torch.float64), "row")
    assert (a.item(), b.item()) == (1.0, 0.0)


@pytest.mark.parametrize("lr", [0.3, 1 / 3, 0.7, 1e-3])
def test_step_into_the_origin_up_to_rounding_does_not_shrink_the_weights_to_nothing(lr):
    w = normal(20, 7)
    r = w.norm(dim=1)
    torch.testing.assert_close(moved(w, w / lr, "renorm", lr, r, "row").norm(dim=1), r, **EXACT)


@pytest.mark.parametrize("move", ["retract", "exp", "rotate"])
@pytest.mark.parametrize("sign", [1, -1])
def test_radial_direction_does_not_turn(move, sign):
    w = one(3, 4)
    gram, a, b = numbers(w, sign * 2 * w, move, 0.25, one(10)[0], "row")
    # rotate has no direction to turn in, and stands; the others still set the norm.
    want = w if move == "rotate" else one(6, 8)
    torch.testing.assert_close(a * w + b * sign * 2 * w, want, **EXACT)
    assert step_angle(gram, a, b).item() == 0


@pytest.mark.parametrize("move", ["retract", "exp", "rotate"])
def test_sphere_with_one_entry_has_nowhere_to_turn(move):
    w, u = normal(40, 1), normal(40, 1)
    gram = products.gram([w], [u])
    if move in NORMALIZED:  # these ask for a direction whose tangent part has been formed
        (u,), gram = products.tangent_form([w], [u], gram.ww)
    a, b = coefficients(move, gram, 0.3, w.abs()[:, 0])
    torch.testing.assert_close(a[:, None] * w + b[:, None] * u, w, **EXACT)


def test_renorm_of_one_entry_can_only_change_its_sign():
    w, u = one(1, 1).T, one(1, 3).T
    got = moved(w, u, "renorm", 0.5, torch.ones(2, dtype=torch.float64), "row")
    torch.testing.assert_close(got, one(1, -1).T, **EXACT)


# Numbers in, numbers out


@ALL
def test_numbers_without_dimensions_work(move):
    gram = Gram(*one(4, 1, 3)[0].unbind())
    as_row = Gram(*(x[None] for x in gram))
    r = torch.tensor(2.0, dtype=torch.float64)
    got = coefficients(move, gram, 0.3, r)
    want = coefficients(move, as_row, 0.3, r[None])
    assert [x.shape for x in got] == [(), ()]
    assert [x.item() for x in got] == [x.item() for x in want]
    assert step_angle(gram, *got).item() == step_angle(as_row, *want).item()


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lr_may_be_a_tensor_and_leaves_the_dtype_alone(move, dtype):
    gram = Gram(*one(4, 1, 3)[0].to(dtype).unbind())
    got = coefficients(move, gram, torch.tensor(0.25), gram.ww)  # 0.25 is exact in float32
    want = coefficients(move, gram, 0.25, gram.ww)
    assert [x.dtype for x in got] == [dtype, dtype]
    assert [x.item() for x in got] == [x.item() for x in want]


@ALL
def test_coefficients_have_the_right_derivatives(move):
    w, u = normal(3, 5), normal(3, 5)
    gram = [x.requires_grad_() for x in products.gram([w], [u])]
    lr, r = normal(1).abs().requires_grad_(), normal(3).abs().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda ww, wu, uu, lr, r: coefficients(move, Gram(ww, wu, uu), lr, r), (*gram, lr, r)
    )


@ALL
def test_derivatives_are_finite_where_there_is_nowhere_to_go(move):
    gram = [one(0, 2, 2, 0)[0], one(0, 0, 2, 0)[0], one(3, 0, 2, 0)[0]]
    gram = [x.requires_grad_() for x in gram]
    a, b = coefficients(move, Gram(*gram), 0.5, torch.ones(4, dtype=torch.float64))
    angle = step_angle(Gram(*gram), a, b)
    for x in torch.autograd.grad((a + b + angle).sum(), gram):
        assert x.isfinite().all()


# Laws


@ALL
@pytest.mark.parametrize("c", [0.01, 7.0])
def test_gradient_of_an_invariant_loss_turns_weights_of_any_norm_alike(move, c):
    # At c*w the gradient is u/c; lr in the unit of the gradient must then be c**2 * lr.
    w, u, lr = normal(4, 6), normal(4, 6), 0.3
    r = torch.ones(4, dtype=torch.float64)
    want = moved(w, u, move, lr, r, "row")
    got = moved(c * w, u / c, move, lr if move in RADIANS else c**2 * lr, r, "row")
    torch.testing.assert_close(got, want, **EXACT)


@ALL
@pytest.mark.parametrize("c", [1e-8, 1e8])
def test_only_moves_in_radians_ignore_the_length_of_the_direction(move, c):
    w, u, r = normal(4, 6), normal(4, 6), torch.ones(4, dtype=torch.float64)
    want, got = (moved(w, x, move, 0.3, r, "row") for x in (u, c * u))
    assert torch.allclose(got, want, **EXACT) == (move in RADIANS)


@ALL
def test_new_norm_is_the_radius_whatever_the_old_one(move):
    w, u = normal(4, 6) * one(1e-6, 1e-2, 1, 1e6).T, normal(4, 6)
    r = one(1e-3, 5, 1e-6, 1e3)[0]
    got = moved(w, u, move, 0.3, r, "row").norm(dim=1)
    # The lightest row makes exp turn by 1e6 rad: sine and cosine then agree on ten digits of it.
    torch.testing.assert_close(got, r, rtol=1e-9 if move == "exp" else 1e-12, atol=0)


def test_unknown_move_is_named():
    gram = Gram(*torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"no move 'slide'; the moves are retract, exp, renorm"):
        coefficients("slide", gram, 0.1, torch.ones(1))

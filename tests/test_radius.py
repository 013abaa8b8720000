"""Radius policies against plain steps of plain vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import vectors
from torch import Tensor

from sphereopt import products, spheres
from sphereopt.moves import MOVES, Gram, coefficients
from sphereopt.radius import plain_norm, travel

# Ten or so float64 operations on numbers of order one.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
ALL = pytest.mark.parametrize("move", MOVES)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def one(*entries: float) -> Tensor:
    return torch.tensor([entries], dtype=torch.float64)


def end(trip, w: Tensor, u: Tensor) -> Tensor:
    """Return the new stored point, as the optimizers write it."""
    return trip.keep[:, None] * w + trip.b[:, None] * u


@pytest.mark.parametrize(("sphere", "shape"), vectors.SPECS)
@pytest.mark.parametrize("lr", [0.0, 1e-3, 0.5, 4.0])
def test_plain_norm_is_the_norm_of_the_plain_step(sphere, shape, lr):
    w, u = normal(*shape), normal(*shape)
    gram = products.gram([spheres.view(w, sphere)], [spheres.view(u, sphere)])
    want = vectors.numbers(vectors.norm, shape, sphere, (w - lr * u).numpy())
    torch.testing.assert_close(plain_norm(gram, lr), torch.from_numpy(want), **EXACT)


def test_plain_norm_of_a_step_into_the_origin_is_zero_not_nan():
    w = normal(200, 5)
    norm = plain_norm(products.gram([w], [w / 0.3]), 0.3)
    # The squared norm is the rounding of a difference, of either sign; its root is 1e-8 of |w|.
    assert (norm <= 1e-7 * w.norm(dim=1)).all()


# Fixed


@ALL
def test_fixed_travels_by_the_coefficients_of_the_move(move):
    w, u, r = normal(4, 6), normal(4, 6), torch.linspace(1, 3, 4).double()
    gram = products.gram([w], [u])
    trip = travel(gram, 0.3, move=move, radius=r)
    a, b = coefficients(move, gram, 0.3, r)
    assert torch.equal(trip.a, a)
    assert torch.equal(trip.b, b)
    assert trip.gram == gram
    assert trip.keep is trip.a
    torch.testing.assert_close(trip.norm, end(trip, w, u).norm(dim=1), **EXACT)


@ALL
def test_fixed_leaves_rows_that_do_not_move_bitwise(move):
    w, u = one(3, 4).repeat(3, 1), torch.stack([one(1, 2)[0], one(0, 0)[0], one(1, 2)[0]])
    w[2] = 0
    trip = travel(products.gram([w], [u]), 0.3, move=move, radius=torch.full((3,), 6.0).double())
    assert torch.equal(end(trip, w, u)[1:], w[1:])
    assert trip.norm.tolist() == [6, 6, 6]


# Free


@pytest.mark.parametrize("shrink", [1.0, 0.99, 0.5, -0.2])
def test_free_renorm_walks_with_the_plain_optimizer(shrink):
    plain = 3 * normal(4, 7)
    w = plain / plain.norm(dim=1, keepdim=True) * one(0.1, 1, 2, 50).T
    r, rho, lr = w.norm(dim=1), plain.norm(dim=1), 0.2
    for _ in range(100):
        u = normal(4, 7)
        trip = travel(
            products.gram([w], [u]), lr, move="renorm", radius=r, virtual_radius=rho, shrink=shrink
        )
        w, rho = end(trip, w, u), trip.norm
        plain = torch.from_numpy(shrink * plain.numpy() - lr * u.numpy())
        norm = plain.norm(dim=1)
        # A step that turns by much divides errors by the norm left: a hundred of them, some 1e-14.
        torch.testing.assert_close(rho, norm, **EXACT)
        torch.testing.assert_close(w / r[:, None], plain / norm[:, None], **EXACT)


def test_free_sees_the_believed_weights_not_the_stored_ones():
    w, u, rho = normal(4, 6), normal(4, 6), torch.linspace(1, 9, 4).double()
    believed = 0.9 * rho[:, None] * w / w.norm(dim=1, keepdim=True)
    for move in ("retract", "exp", "renorm"):
        trip = travel(
            products.gram([w], [u]),
            0.3,
            move=move,
            radius=w.norm(dim=1),
            virtual_radius=rho,
            shrink=0.9,
        )
        for got, want in zip(trip.gram, products.gram([believed], [u]), strict=True):
            torch.testing.assert_close(got, want, **EXACT)
        rows = zip(believed.numpy(), u.numpy(), w.norm(dim=1).tolist(), strict=True)
        want = np.stack([vectors.MOVES[move](x, y, 0.3, r) for x, y, r in rows])
        torch.testing.assert_close(end(trip, w, u), torch.from_numpy(want), **EXACT)


def test_free_weight_decay_alone_shrinks_the_believed_norm_and_no_weight():
    w, u = normal(40, 6), torch.zeros(40, 6).double()
    rho = torch.rand(40).double() + 0.1
    trip = travel(
        products.gram([w], [u]),
        0.3,
        move="renorm",
        radius=w.norm(dim=1),
        virtual_radius=rho,
        shrink=0.7,
    )
    assert torch.equal(end(trip, w, u), w)
    torch.testing.assert_close(trip.norm, 0.7 * rho, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_free_sums_a_growth_of_1e_minus_9_a_step(dtype):
    # |w'|**2 = |w|**2 + lr**2 |u|**2 for tangent u: float32 would not see one of these steps.
    steps, growth = 500, 1e-9
    w, u = torch.tensor([[3.0, 4.0]], dtype=dtype), torch.tensor([[-4.0, 3.0]], dtype=dtype)
    gram, rho, lr = products.gram([w], [u]), one(5)[0], (2 * growth) ** 0.5
    for _ in range(steps):
        rho = travel(gram, lr, move="renorm", radius=one(5)[0], virtual_radius=rho).norm
    want = np.expm1(0.5 * np.log1p(steps * 2 * growth))
    # Each step rounds to 1e-16 of its 1e-9.
    assert rho.item() / 5 - 1 == pytest.approx(want, rel=1e-6)


def test_free_zero_weights_stay_zero_and_finite():
    w, u = torch.zeros(2, 3).double(), torch.cat([normal(1, 3), torch.zeros(1, 3)])
    rho = torch.ones(2).double()
    trip = travel(
        products.gram([w], [u]),
        0.3,
        move="renorm",
        radius=torch.zeros(2).double(),
        virtual_radius=rho,
    )
    assert all(x.isfinite().all() for x in (*trip.gram, *trip[1:]))
    assert not end(trip, w, u).any()


@pytest.mark.parametrize("shrink", [0.0, 1.0])
def test_free_believed_norm_of_zero_does_not_erase_the_weights(shrink):
    # lr * weight_decay = 1, or a plain step that ended at the origin: rho is 0, w must stay.
    w, u = one(3, 4), one(1, 2)
    rho = torch.full((1,), 1 - shrink).double()
    trip = travel(
        products.gram([w], [u]),
        0.5,
        move="renorm",
        radius=one(5)[0],
        virtual_radius=rho,
        shrink=shrink,
    )
    assert torch.equal(end(trip, w, u), w)
    torch.testing.assert_close(trip.norm, 0.5 * u.norm(dim=1), **EXACT)


@pytest.mark.parametrize("virtual", [None, 2.0])
def test_numbers_without_dimensions_work(virtual):
    scalars = one(4, 1, 3)[0].unbind()
    r = one(1.5)[0, 0]
    rho = None if virtual is None else torch.tensor(virtual).double()
    got = travel(Gram(*scalars), 0.3, move="renorm", radius=r, virtual_radius=rho)
    want = travel(
        Gram(*(x[None] for x in scalars)),
        0.3,
        move="renorm",
        radius=r[None],
        virtual_radius=None if rho is None else rho[None],
    )
    assert [x.shape for x in got[1:]] == [()] * 4
    for x, y in zip((*got.gram, *got[1:]), (*want.gram, *want[1:]), strict=True):
        assert x.item() == y.item()

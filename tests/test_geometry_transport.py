"""Transport of vectors: against a differential equation, a published formula, and its own laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from geometry_points import EXACT, TRANSPORTS, normal, points
from reference import vectors

from sphereopt import geometry


def _ode(w, y, m, steps=400):
    """Carry m along the great circle from w to y: m' = -<m, v'> v, in numpy, by Runge-Kutta."""
    v, h = vectors.unit(w), vectors.unit(vectors.tangent(w, y))
    theta = vectors.angle(w, y)

    def slope(s, m):
        velocity = np.cos(s) * h - np.sin(s) * v
        return -np.dot(m, velocity) * (np.cos(s) * v + np.sin(s) * h)

    ds = theta / steps
    for s in np.arange(steps) * ds:
        k1 = slope(s, m)
        k2 = slope(s + ds / 2, m + ds / 2 * k1)
        k3 = slope(s + ds / 2, m + ds / 2 * k2)
        m = m + ds / 6 * (k1 + 2 * k2 + 2 * k3 + slope(s + ds, m + ds * k3))
    return m


def _cho_and_lee(w, y, m):
    """Cho and Lee, 2017, eq. 6: turn the part of m along the geodesic, keep the rest."""
    h, theta = vectors.unit(vectors.tangent(w, y)), vectors.angle(w, y)
    return m - np.dot(h, m) * (np.sin(theta) * vectors.unit(w) + (1 - np.cos(theta)) * h)


@pytest.mark.parametrize(
    # Runge-Kutta is off by theta * (theta/400)**4, some 1e-9 of a turn of 2 rad at worst.
    ("oracle", "tolerance"),
    [(_ode, 1e-9), (_cho_and_lee, 1e-12)],
    ids=["ode", "closed"],
)
def test_parallel_transport_solves_its_differential_equation(oracle, tolerance):
    w, y, m = points(5, 6)
    got = geometry.transport(w, y, m, "row")
    rows = zip(w.numpy(), y.numpy(), m.numpy(), strict=True)
    want = torch.from_numpy(np.stack([oracle(*row) for row in rows]))
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_parallel_transport_keeps_lengths_and_angles():
    w, y, m = points(5, 6)
    n = geometry.tangent(w, normal(5, 6), "row")
    moved = [geometry.transport(w, y, x, "row") for x in (m, n)]
    for x, z in ((0, 0), (0, 1), (1, 1)):
        got, want = ((v[x] * v[z]).sum(1) for v in (moved, (m, n)))
        torch.testing.assert_close(got, want, **EXACT)


def test_parallel_transport_carries_the_velocity_of_a_geodesic():
    w, y, _ = points(5, 6)
    there, back = geometry.log(w, y, "row"), geometry.log(y, w, "row")
    torch.testing.assert_close(geometry.transport(w, y, there, "row"), -back, **EXACT)


def test_parallel_transport_returns_what_it_took():
    w, y, m = points(5, 6)
    there = geometry.transport(w, y, m, "row")
    torch.testing.assert_close(geometry.transport(y, w, there, "row"), m, **EXACT)


def test_project_shrinks_the_part_along_the_path_by_the_cosine_and_nothing_else():
    w, y, m = points(5, 6)
    along = geometry.log(w, y, "row")
    cosine = torch.nn.functional.cosine_similarity(w, y, dim=1)
    got = geometry.transport(w, y, along, "row", "project")
    torch.testing.assert_close(got.norm(dim=1), along.norm(dim=1) * cosine.abs(), **EXACT)
    across = m - along * ((along * m).sum(1) / (along * along).sum(1))[:, None]
    torch.testing.assert_close(geometry.transport(w, y, across, "row", "project"), across, **EXACT)


def test_rescale_restores_the_length_project_loses():
    w, y, m = points(5, 6)
    got = geometry.transport(w, y, m, "row", "rescale")
    short = geometry.transport(w, y, m, "row", "project")
    torch.testing.assert_close(got.norm(dim=1), m.norm(dim=1), **EXACT)
    torch.testing.assert_close(
        got / got.norm(dim=1, keepdim=True), short / short.norm(dim=1, keepdim=True), **EXACT
    )
    assert (short.norm(dim=1) < 0.99 * m.norm(dim=1)).any()


@pytest.mark.parametrize("how", TRANSPORTS)
def test_transported_vectors_are_tangent_at_the_new_point(how):
    w, y, m = points(5, 6)
    # Of any norm: only directions count.
    moved = geometry.transport(w, 3 * y, m, "row", how)
    torch.testing.assert_close((moved * y).sum(1), torch.zeros(5).double(), **EXACT)
    assert not torch.allclose(moved, m)


def test_transport_none_is_a_copy():
    w, y, m = points(5, 6)
    got = geometry.transport(w, y, m, "row", "none")
    assert torch.equal(got, m)
    assert got.data_ptr() != m.data_ptr()

"""Moves and maps of the sphere in numpy float64, vector by vector, straight from their formulas.

Nothing here knows views, Grams or coefficients: a sphere is a boolean mask, its entries a vector.
A vector with one entry has no tangent directions, and every function here says so exactly.
"""

from __future__ import annotations

import numpy as np

SPECS = (
    ("tensor", (4, 3)),
    ("row", (5, 7)),
    ("row", (4, 3, 2, 2)),
    ("col", (3, 5)),
    ("col", (3, 4, 2, 2)),
    ("block:3", (6, 4)),
    ("block:2", (8,)),
)


def masks(shape, sphere):
    """Return one boolean mask per sphere."""
    if sphere == "tensor":
        return [np.ones(shape, dtype=bool)]
    label = np.indices(shape)[1 if sphere == "col" else 0]
    count = shape[1 if sphere == "col" else 0]
    if sphere.startswith("block:"):
        count = int(sphere[len("block:") :])
        label = label // max(1, shape[0] // count)
    return [label == i for i in range(count)]


def real(x):
    """Return a float64 array; complex entries become a last axis (real, imaginary)."""
    x = np.asarray(x)
    return np.stack([x.real, x.imag], -1).astype(float) if np.iscomplexobj(x) else x.astype(float)


def numbers(function, shape, sphere, *arrays):
    """Return what a function of vectors gives for every sphere, where that is a number."""
    arrays = [real(x) for x in arrays]
    return np.array([function(*(x[m].ravel() for x in arrays)) for m in masks(shape, sphere)])


def tensor(function, shape, sphere, *arrays):
    """Return what a function of vectors gives for every sphere, where that is a vector."""
    arrays = [real(x) for x in arrays]
    result = np.empty_like(arrays[0])
    for m in masks(shape, sphere):
        result[m] = function(*(x[m].ravel() for x in arrays)).reshape(result[m].shape)
    return result.view(complex)[..., 0] if result.ndim > len(shape) else result


def norm(w):
    return np.sqrt(np.sum(w * w))


def unit(x):
    return x / norm(x) if norm(x) > 0 else np.zeros_like(x)


def tangent(w, x):
    if w.size == 1 and norm(w) > 0:
        return np.zeros_like(x)
    return x - np.dot(unit(w), x) * unit(w)


# Moves: where w goes, given the direction u, the learning rate and the radius.


def move_retract(w, u, lr, radius):
    return radius * unit(w - lr * tangent(w, u))


def move_exp(w, u, lr, radius):
    t = tangent(w, u)
    angle = lr * norm(t) / norm(w)
    return radius * unit(np.cos(angle) * w - np.sin(angle) * norm(w) * unit(t))


def move_renorm(w, u, lr, radius):
    return radius * unit(w - lr * u)


def move_hyperball(w, u, lr, radius):
    return radius * unit(w - lr * norm(w) * unit(u))


def move_rotate(w, u, lr, radius):
    return radius * unit(np.cos(lr) * w - np.sin(lr) * norm(w) * unit(tangent(w, u)))


MOVES = {
    "retract": move_retract,
    "exp": move_exp,
    "renorm": move_renorm,
    "hyperball": move_hyperball,
    "rotate": move_rotate,
}


# Maps: radii are those of the point.


def retract(w, t):
    return norm(w) * unit(w + tangent(w, t))


def exp(w, t):
    t = tangent(w, t)
    if norm(w) == 0:
        return w
    angle = norm(t) / norm(w)
    return np.cos(angle) * w + np.sin(angle) * norm(w) * unit(t)


def angle(w, y):
    if norm(w) == 0 or norm(y) == 0:
        return 0.0
    across = norm(tangent(w, unit(y)))
    return np.arctan2(across, np.dot(unit(w), unit(y)))


def distance(w, y):
    return norm(w) * angle(w, y)


def log(w, y):
    return norm(w) * angle(w, y) * unit(tangent(w, y))


def transport_project(w, y, m):
    return tangent(y, m)


def transport_rescale(w, y, m):
    return norm(m) * unit(tangent(y, m))


def transport_parallel(w, y, m):
    w, y = unit(w), unit(y)
    return m - np.dot(y, m) / (1 + np.dot(w, y)) * (w + y) if np.dot(w, y) > -1 else m

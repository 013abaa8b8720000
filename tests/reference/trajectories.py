"""Sphere optimizers as loops over rows in numpy float64, transcribed from their docstrings.

Slow on purpose, and written without looking at the package's own arithmetic: a row is a 1-d
array, a step is the formula.
"""

import numpy as np


def tangent(w, x):
    return x - (w @ x) / (w @ w) * w


def move(name, w, u, lr, radius):
    """Return the new point, from the vector definition of the move."""
    unit = w / np.linalg.norm(w)
    t = tangent(w, u)
    size = np.linalg.norm(t)
    if name == "retract":
        y = w - lr * t
    elif name == "renorm":
        y = w - lr * u
    elif name == "hyperball":
        y = w - lr * np.linalg.norm(w) * u / np.linalg.norm(u)
    elif name == "exp":
        theta = lr * size / np.linalg.norm(w)
        y = np.cos(theta) * unit - np.sin(theta) * t / size
    elif name == "rotate":
        y = np.cos(lr) * unit - np.sin(lr) * t / size
    else:
        raise AssertionError(name)
    return radius * y / np.linalg.norm(y)


def carry(name, w, y, m):
    """Return the tangent vector m at w carried to y."""
    if name == "none":
        return m
    a, b = w / np.linalg.norm(w), y / np.linalg.norm(y)
    if name == "parallel":
        # In the plane of a and b, rotate by their angle; leave the rest alone.
        side = b - (a @ b) * a
        if np.linalg.norm(side) == 0:
            return m
        side /= np.linalg.norm(side)
        theta = np.arctan2(np.linalg.norm(b - (a @ b) * a), a @ b)
        x, z = a @ m, side @ m
        rest = m - x * a - z * side
        turned_a = np.cos(theta) * a + np.sin(theta) * side
        turned_side = -np.sin(theta) * a + np.cos(theta) * side
        return rest + x * turned_a + z * turned_side
    p = m - (b @ m) * b
    return p if name == "project" else p * np.linalg.norm(m) / np.linalg.norm(p)


class SGD:
    """One row of SphereSGD under radius="fixed"."""

    def __init__(self, w, *, momentum, dampening, nesterov, move, transport):
        self.w, self.radius, self.m = w, np.linalg.norm(w), None
        self.momentum, self.dampening, self.nesterov = momentum, dampening, nesterov
        self.move, self.transport = move, transport

    def step(self, g, lr):
        h = g if self.transport == "none" else tangent(self.w, g)
        if self.m is None:
            self.m = h.copy()
        else:
            self.m = self.momentum * self.m + (1 - self.dampening) * h
        u = h + self.momentum * self.m if self.nesterov else self.m
        y = move(self.move, self.w, u, lr, self.radius)
        self.m = carry(self.transport, self.w, y, self.m)
        self.w = y


class Adam:
    """One row of SphereAdam under radius="fixed"."""

    def __init__(self, w, *, betas, eps, amsgrad, move, transport, second_moment="entry"):
        self.w, self.radius, self.t = w, np.linalg.norm(w), 0
        self.second_moment = second_moment
        self.m, self.v, self.top = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w)
        (self.b1, self.b2), self.eps, self.amsgrad = betas, eps, amsgrad
        self.move, self.transport = move, transport

    def step(self, g, lr):
        self.t += 1
        h = g if self.transport == "none" else tangent(self.w, g)
        self.m = self.b1 * self.m + (1 - self.b1) * h
        square = h * h if self.second_moment == "entry" else np.mean(h * h) * np.ones_like(h)
        self.v = self.b2 * self.v + (1 - self.b2) * square
        self.top = np.maximum(self.top, self.v)
        second = (self.top if self.amsgrad else self.v) / (1 - self.b2**self.t)
        u = self.m / (1 - self.b1**self.t) / (np.sqrt(second) + self.eps)
        y = move(self.move, self.w, u, lr, self.radius)
        self.m = carry(self.transport, self.w, y, self.m)
        self.w = y


class Lion:
    """One row of SphereLion under radius="fixed"."""

    def __init__(self, w, *, betas, move, transport):
        self.w, self.radius, self.m = w, np.linalg.norm(w), np.zeros_like(w)
        (self.b1, self.b2), self.move, self.transport = betas, move, transport

    def step(self, g, lr):
        h = g if self.transport == "none" else tangent(self.w, g)
        u = np.sign(self.b1 * self.m + (1 - self.b1) * h)
        self.m = self.b2 * self.m + (1 - self.b2) * h
        y = move(self.move, self.w, u, lr, self.radius)
        self.m = carry(self.transport, self.w, y, self.m)
        self.w = y

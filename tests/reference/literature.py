"""The published optimizers as loops in numpy float64, transcribed from the papers.

Slow on purpose: a class steps one sphere, a 1-d array, except for AdamP and SGDP, which look at a
whole matrix, and MuonH, which orthogonalizes one.
"""

import numpy as np


def length(x):
    return np.sqrt((x * x).sum())


def looks_invariant(w, g, delta):
    """Return the rows of w that AdamP projects as one, or None: rows, the whole, or nothing."""
    for blocks in ([slice(i, i + 1) for i in range(len(w))], [slice(0, len(w))]):
        cosines = [abs((w[b] * g[b]).sum()) / length(w[b]) / length(g[b]) for b in blocks]
        if max(cosines) < delta / np.sqrt(w[blocks[0]].size):
            return blocks
    return None


def without_radial_part(w, u, blocks, eps):
    u = u.copy()
    for b in blocks or []:
        unit = w[b] / (length(w[b]) + eps)  # the paper has no eps here, the code has
        u[b] -= (unit * u[b]).sum() * unit
    return u


class AdamP:
    def __init__(self, w, *, lr, betas, eps, weight_decay, delta, wd_ratio, nesterov):
        self.w, self.t, self.m, self.v = w, 0, np.zeros_like(w), np.zeros_like(w)
        self.lr, (self.b1, self.b2), self.eps, self.decay = lr, betas, eps, weight_decay
        self.delta, self.ratio, self.nesterov = delta, wd_ratio, nesterov

    def step(self, g):
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        m = self.b1 * self.m + (1 - self.b1) * g if self.nesterov else self.m
        u = m / (np.sqrt(self.v / (1 - self.b2**self.t)) + self.eps) / (1 - self.b1**self.t)
        blocks = looks_invariant(self.w, g, self.delta)
        decay = self.decay * (1 if blocks is None else self.ratio)
        u = without_radial_part(self.w, u, blocks, self.eps)
        self.w = self.w - self.lr * decay * self.w - self.lr * u


class SGDP:
    def __init__(self, w, *, lr, momentum, dampening, weight_decay, delta, wd_ratio, nesterov, eps):
        self.w, self.m, self.lr = w, np.zeros_like(w), lr
        self.momentum, self.dampening, self.nesterov = momentum, dampening, nesterov
        self.decay, self.delta, self.ratio, self.eps = weight_decay, delta, wd_ratio, eps

    def step(self, g):
        """Step as in the paper: the buffer is not projected."""
        self.m = self.momentum * self.m + (1 - self.dampening) * g
        u = g + self.momentum * self.m if self.nesterov else self.m
        blocks = looks_invariant(self.w, g, self.delta)
        decay = self.decay / (1 - self.momentum) * (1 if blocks is None else self.ratio)
        u = without_radial_part(self.w, u, blocks, self.eps)
        self.w = self.w - self.lr * decay * self.w - self.lr * u


class AdamH:
    def __init__(self, w, *, lr, betas, eps):
        self.w, self.radius, self.t = w, length(w), 0
        self.m, self.v, self.lr, (self.b1, self.b2), self.eps = 0 * w, 0 * w, lr, betas, eps

    def step(self, g):
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        u = self.m / (1 - self.b1**self.t) / (np.sqrt(self.v / (1 - self.b2**self.t)) + self.eps)
        y = self.w - self.lr * self.radius * u / length(u)
        self.w = self.radius * y / length(y)


class MuonH:
    def __init__(self, w, *, lr, momentum, nesterov, ns_eps):
        self.w, self.m, self.radius = w, np.zeros_like(w), length(w)
        self.lr, self.momentum, self.nesterov, self.eps = lr, momentum, nesterov, ns_eps

    def step(self, g):
        self.m = self.momentum * self.m + g
        h = g + self.momentum * self.m if self.nesterov else self.m
        # The iteration acts on singular values alone: s <- a s + b s^3 + c s^5.
        left, s, right = np.linalg.svd(h, full_matrices=False)
        s, (a, b, c) = s / (length(h) + self.eps), (3.4445, -4.7750, 2.0315)
        for _ in range(5):
            s = a * s + b * s**3 + c * s**5
        u = left @ np.diag(s) @ right
        y = self.w - self.lr * self.radius * u / length(u)
        self.w = self.radius * y / length(y)


class Rotational:
    """One neuron under the rotational wrapper; subclasses give update and angle."""

    def __init__(self, w, *, zero_mean, undf, rotational_eps):
        if zero_mean:
            centered = w - w.mean()
            w = centered * length(w) / length(centered)
        self.w, self.radius, self.zero_mean, self.undf = w, length(w), zero_mean, undf
        self.t, self.mean_square, self.rotational_eps = 0, 0.0, rotational_eps

    def step(self, g):
        self.t += 1
        u = self.update(g)
        if self.zero_mean:
            u = u - u.mean()
        u = u - (u @ self.w) / self.radius**2 * self.w
        self.mean_square = self.undf * self.mean_square + (1 - self.undf) * (u @ u)
        size = np.sqrt(self.mean_square / (1 - self.undf**self.t)) + self.rotational_eps
        y = self.w - self.angle * self.radius * u / size
        self.w = self.radius * y / length(y)


class RotationalAdamW(Rotational):
    def __init__(self, w, *, lr, betas, weight_decay, eps, **more):
        super().__init__(w, **more)
        self.m, self.v, (self.b1, self.b2), self.eps = 0 * w, 0 * w, betas, eps
        self.angle = np.sqrt(2 * lr * weight_decay * (1 - self.b1) / (1 + self.b1))

    def update(self, g):
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        root = np.sqrt(self.v / (1 - self.b2**self.t)) + self.eps
        return self.m / (1 - self.b1**self.t) / root


class RotationalSGD(Rotational):
    def __init__(self, w, *, lr, momentum, nesterov, weight_decay, **more):
        super().__init__(w, **more)
        self.m, self.momentum, self.nesterov = 0 * w, momentum, nesterov
        self.angle = np.sqrt(2 * lr * weight_decay / (1 + momentum))

    def update(self, g):
        self.m = self.momentum * self.m + g
        return g + self.momentum * self.m if self.nesterov else self.m


class Lion:
    def __init__(self, w, *, lr, betas, weight_decay):
        self.w, self.m, self.lr, self.decay = w, 0 * w, lr, weight_decay
        self.b1, self.b2 = betas

    def update(self, g):
        c = self.b1 * self.m + (1 - self.b1) * g
        self.m = self.b2 * self.m + (1 - self.b2) * g
        return np.sign(c)

    def step(self, g):
        self.w = self.w - self.lr * (self.update(g) + self.decay * self.w)


class RotationalLion(Rotational):
    def __init__(self, w, *, lr, betas, weight_decay, **more):
        super().__init__(w, **more)
        self.lion, (b1, b2) = Lion(w, lr=lr, betas=betas, weight_decay=weight_decay), betas
        spread = (1 - b1) ** 2 + b1**2 * (1 - b2) / (1 + b2)
        self.angle = np.sqrt(np.pi / 2) * np.sqrt(2 * lr * weight_decay) * np.sqrt(spread)

    def update(self, g):
        return self.lion.update(g)


class AdamS:
    def __init__(self, w, *, lr, betas, eps, weight_decay, carries=False):
        self.w, self.m, self.v, self.t = w, 0 * w, 0.0, 0
        self.lr, (self.b1, self.b2), self.eps, self.l2 = lr, betas, eps, weight_decay
        self.carries = carries

    def step(self, g):
        self.t += 1
        g = g + self.l2 * self.w
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * (g @ g) / len(g)  # the paper's mean square
        # The code sums where the paper averages: its eps counts for 1/sqrt(n) here.
        root = np.sqrt(self.v / (1 - self.b2**self.t)) + self.eps / np.sqrt(len(g))
        old, self.w = self.w, self.w - self.lr * self.m / (1 - self.b1**self.t) / root
        if self.carries:
            # Transport in the plane of both points, then the ratio of norms.
            a, b = old / length(old), self.w / length(self.w)
            ratio = length(old) / length(self.w)
            damped = (self.w @ self.w) / (self.w @ self.w + self.eps)
            self.m = ((a @ b) * self.m - (self.m @ b) * a) * ratio * damped
            self.v *= ratio**2 * damped


class SGDG:
    def __init__(self, w, *, lr, momentum, grad_clip):
        self.w, self.lr, self.momentum, self.clip = w, lr, momentum, grad_clip
        self.d = 0 * w

    def gradient(self, y, g):
        h = g - (y @ g) * y
        return h if self.clip is None or length(h) <= self.clip else h * self.clip / length(h)

    def step(self, g):
        y = self.w / length(self.w)
        d = self.momentum * self.d - self.lr * self.gradient(y, g)
        theta, u = length(d), d / length(d)
        self.w = np.cos(theta) * y + np.sin(theta) * u
        self.d = theta * (np.cos(theta) * u - np.sin(theta) * y)


class AdamG(SGDG):
    def __init__(self, w, *, lr, momentum, beta2, eps, grad_clip):
        super().__init__(w, lr=lr, momentum=momentum, grad_clip=grad_clip)
        self.m, self.v, self.t, self.beta2, self.eps = 0 * w, 0.0, 0, beta2, eps

    def step(self, g):
        self.t += 1
        y = self.w / length(self.w)
        h = self.gradient(y, g)
        self.m = self.momentum * self.m + (1 - self.momentum) * h
        self.v = self.beta2 * self.v + (1 - self.beta2) * (h @ h)
        alpha = np.sqrt(1 - self.beta2**self.t) / (1 - self.momentum**self.t)
        d = -self.lr * alpha * self.m / np.sqrt(self.v + self.eps)
        theta, u = length(d), d / length(d)
        self.w = np.cos(theta) * y + np.sin(theta) * u
        # Rotate the part along u in the plane of y and u; the rest stays.
        along = self.m @ u
        self.m = self.m - along * u + along * (np.cos(theta) * u - np.sin(theta) * y)

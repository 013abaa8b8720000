"""Scale-invariant blocks under pure noise, stepped by real optimizers.

Gradients are orthogonal to their block, of size ``grad_norm / |w|``, and otherwise random: what the
formulas of ``sphereopt.theory`` assume, and nothing else that they say. Weights are measured, never
computed: the angle is that between the weights before and after ``optimizer.step()``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

import sphereopt as so


@dataclass(frozen=True)
class Case:
    """An optimizer with its options, and how large its block is."""

    label: str
    optimizer: str
    lr: float
    weight_decay: float
    hyper: Mapping[str, Any] = field(default_factory=dict)
    dim: int = 256
    grad_norm: float = 1.0
    steps: int = 400

    @property
    def sized(self) -> dict[str, Any]:
        """What the theory must know of the block."""
        return {"dim": self.dim, "grad_norm": self.grad_norm, **self.hyper}

    @property
    def tolerance(self) -> float:
        """What the theory promises: it approximates what sign and Newton-Schulz make of noise.

        And a large eps: in the first steps it takes most from entries of small gradients.
        """
        return 0.02 if self.optimizer in ("lion", "muon") or "eps" in self.hyper else 0.01


@dataclass(frozen=True)
class Measured:
    """Root mean squares over blocks: norm after each step, and its angle; (steps, starts)."""

    norm: np.ndarray
    angle: np.ndarray


def _muon(label: str, shape: tuple[int, int], **hyper: Any) -> Case:
    hyper["shape"] = shape
    return Case(label, "muon", 5e-3, 1.0, hyper, dim=shape[0] * shape[1], steps=300)


#: lr * weight_decay is as large as the optimizer's memory allows, so that runs are short: with a
#: momentum of 0.9 the direction of SGD starts to oscillate at 2.6e-3.
CASES = (
    Case("sgd", "sgd", 0.1, 0.05),
    Case("sgd, momentum 0.9", "sgd", 0.1, 0.01, {"momentum": 0.9}),
    Case("sgd, momentum 0.5", "sgd", 0.1, 0.03, {"momentum": 0.5}),
    Case("sgd, dampening 0.5", "sgd", 0.1, 0.01, {"momentum": 0.9, "dampening": 0.5}),
    Case("nesterov 0.9", "sgd", 0.1, 0.01, {"momentum": 0.9, "nesterov": True}),
    Case("nesterov 0.5", "sgd", 0.1, 0.03, {"momentum": 0.5, "nesterov": True}),
    Case("sgdw", "sgdw", 0.1, 0.05, {"momentum": 0.9}),
    Case("sgdw, nesterov", "sgdw", 0.1, 0.05, {"momentum": 0.9, "nesterov": True}),
    Case("adam (L2)", "adam", 5e-3, 0.05, {"betas": (0.9, 0.99)}),
    Case("adamw (0.9, 0.999)", "adamw", 5e-3, 1.0, {"betas": (0.9, 0.999)}),
    Case("adamw (0.9, 0.95)", "adamw", 5e-3, 1.0, {"betas": (0.9, 0.95)}),
    Case("adamw (0, 0.95)", "adamw", 5e-3, 1.0, {"betas": (0.0, 0.95)}),
    Case("adamw, eps 0.05", "adamw", 5e-3, 1.0, {"betas": (0.9, 0.99), "eps": 0.05}),
    Case("sign", "sign", 5e-3, 1.0),
    Case("signum", "signum", 5e-3, 1.0, {"momentum": 0.9}),
    Case("lion", "lion", 2e-3, 1.0, {"betas": (0.9, 0.99)}, steps=1000),
    Case("lion (0.95, 0.98)", "lion", 2e-3, 1.0, {"betas": (0.95, 0.98)}, steps=1000),
    _muon("muon, square", (64, 64)),
    _muon("muon, square, plain", (64, 64), nesterov=False),
    _muon("muon, tall, match_rms", (128, 32), adjust_lr_fn="match_rms_adamw"),
    _muon("muon, wide", (32, 128)),
)
CASE = {case.label: case for case in CASES}
#: Three times the norm must still leave Adam's L2 a small part of the gradient: slower.
TRAVELLED = tuple(
    replace(case, lr=1e-3, weight_decay=0.01, steps=1000) if case.optimizer == "adam" else case
    for case in CASES
)


def make(case: Case, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the real optimizer; torch has no sign, signum and Lion, which are one family."""
    hyper = dict(case.hyper)
    common: dict[str, Any] = {"lr": case.lr, "weight_decay": case.weight_decay}
    if case.optimizer == "sgd":
        return torch.optim.SGD(params, **common, **hyper)
    if case.optimizer == "sgdw":
        return torch.optim.SGD(params, lr=case.lr, **hyper)
    if case.optimizer == "adam":
        return torch.optim.Adam(params, **common, **hyper)
    if case.optimizer == "adamw":
        return torch.optim.AdamW(params, **common, **hyper)
    if case.optimizer == "muon":
        del hyper["shape"]
        return torch.optim.Muon(params, **common, **hyper)
    if case.optimizer != "lion":
        momentum = hyper.get("momentum", 0.0)
        # A buffer that is not looked at must still be told how to average.
        hyper = {"betas": (momentum, momentum or 0.5)}
    return so.SphereLion(params, **common, **hyper)


class RandomWalk:
    """Blocks of one optimizer, started at several norms.

    Args:
        case: The optimizer.
        norms: Norms to start from.
        blocks: Number of blocks for each of them.
        seed: Of weights and gradients.

    Entries are independent but for the block's norm, so that the noise of a measured norm or angle
    is about ``1 / sqrt(2 * blocks * dim)`` of it at each step.
    """

    def __init__(self, case: Case, norms: Sequence[float], *, blocks: int, seed: int = 0) -> None:
        self.case, self.starts = case, len(norms)
        self.generator = torch.Generator().manual_seed(seed)
        start = torch.randn(len(norms), blocks, case.dim, generator=self.generator)
        start *= torch.tensor(norms)[:, None, None] / start.norm(dim=2, keepdim=True)
        self.weights = start.reshape(-1, case.dim)
        shape = case.hyper.get("shape")
        # Parameters look into one tensor, so that many small ones are measured at once.
        views = [self.weights] if shape is None else [w.view(shape) for w in self.weights]
        self.params = [nn.Parameter(view) for view in views]
        self.optimizer = make(case, self.params)

    @torch.no_grad()
    def step(self, lr: float) -> tuple[np.ndarray, np.ndarray]:
        """Step once; return squared norms and squared angles, averaged over blocks; (starts,)."""
        w = self.weights
        square = (w * w).sum(1, keepdim=True)
        noise = torch.randn(w.shape, generator=self.generator)
        noise -= (noise * w).sum(1, keepdim=True) / square * w
        noise *= self.case.grad_norm / (square.sqrt() * noise.norm(dim=1, keepdim=True))
        if len(self.params) == 1:
            self.params[0].grad = noise
        else:
            for p, g in zip(self.params, noise, strict=True):
                p.grad = g.view(p.shape)
        before = w.clone()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.case.optimizer == "sgdw":
            w.mul_(1 - lr * self.case.weight_decay)
        self.optimizer.step()
        # From the difference: 1 - cos of small angles would be lost in float32.
        change = w - before
        ahead = (change * before).sum(1, keepdim=True) / square.sqrt()
        across = ((change * change).sum(1, keepdim=True) - ahead**2).sqrt()
        angle = torch.atan2(across, square.sqrt() + ahead)
        return self._mean((w * w).sum(1)), self._mean(angle**2)

    def run(self, rates: Iterable[float]) -> Measured:
        """Step once for every learning rate."""
        squares = [self.step(float(lr)) for lr in rates]
        norm, angle = (np.sqrt(np.array(column)) for column in zip(*squares, strict=True))
        return Measured(norm, angle)

    def forgetting(self, lag: int, times: int) -> float:
        """Return how fast directions are forgotten: ``-log(cos(lag)) / lag``, averaged.

        From ``lag`` to twice as much: momentum shifts the first steps.
        """
        near, far = [], []
        for _ in range(times):
            start = self._directions()
            self.run([self.case.lr] * lag)
            near.append((self._directions() * start).sum(1).mean().item())
            self.run([self.case.lr] * lag)
            far.append((self._directions() * start).sum(1).mean().item())
        return math.log(sum(near) / sum(far)) / lag

    def _directions(self) -> torch.Tensor:
        return self.weights / self.weights.norm(dim=1, keepdim=True)

    def _mean(self, x: torch.Tensor) -> np.ndarray:
        return x.double().reshape(self.starts, -1).mean(1).numpy()


def smooth(angle: np.ndarray, window: int = 20) -> np.ndarray:
    """Return root mean squares in windows of steps, (steps - window + 1, ...).

    Angles of neighbouring steps share the momentum buffer, so that their noise is one and the same
    for some ``1 / (1 - momentum)`` steps; the theory's are averaged alike.
    """
    total = np.cumsum(np.concatenate([np.zeros_like(angle[:1]), angle**2]), axis=0)
    return np.sqrt((total[window:] - total[:-window]) / window)

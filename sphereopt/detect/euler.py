"""Euler's test: the products ``w * df/dw`` sum to zero over every sphere.

If ``f(c*w_S) = f(w_S)`` for all ``c > 0`` then, differentiating at ``c = 1``,
``sum_S w * df/dw = 0`` (Euler's theorem for degree 0). Conversely a piecewise analytic f whose sum
vanishes at a point drawn from a density is invariant on that analytic piece with probability 1. One
backward tests all spheres of all parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor

from sphereopt.spheres import count

from .twin import Twin

# c(S) <= TOLERANCE passes. Rounding leaves 1e-17 to 1e-11 on true spheres, while false ones reach
# 1e-4 and more on the worst of three probes; the tolerance lies in the middle of that gap.
TOLERANCE = 1e-8
# Entries whose |w * df/dw| is this far below the typical one are rounding, not signal.
_NOISE = 1e-9


@final
@dataclass(frozen=True)
class Sums:
    """Signed sums of ``w * df/dw`` over some sets of entries, and the sums of its absolute value.

    Attributes:
        signed: shape (number of sets,), float64, on the CPU.
        mass: the same with absolute values.
    """

    signed: Tensor
    mass: Tensor

    @classmethod
    def of(cls, p: Tensor, magnitude: Tensor, dims: Sequence[int]) -> Sums:
        """Sum ``p`` and its absolute value over ``dims``."""
        over = tuple(dims)
        return cls(p.sum(over).reshape(-1).cpu(), magnitude.sum(over).reshape(-1).cpu())

    def plus(self, other: Sums) -> Sums:
        """Return the sums over both."""
        return Sums(self.signed + other.signed, self.mass + other.mass)

    def grouped(self, k: int) -> Sums:
        """Join consecutive sets to ``k`` larger ones."""
        return Sums(self.signed.reshape(k, -1).sum(1), self.mass.reshape(k, -1).sum(1))


@final
@dataclass(frozen=True)
class Probe:
    """One backward, reduced to sums.

    Attributes:
        sums: name -> spec ("tensor", and for matrices "row" and "col") -> sums.
        typical: median over the parameters of the mean ``|w * df/dw|`` of an entry.
    """

    sums: Mapping[str, Mapping[str, Sums]]
    typical: float

    def of(self, name: str, spec: str) -> Sums | None:
        """Return the sums of one parameter over the spheres of ``spec``, if a gradient came."""
        sums = self.sums.get(name)
        if sums is None:
            return None
        if spec.startswith("block:"):
            return sums["row"].grouped(int(spec.removeprefix("block:")))
        return sums[spec]


@final
@dataclass(frozen=True)
class Reading:
    """c(S) of the spheres of one parameter under one spec.

    Attributes:
        ratio: shape (spheres,), the largest over the probes that observed the sphere.
        seen: shape (spheres,), whether any probe observed it.
    """

    ratio: Tensor
    seen: Tensor

    @property
    def worst(self) -> float:
        """The largest c(S)."""
        return float(self.ratio.max())


def take_probe(twin: Twin, seed: int, *, eps: float | None, dropout: bool = False) -> Probe:
    """Run one forward and backward at the twin's present point and reduce every gradient.

    Args:
        twin: the float64 copy, already placed.
        seed: for the model's randomness and the random cotangent of every output.
        eps: the normalization eps, or ``None`` for the model's own.
        dropout: whether dropout modules drop.

    Raises:
        ValueError: if no output depends on a parameter.
    """
    sums: dict[str, dict[str, Sums]] = {}
    gen = torch.Generator().manual_seed(seed)
    with twin.session(seed, eps=eps, dropout=dropout), _reducing(twin, sums):
        outs = [t for t in twin.outputs() if t.requires_grad]
        if not outs:
            raise ValueError(
                "no output of the model depends on its parameters through autograd; is the forward "
                "under no_grad or its result detached?"
            )
        cotangents = [
            torch.randn(t.shape, generator=gen, dtype=torch.float64).to(t.device, t.dtype)
            for t in outs
        ]
        # Activation checkpointing runs the forward again in here and must find the same arithmetic.
        # Given tensors, backward is itself a function that the mode handles, and a mode is off
        # while its handler runs; given graph edges it is not.
        edges = [torch.autograd.graph.get_gradient_edge(t) for t in outs]
        torch.autograd.backward(edges, cotangents)
    means = torch.tensor(
        [float(s["tensor"].mass) / twin.params[n].numel() for n, s in sums.items()]
    )
    # Median of those that carry signal, or inert biases and frozen branches would set the scale.
    live = means[means > _NOISE * means.max()] if len(means) else means
    return Probe(sums, float(live.median()) if len(live) else 0.0)


@contextmanager
def _reducing(twin: Twin, sums: dict[str, dict[str, Sums]]) -> Iterator[None]:
    """Reduce each gradient as soon as it is complete, so that they never exist all at once."""

    def reduce(name: str, p: Tensor) -> None:
        if p.grad is None:
            return
        grad = p.grad.to_dense() if p.grad.layout is not torch.strided else p.grad
        product = p.detach() * grad
        p.grad = None
        magnitude, dims = product.abs(), range(product.ndim)
        new = {"tensor": Sums.of(product, magnitude, dims)}
        if product.ndim > 1:
            new["row"] = Sums.of(product, magnitude, dims[1:])
            new["col"] = Sums.of(product, magnitude, [d for d in dims if d != 1])
        # Re-entrant activation checkpointing delivers a gradient in parts.
        old = sums.get(name)
        sums[name] = new if old is None else {key: old[key].plus(new[key]) for key in new}

    handles = [
        p.register_post_accumulate_grad_hook(partial(reduce, name))  # type: ignore[no-untyped-call]
        for name, p in twin.params.items()
        if p.numel()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        twin.module.zero_grad(set_to_none=True)


def read(probes: Sequence[Probe], name: str, shape: Sequence[int], spec: str) -> Reading:
    """Evaluate c(S) for every sphere of one parameter."""
    k = count(spec, shape)
    entries = max(torch.Size(shape).numel() // k, 1)
    ratio = torch.zeros(k, dtype=torch.float64)
    seen = torch.zeros(k, dtype=torch.bool)
    for probe in probes:
        sums = probe.of(name, spec)
        if sums is None:
            continue
        observed = sums.mass > _NOISE * probe.typical * entries
        c = sums.signed.abs() / sums.mass.clamp_min(torch.finfo(torch.float64).tiny)
        ratio = torch.maximum(ratio, torch.where(observed, c, 0.0))
        seen |= observed
    return Reading(ratio, seen)


def candidates(shape: Sequence[int]) -> list[str]:
    """Return the sphere specs a parameter of this shape may have, finest first.

    Spheres of a single entry are left out: a direction that cannot turn is no sphere.
    """
    if len(shape) < 2:
        return []
    n, rows, cols = torch.Size(shape).numel(), shape[0], shape[1]
    blocks = [k for k in range(rows - 1, 1, -1) if rows % k == 0]
    specs = ["row", *(["col"] if cols > 1 else []), *(f"block:{k}" for k in blocks), "tensor"]
    return [spec for spec in specs if n // count(spec, shape) > 1]

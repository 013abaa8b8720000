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

from .claims import Claim
from .ideal import Precision
from .twin import Twin


@final
@dataclass(frozen=True)
class Probe:
    """One backward, reduced to sums.

    Attributes:
        sums: Name -> dim (0, and 1 for matrices) -> sums over the indices of that dim, shape
            (4, size): of ``p = w * df/dw``, of ``|p|``, of ``w**2``, and the number of entries.
        grads: Name -> norm of the gradient, where that was asked for.
        typical: Median over the parameters of the mean ``|w * df/dw|`` of an entry.
        precision: Of the run.
        outputs: What the run returned, to compare others with.
    """

    sums: Mapping[str, Mapping[int, Tensor]]
    grads: Mapping[str, float]
    typical: float
    precision: Precision
    outputs: list[Tensor]

    def pulls(self, name: str) -> bool:
        """Return whether a gradient, if it was measured, is more than rounding."""
        own = self.grads.get(name, 0.0)
        return own > self.precision.noise * max(self.grads.values(), default=0.0)


@final
@dataclass(frozen=True)
class Reading:
    """c(S) of the spheres of a claim.

    Attributes:
        ratio: Shape (spheres,), the largest over the probes that observed the sphere.
        seen: Shape (spheres,), whether any probe observed it.
        radial: Shape (spheres,), the largest ``(<w,g> / |w|)**2``.
    """

    ratio: Tensor
    seen: Tensor
    radial: Tensor

    @property
    def worst(self) -> float:
        """The largest c(S)."""
        return float(self.ratio.max()) if len(self.ratio) else 0.0


def take_probe(
    twin: Twin, seed: int, *, eps: float | None, dropout: bool = False, radial: bool = False
) -> Probe:
    """Run one forward and backward at the twin's present point and reduce every gradient.

    Args:
        twin: The copy, already placed.
        seed: For the model's randomness and the random cotangent of every output.
        eps: The normalization eps, or ``None`` for the model's own.
        dropout: Whether dropout modules drop.
        radial: Also measure what the radial share of a gradient takes.

    Raises:
        ValueError: If no output depends on a parameter.
    """
    sums: dict[str, dict[int, Tensor]] = {}
    grads: dict[str, float] = {}
    gen = torch.Generator().manual_seed(seed)
    with (
        twin.session(seed, eps=eps, dropout=dropout),
        _reducing(twin, sums, grads if radial else None),
    ):
        outputs = twin.outputs()
        kept = [t.detach().clone() for t in outputs]
        outs = [t for t in outputs if t.requires_grad]
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
        del outputs, outs
        torch.autograd.backward(edges, cotangents)
    noise = twin.precision.noise
    means = torch.tensor([float(s[0][1].sum() / s[0][3].sum()) for n, s in sums.items()])
    # Median of those that carry signal, or inert biases and frozen branches would set the scale.
    live = means[means > noise * means.max()] if len(means) else means
    typical = float(live.median()) if len(live) else 0.0
    return Probe(sums, grads, typical, twin.precision, kept)


@contextmanager
def _reducing(
    twin: Twin, sums: dict[str, dict[int, Tensor]], grads: dict[str, float] | None
) -> Iterator[None]:
    """Reduce each gradient as soon as it is complete, so that they never exist all at once."""

    def reduce(name: str, p: Tensor) -> None:
        if p.grad is None:
            return
        grad = p.grad.to_dense() if p.grad.layout is not torch.strided else p.grad
        p.grad = None
        if grads is not None:
            grads[name] = grads.get(name, 0.0) + float(grad.norm())
        new = _sums(p.detach(), grad, squares=grads is not None)
        for dim, old in sums.get(name, {}).items():
            # Re-entrant activation checkpointing delivers a gradient in parts.
            new[dim][:2] += old[:2]
        sums[name] = new

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


def _sums(w: Tensor, grad: Tensor, *, squares: bool) -> dict[int, Tensor]:
    """Reduce a gradient, and use it up."""
    product = grad.mul_(w)
    reduced = [_by_dim(product), _by_dim(product.abs_())]
    reduced.append(_by_dim(w * w) if squares else [torch.zeros_like(x) for x in reduced[0]])
    sums = {}
    for dim, parts in enumerate(zip(*reduced, strict=True)):
        size = torch.full_like(parts[0], w.numel() // parts[0].numel())
        sums[dim] = torch.stack([*parts, size]).double().cpu()
    return sums


def _by_dim(x: Tensor) -> list[Tensor]:
    # Convolution kernels are summed first: what is left is small.
    x = x.flatten(2).sum(2) if x.ndim > 2 else x
    return [x.sum(1), x.sum(0)] if x.ndim > 1 else [x.reshape(-1).clone()]


def read(probes: Sequence[Probe], claim: Claim) -> Reading:
    """Evaluate c(S) for every sphere of a claim, over all its members."""
    k = claim.count
    ratio, radial = torch.zeros(k, dtype=torch.float64), torch.zeros(k, dtype=torch.float64)
    seen = torch.zeros(k, dtype=torch.bool)
    for probe in probes:
        totals = torch.zeros(4, k, dtype=torch.float64)
        for name, part in claim.parts.items():
            if name in probe.sums:
                totals += part.sums(probe.sums[name][part.axis])
        signed, mass, square, entries = totals
        observed = mass > probe.precision.noise * probe.typical * entries
        tiny = torch.finfo(torch.float64).tiny
        c = signed.abs() / mass.clamp_min(tiny)
        ratio = torch.maximum(ratio, torch.where(observed, c, 0.0))
        radial = torch.maximum(radial, signed.square() / square.clamp_min(tiny))
        seen |= observed
    return Reading(ratio, seen, radial)

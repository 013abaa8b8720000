"""The certificate: rescale the claimed spheres and see that the outputs stay.

Euler's test sees derivatives only. Rescaling also sees scales that leave autograd (``.item()``,
numpy) and, with large factors, kinks that the example input never reached (ReLU6, clamp, Python
branches).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sphereopt import spheres

from .twin import NotFiniteError, Twin, hash_seed

# Relative to the largest output. Exact invariance leaves 1e-15 to 1e-12 in float64 (rounding of
# each layer, amplified by depth); a wrong claim moves the outputs by its share of the function.
# A single row deep in a network may have a share of 1e-11: telling those is the Euler test's work.
TOLERANCE = 1e-9
# For large factors on all claims at once: each rescaled layer before one norm can sink the signal
# by 1e-3 below the biases between them, which costs three digits. A kink moves far more than this.
_JOINT_FAR_TOLERANCE = 1e-6
# Far below TINY_EPS, because a chain of k rescaled layers before one norm scales its variance by
# 1e-6**k; a forward alone does not mind the huge 1/sqrt(eps) that a gradient would.
_EPS = 1e-100
# Common factors that carry activations across kinks which factors near 1 do not reach.
_AMPLITUDES = (1e-3, 1e3)


@final
@dataclass(frozen=True)
class Certificate:
    """Outcome of rescaling.

    Attributes:
        joint: relative output change with all certified spheres rescaled at once by independent
            factors in [1/3, 3].
        refuted: name -> relative output change, of the parameters that did not stand.
    """

    joint: float
    refuted: Mapping[str, float]


def certify(twin: Twin, specs: Mapping[str, str], seed: int, spread: float) -> Certificate:
    """Certify all claims at once and, should that fail, find out which are wrong.

    Args:
        twin: the float64 copy; left at the generic point of ``seed``.
        specs: name -> sphere spec of the claims.
        seed: for the point, the factors and the model's randomness.
        spread: how far the point is from the weights, as in ``Twin.place``.
    """
    if not specs:
        return Certificate(0.0, {})
    trial = _Trial(twin, seed, spread)
    joint = trial.jointly(specs)
    if joint is not None:
        return Certificate(joint, {})
    refuted = {}
    for name, spec in specs.items():
        error = max(trial.near({name: spec}), trial.far({name: spec}))
        if error > TOLERANCE:
            refuted[name] = error
    kept = {name: spec for name, spec in specs.items() if name not in refuted}
    if trial.jointly(kept) is None:
        # Each is right alone: add one at a time, and refute those that spoil what stood before.
        claims, kept = kept, {}
        for name, spec in claims.items():
            grown = {**kept, name: spec}
            if trial.jointly(grown) is None:
                refuted[name] = max(trial.near(grown), trial.far(grown))
            else:
                kept = grown
    return Certificate(trial.near(kept), refuted)


@final
class _Trial:
    """Compares outputs before and after rescaling, at one point and with one RNG state."""

    def __init__(self, twin: Twin, seed: int, spread: float) -> None:
        self._twin = twin
        self._seed = seed
        self._spread = spread
        twin.place(seed, spread)
        self._reference = self._run()
        largest = max(float(t.abs().max()) for t in self._reference if t.numel())
        # Each output on its own scale, unless it is rounding noise beside the others.
        self._scales = [
            max(float(t.abs().max()) if t.numel() else 0.0, 1e-6 * largest) or 1.0
            for t in self._reference
        ]

    def jointly(self, specs: Mapping[str, str]) -> float | None:
        """Return the output change near the point, or ``None`` if the claims clash."""
        near = self.near(specs)
        holds = near <= TOLERANCE and self.far(specs) <= _JOINT_FAR_TOLERANCE
        return near if holds else None

    def near(self, specs: Mapping[str, str]) -> float:
        """Return the relative output change under a random factor in [1/3, 3] per sphere."""
        return self._change(specs, None)

    def far(self, specs: Mapping[str, str]) -> float:
        """Return the largest relative output change under factors common to all spheres."""
        return max(self._change(specs, amplitude) for amplitude in _AMPLITUDES)

    def _change(self, specs: Mapping[str, str], amplitude: float | None) -> float:
        with torch.no_grad():
            for name, spec in specs.items():
                p = self._twin.params[name]
                blocks = spheres.view(p, spec)  # (k, ...)
                factors = self._factors(name, len(blocks), amplitude).to(p.device)
                blocks.mul_(factors.reshape(-1, *[1] * (blocks.ndim - 1)))
        try:
            outs = self._run()
        except NotFiniteError:
            return float("inf")
        finally:
            self._twin.place(self._seed, self._spread, names=specs)
        changes = [
            float((a - b).abs().max()) / scale
            for a, b, scale in zip(outs, self._reference, self._scales, strict=True)
            if a.numel()
        ]
        return max(changes)

    def _run(self) -> list[Tensor]:
        with (
            torch.no_grad(),
            warnings.catch_warnings(),
            self._twin.session(self._seed, eps=_EPS),
        ):
            # The probes have shown the model's own; here some layers would warn about no_grad.
            warnings.simplefilter("ignore")
            return self._twin.outputs()

    def _factors(self, name: str, k: int, amplitude: float | None) -> Tensor:
        if amplitude is not None:
            return torch.full((k,), amplitude, dtype=torch.float64)
        gen = torch.Generator().manual_seed(hash_seed(self._seed, name))
        return 3.0 ** (2 * torch.rand(k, generator=gen, dtype=torch.float64) - 1)

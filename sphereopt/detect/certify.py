"""The certificate: rescale the claimed spheres and see that the outputs stay.

Euler's test sees derivatives only, and a proof is as good as its rules. Rescaling also sees scales
that leave autograd and, with large factors, kinks that the example input never reached (ReLU6,
clamp, Python branches).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor

from .claims import Claim
from .twin import NotFiniteError, Twin, hash_seed

# Common factors that carry activations across kinks which factors near 1 do not reach.
_AMPLITUDES = (1e-3, 1e3)
# How much more than its condition number times one rounding a network may move: a few hundred
# operations in a row, each of them rounding.
_SLACK = 1e3


class DetectionError(RuntimeError):
    """A proof that the numbers contradict: a mistake in a rule, not in the model."""


@final
@dataclass(frozen=True)
class Certificate:
    """Outcome of rescaling.

    Attributes:
        joint: Relative output change with all certified spheres rescaled at once by independent
            factors in [1/3, 3].
        kept: Claims that stood.
        refuted: Claims that did not, and the relative output change.
        live: Parameters without gradient that the outputs depend on all the same.
    """

    joint: float
    kept: list[Claim]
    refuted: list[tuple[Claim, float]]
    live: set[str]


@final
class Trial:
    """Compares outputs before and after a change, at one point and with one RNG state.

    Args:
        twin: The copy.
        seed: For the point, the factors and the model's randomness.
        spread: How far the point is from the weights, as in ``Twin.place``; ``None`` for the
            model's own weights.
        eps: The normalization eps, or ``None`` for the model's own.
        dropout: Whether dropout modules drop.
        reference: Outputs there, if they are known; the copy must then be there already.

    Attributes:
        twin: The copy.
    """

    def __init__(
        self,
        twin: Twin,
        seed: int,
        spread: float | None,
        eps: float | None,
        *,
        dropout: bool = False,
        reference: list[Tensor] | None = None,
    ) -> None:
        self.twin = twin
        self._seed = seed
        self._spread = spread
        self._changed: set[str] = set()
        self._session = partial(twin.session, seed, eps=eps, dropout=dropout)
        if reference is None:
            self._place()
        self._reference = self._run() if reference is None else reference
        largest = max(float(t.abs().max()) for t in self._reference if t.numel())
        # Each output on its own scale, unless it is rounding noise beside the others.
        self._scales = [
            max(float(t.abs().max()) if t.numel() else 0.0, 1e-6 * largest) or 1.0
            for t in self._reference
        ]

    def near(self, claims: Sequence[Claim], move: Sequence[str] = (), size: float = 2.0) -> float:
        """Return the relative output change under a random factor in [1/3, 3] per sphere.

        Args:
            claims: What to rescale.
            move: Parameters to move at random at the same time.
            size: How far, and with its sign which way.
        """
        self._rescale(claims, None)
        self._move(move, size)
        return self._change()

    def moved(self, names: Sequence[str], given: Sequence[str] = ()) -> float:
        """Return the largest relative output change when parameters move either way.

        Args:
            names: Parameters to move.
            given: Parameters that are moved on both sides of the comparison.
        """
        before = self._reference
        changes = []
        for size in (2.0, -2.0):
            if given:
                self._restore()
                self._move(given, size)
                self._reference = self._run()
            changes.append(self.near([], move=[*given, *names], size=size))
        self._reference = before
        return max(changes)

    def far(self, claims: Sequence[Claim]) -> float:
        """Return the largest relative output change under factors common to all spheres."""
        changes = []
        for amplitude in _AMPLITUDES:
            self._rescale(claims, amplitude)
            changes.append(self._change())
        return max(changes)

    def holds(self, claims: Sequence[Claim]) -> bool:
        """Return whether outputs stay near the point, and far from it as far as digits go."""
        precision = self.twin.precision
        return self.near(claims) <= precision.rescaling and self.far(claims) <= precision.far

    def rounding(self, claims: Sequence[Claim]) -> float:
        """Return the relative output change when all of these entries are rounded otherwise."""
        self._restore()
        self._move([name for claim in claims for name in claim.names], self.twin.precision.unit)
        return self._change()

    def _rescale(self, claims: Sequence[Claim], amplitude: float | None) -> None:
        self._restore()
        with torch.no_grad():
            for claim in claims:
                factors = self._factors(claim.names[0], claim.count, amplitude)
                for name, part in claim.parts.items():
                    p = self.twin.params[name]
                    p.mul_(part.along(p.ndim, factors).to(p.device, p.dtype))
                    self._changed.add(name)

    def _move(self, names: Sequence[str], size: float) -> None:
        """Move parameters by a relative size; from 1 on far enough to wake dead units."""
        with torch.no_grad():
            for name in names:
                gen = torch.Generator().manual_seed(hash_seed(self._seed, name))
                p = self.twin.params[name]
                noise = torch.randn(p.shape, generator=gen, dtype=torch.float32)
                noise = noise.to(p.device, p.dtype)
                scale = 1.0 + float(p.abs().max()) if abs(size) >= 1.0 and p.numel() else p
                p.add_(noise * scale, alpha=size)
                self._changed.add(name)

    def _change(self) -> float:
        try:
            outs = self._run()
        except NotFiniteError:
            return float("inf")
        changes = [
            float((a - b).abs().max()) / scale
            for a, b, scale in zip(outs, self._reference, self._scales, strict=True)
            if a.numel()
        ]
        return max(changes)

    def _restore(self) -> None:
        self._place(self._changed)
        self._changed.clear()

    def _place(self, names: Iterable[str] | None = None) -> None:
        """Put parameters, or all, where they belong."""
        if self._spread is None:
            self.twin.place(None, names=names)
        else:
            self.twin.place(self._seed, self._spread, names=names)

    def _run(self) -> list[Tensor]:
        with (
            torch.no_grad(),
            warnings.catch_warnings(),
            self._session(),
        ):
            # The probes have shown the model's own; here some layers would warn about no_grad.
            warnings.simplefilter("ignore")
            return self.twin.outputs()

    def _factors(self, name: str, k: int, amplitude: float | None) -> Tensor:
        """Return k factors, and a 1 for what is on no sphere."""
        if amplitude is not None:
            factors = torch.full((k,), amplitude, dtype=torch.float64)
        else:
            gen = torch.Generator().manual_seed(hash_seed(self._seed, name))
            factors = 3.0 ** (2 * torch.rand(k, generator=gen, dtype=torch.float64) - 1)
        return torch.cat([factors, factors.new_ones(1)])


def certify(
    trial: Trial,
    proved: Sequence[Claim],
    numerical: Sequence[Claim],
    inert: Sequence[str],
    detached: Sequence[Claim] = (),
) -> Certificate:
    """Certify all claims at once and, should that fail, find out which are wrong.

    Args:
        trial: At a generic point.
        proved: Claims with a proof.
        numerical: Claims of the Euler test alone; they must also stand factors of 1000.
        inert: Parameters that get no gradient: the outputs should not depend on them.
        detached: Claims with a proof that the gradient does not agree with. They must hold: the
            function is then invariant, and its gradient another's.

    Raises:
        DetectionError: If rescaling contradicts a proof.
    """
    if detached:
        _check(trial, detached)
    if not (proved or numerical or inert):
        return Certificate(0.0, [], [], set())
    limit = trial.twin.precision.rescaling
    every = [*proved, *numerical]
    joint = trial.near(every, move=inert)
    still = not inert or trial.near([], move=inert, size=-2.0) <= limit
    far = trial.twin.precision.far
    if joint <= limit and still and (not numerical or trial.far(every) <= far):
        return Certificate(joint, every, [], set())
    live: set[str] = set()
    if inert and trial.moved(inert) > limit:
        live = {name for name in inert if trial.moved([name]) > limit} or set(inert)
        # A weight behind a dead unit matters once the unit is awake.
        live |= {name for name in inert if trial.moved([name], given=sorted(live)) > limit}
    if proved and trial.near(proved) > limit:
        _check(trial, proved)
    kept, refuted = list(proved), []
    for claim in numerical:
        if trial.holds([claim]) and trial.holds([*kept, claim]):
            kept.append(claim)
        else:
            alone = max(trial.near([claim]), trial.far([claim]))
            together = max(trial.near([*kept, claim]), trial.far([*kept, claim]))
            refuted.append((claim, max(alone, together)))
    return Certificate(trial.near(kept) if kept else 0.0, kept, refuted, live)


def _check(trial: Trial, proved: Sequence[Claim]) -> None:
    """Raise, unless it is rounding that moves the outputs."""
    allowed = max(trial.twin.precision.rescaling, _SLACK * trial.rounding(proved))
    worst = trial.near(proved)
    if worst <= allowed:
        return
    wrong = [claim for claim in proved if trial.near([claim]) > allowed]
    names = ", ".join(name for claim in wrong or proved for name in claim.names)
    raise DetectionError(
        f"proved to be scale-invariant, but rescaling changes the outputs by {worst:.1e}: {names}. "
        "Either a rule of sphereopt is wrong, or an extension hides a scale from torch; please "
        "report it. find_spheres(..., output=) can leave that part of the model out"
    )

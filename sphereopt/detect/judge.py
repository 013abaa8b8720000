"""The verdict on every parameter, from numbers, proof and certificate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

from torch import Tensor, nn

from .certify import Certificate
from .claims import Claim, Shapes
from .euler import Probe, read
from .hypotheses import Hypotheses
from .partition import Partition
from .proof import Proof
from .report import Evidence, Finding, Status
from .words import in_words


@final
@dataclass(frozen=True, slots=True)
class Numbers:
    """What was measured.

    Attributes:
        probes: At generic points; none for a model without values.
        real: At the model's own weights and eps.
    """

    probes: Sequence[Probe]
    real: Probe | None

    def tangent(self, claim: Claim) -> bool:
        """Return whether the gradient agrees that these are spheres."""
        if not self.probes:
            return True
        return read(self.probes, claim).worst <= self.probes[0].precision.euler

    def evidence(self, claim: Claim, rescaling: float | None, at_real: float | None) -> Evidence:
        """Return the measurements for a report."""
        generic = read(self.probes, claim)
        if self.real is None:
            return Evidence(generic.worst, rescaling, None, None, len(self.probes), at_real)
        real = read([self.real], claim)
        grad = sum(self.real.grads.get(name, 0.0) ** 2 for name in claim.names) ** 0.5
        seen = bool(real.seen.any())
        radial = min(float(real.radial.sum()) ** 0.5 / grad, 1.0) if seen and grad else None
        worst = real.worst if seen else None
        return Evidence(generic.worst, rescaling, worst, radial, len(self.probes), at_real)


@final
class Judge:
    """Weighs the claims of both kinds.

    Args:
        model: The user's model.
        shapes: Name -> shape of its floating-point parameters.
        guess: What the numbers suggest.
        proof: What the run proves.
        numbers: What was measured.

    Attributes:
        proved: Claims with a proof that the gradient agrees with.
        detached: Claims with a proof that it does not.
        numerical: Claims of the numbers about parameters that no proof covers.
    """

    def __init__(
        self,
        model: nn.Module,
        shapes: Shapes,
        guess: Hypotheses,
        proof: Proof,
        numbers: Numbers,
    ) -> None:
        self._parameters: Mapping[str, Tensor] = dict(model.named_parameters())
        self._shapes, self._guess, self._proof = shapes, guess, proof
        self._numbers = numbers
        self._why: dict[str, str] = {}
        self.detached: list[Claim] = []
        self.proved = [claim for claim in proof.claims if self._stands(claim)]
        covered = {name for claim in self.proved for name in claim.names}
        self.numerical = [
            claim
            for claim in guess.claims
            if covered.isdisjoint(claim.names) and numbers.tangent(claim) and self._exercised(claim)
        ]

    def _stands(self, claim: Claim) -> bool:
        """Return whether a proved claim concerns gradients, and rows that were exercised."""
        missing = {n: self._proof.unexercised[n] for n in claim.names if self._missing(n)}
        for name, count in missing.items():
            self._why[name] = _unexercised(count, len(claim.parts[name].labels))
        if missing:
            return False
        if all(name in self._guess.inert for name in claim.names):
            return len(self._shapes[claim.names[0]]) > 1
        if self._numbers.tangent(claim):
            return True
        self.detached.append(claim)
        for name in claim.names:
            self._why[name] = (
                "the function is invariant but its gradient is not tangent: a detached scale or a "
                "straight-through estimator"
            )
        return False

    def _missing(self, name: str) -> bool:
        return name in self._proof.unexercised and name not in self._proof.tables

    def _exercised(self, claim: Claim) -> bool:
        seen = read(self._numbers.probes, claim).seen
        for name in claim.names:
            if not bool(seen.all()):
                self._why[name] = _unexercised(int((~seen).sum()), len(seen))
        return bool(seen.all()) and all(n not in self._why for n in claim.names)

    def findings(self, certificate: Certificate, at_real: float | None) -> list[Finding]:
        """Return the findings in the model's order.

        Args:
            certificate: Which claims stood.
            at_real: Relative output change of the rescaling at the real eps.
        """
        depends = certificate.live
        home = {name: claim for claim in certificate.kept for name in claim.names}
        errors = {name: e for claim, e in certificate.refuted for name in claim.names}
        proved = {name for claim in self.proved for name in claim.names}
        result = []
        for name, p in self._parameters.items():
            if name not in self._shapes:
                why = f"not a floating-point parameter ({p.dtype})"
                result.append(Finding(name, tuple(p.shape), None, (), "none", None, why))
            elif name in home and not all(self._is_inert(n, depends) for n in home[name].names):
                status: Status = "proved" if name in proved else "numerical"
                found = self._on_sphere(name, home[name], status, certificate.joint, at_real)
                result.append(found)
            else:
                result.append(self._off(name, errors.get(name), depends))
        return result

    def _is_inert(self, name: str, depends: set[str]) -> bool:
        return name in self._guess.inert and name not in depends

    def _on_sphere(
        self, name: str, claim: Claim, status: Status, joint: float, at_real: float | None
    ) -> Finding:
        shape = self._shapes[name]
        others = tuple(n for n in self._shapes if n in claim.parts and n != name)
        numel = sum(self._parameters[n].numel() for n in claim.parts)
        every = all(part.full for part in claim.parts.values())
        spheres = "one sphere" if claim.count == 1 else f"{claim.count} spheres"
        size = f" of {numel // claim.count} entries" if every else ""
        reason = f"scale-invariant: {spheres}{size}"
        if others:
            reason += f", jointly with {_some(others)}"
        if status == "numerical":
            reason += "; no proof: " + self._obstacle(claim.names)
        if name in self._proof.unexercised:
            hidden = self._proof.unexercised[name]
            reason += (
                f" ({hidden} of {len(claim.parts[name].labels)} rows not looked up: like the rest)"
            )
        evidence = self._evidence(claim, joint, at_real)
        return Finding(
            name, tuple(shape), claim.spec(self._shapes), others, status, evidence, reason
        )

    def _obstacle(self, names: Sequence[str]) -> str:
        origin = next((self._proof.origins[n] for n in names if n in self._proof.origins), None)
        return "the operations do not show it" if origin is None else in_words(origin)

    def _off(self, name: str, error: float | None, depends: set[str]) -> Finding:
        shape = tuple(self._shapes[name])
        whole = Claim({name: Partition.whole(shape)})
        if self._is_inert(name, depends):
            reason = "the outputs do not depend on it (unused, or cancelled by a norm or softmax)"
            return Finding(name, shape, None, (), "inert", None, reason)
        if name in self._guess.inert:
            reason = "no gradient reaches it, though the outputs depend on it"
            return Finding(name, shape, None, (), "none", None, reason)
        evidence = self._evidence(whole, error, None)
        if evidence is not None:
            evidence = replace(evidence, at_real_eps=None)  # a matter of spheres
        return Finding(name, shape, None, (), "none", evidence, self._reason(name, error))

    def _evidence(
        self, claim: Claim, error: float | None, at_real: float | None
    ) -> Evidence | None:
        return self._numbers.evidence(claim, error, at_real) if self._numbers.probes else None

    def _reason(self, name: str, error: float | None) -> str:
        if error is not None:
            why = "a kink out of reach, or a scale that leaves autograd"
            if name in self._proof.origins:
                why = in_words(self._proof.origins[name])
            return (
                f"refuted: rescaling changes the outputs by {error:.1e} of their size, though no "
                f"gradient shows it: {why}"
            )
        if name in self._why:
            return self._why[name]
        if name in self._proof.origins:
            return in_words(self._proof.origins[name])
        if self._parameters[name].numel() == 1:
            return "a single entry: it has no direction"
        return (
            "nothing stands in its way, but its spheres are single entries, have no spec, or "
            "overlap with others"
        )


def _unexercised(count: int, n: int) -> str:
    return (
        f"not certified: {count} of {n} rows or blocks were never exercised by the example input; "
        "pass a larger one"
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more

"""What ``find_spheres`` returns: plain frozen values that can be printed, compared and saved."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, Literal, final

if TYPE_CHECKING:
    from torch import nn

REAL_EPS_WARNING = 0.01

Status = Literal["proved", "numerical", "none", "inert"]


@final
@dataclass(frozen=True)
class Evidence:
    """What was measured about one parameter.

    For a set of entries S, ``c(S) = |sum_S p| / sum_S |p|`` with ``p = w * df/dw``. By Euler's
    theorem ``f(c*w) = f(w)`` for all ``c > 0`` makes it vanish; it is 1 if all of S pulls one way.

    Attributes:
        euler: Largest c(S) over the observed spheres and all probes, at generic points with the
            normalization eps removed. Without a sphere: c of the whole tensor.
        rescaling: Relative change of the outputs when all certified spheres are rescaled at once
            by independent factors in [1/3, 3]; the change that refuted this parameter, where the
            reason says so; ``None`` if it did not come that far.
        at_real_eps: Largest c(S) at the model's own weights and its own eps, or ``None`` without a
            sphere or where the gradient is zero (behind a zero-initialised gain).
        radial: Share of the gradient that is radial at the model's own weights and eps,
            ``sqrt(sum_S <w_S,g_S>^2/|w_S|^2) / |g|`` over the spheres S of ``sphere`` (without one,
            the whole tensor): 0 for an invariant weight, 1 if the gradient only rescales it.
            ``None`` where the gradient or the weight is zero.
        probes: Number of generic points.
        rescaling_at_real_eps: Like ``rescaling``, at the model's own weights and eps.
    """

    euler: float
    rescaling: float | None
    at_real_eps: float | None
    radial: float | None
    probes: int
    rescaling_at_real_eps: float | None = None


@final
@dataclass(frozen=True)
class Finding:
    """The verdict on one parameter.

    Attributes:
        name: Its name in ``model.named_parameters()``, wrappers removed.
        shape: Its shape.
        sphere: ``"row"``, ``"col"``, ``"block:K"``, ``"tensor"``, or pieces of dim 0 such as
            ``"block:8@0:512,row@512:1024"``: the finest that holds; or ``None``.
        joint: The other parameters on the same spheres: spheres of the same index across them are
            one. Empty if it is invariant by itself.
        status: ``"proved"`` symbolically and certified by numbers; ``"numerical"``: certified by
            numbers, but an operation is in the way of the proof; ``"inert"``: the outputs do not
            depend on it; ``"none"``.
        evidence: The measurements, or ``None`` if nothing could be measured.
        reason: One sentence for a reader; for status "none" it names the first operation, and the
            module it runs in, that breaks the invariance.
    """

    name: str
    shape: tuple[int, ...]
    sphere: str | None
    joint: tuple[str, ...]
    status: Status
    evidence: Evidence | None
    reason: str

    @property
    def members(self) -> tuple[str, ...]:
        """All parameters of its spheres, itself included, in the order they are reported."""
        return (self.name, *self.joint)


@final
@dataclass(frozen=True, eq=False, repr=False)
class SphereReport(Mapping[str, Finding]):
    """Findings by parameter name, in the model's order.

    ``report[name]`` also takes the other names of a tied parameter and the names it has in the
    wrapped model (``module.``, ``_orig_mod.``); iteration and length count each parameter once.

    Attributes:
        findings: One finding per distinct parameter.
        aliases: Further name -> the name in ``findings``.
        symmetries: Rescalings of several tensors that leave the function alone although no sphere
            is one of them: name -> exponent, ``{"v.weight": 1.0, "o.weight": -1.0}`` for
            ``v*c, o/c``. For information.
        notes: What the reader should know about how this was found (float32, no numbers ...).
    """

    findings: dict[str, Finding]
    aliases: dict[str, str] = field(default_factory=dict)
    symmetries: tuple[dict[str, float], ...] = ()
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Finding:
        return self.findings[self.aliases.get(name, name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    @property
    def spheres(self) -> dict[str | tuple[str, ...], str]:
        """What is proved: name -> spec, or for joint spheres (names of all members) -> spec."""
        return self._by_status("proved")

    @property
    def numerical(self) -> dict[str | tuple[str, ...], str]:
        """What the numbers say but no proof does, in the form of ``spheres``."""
        return self._by_status("numerical")

    def _by_status(self, status: Status) -> dict[str | tuple[str, ...], str]:
        found: dict[str | tuple[str, ...], str] = {}
        place = {name: i for i, name in enumerate(self.findings)}
        for f in self.findings.values():
            if f.status == status and f.sphere is not None:
                members = tuple(sorted(f.members, key=place.__getitem__))
                if members[0] == f.name:
                    found[f.name if len(members) == 1 else members] = f.sphere
        return found

    def share(self) -> float:
        """Return the share of the model's parameters (by entries) that are on proved spheres."""
        total = sum(prod(f.shape) for f in self.findings.values())
        return sum(_covered(f) for f in self.findings.values()) / max(total, 1)

    def to_groups(self, model: nn.Module, **options: Any) -> list[dict[str, Any]]:
        """Return ``param_groups(model, self, **options)``.

        Args:
            model: The module that was analysed, or one with the same parameters.
            options: Keyword arguments of :func:`sphereopt.param_groups`.
        """
        from sphereopt.groups import param_groups  # imports this module in its turn

        return param_groups(model, self, **options)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as nested dicts of plain values, ready for ``json.dumps``."""
        return {
            "findings": [asdict(finding) for finding in self.findings.values()],
            "aliases": dict(self.aliases),
            "symmetries": [dict(s) for s in self.symmetries],
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SphereReport:
        """Rebuild a report from ``to_dict``'s value."""
        findings = {}
        for item in data["findings"]:
            evidence = None if item["evidence"] is None else Evidence(**item["evidence"])
            own = {"shape": tuple(item["shape"]), "joint": tuple(item["joint"])}
            findings[item["name"]] = Finding(**{**item, **own, "evidence": evidence})
        symmetries = tuple(dict(s) for s in data["symmetries"])
        return cls(findings, dict(data["aliases"]), symmetries, tuple(data["notes"]))

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> SphereReport:
        """Rebuild a report from ``to_json``'s text."""
        return cls.from_dict(json.loads(text))

    def __repr__(self) -> str:
        on = sum(f.status == "proved" for f in self.findings.values())
        return f"SphereReport({on} of {len(self)} parameters on proved spheres)"

    def __str__(self) -> str:
        from .table import table  # the one reader of all of this

        return table(self)


def _covered(finding: Finding) -> int:
    """Return how many entries of a parameter are on proved spheres."""
    if finding.status != "proved" or finding.sphere is None:
        return 0
    rows = [part.partition("@")[2] for part in finding.sphere.split(",")]
    if rows == [""]:
        return prod(finding.shape)
    ends = [map(int, piece.split(":")) for piece in rows]
    return sum(stop - start for start, stop in ends) * prod(finding.shape[1:])

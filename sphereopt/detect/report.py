"""What ``find_spheres`` returns: plain frozen values that can be printed, compared and saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, final

REAL_EPS_WARNING = 0.01


@final
@dataclass(frozen=True)
class Evidence:
    """What was measured about one parameter.

    For a set of entries S, ``c(S) = |sum_S p| / sum_S |p|`` with ``p = w * df/dw``. By Euler's
    theorem ``f(c*w) = f(w)`` for all ``c > 0`` makes it vanish; it is 1 if all of S pulls one way.

    Attributes:
        euler: largest c(S) over the observed spheres and all probes, in float64 at generic points
            with the normalization eps removed. Without a sphere: c of the whole tensor.
        rescaling: relative change of the outputs when all certified spheres are rescaled at once
            by independent factors in [1/3, 3]; the change that refuted this parameter, where the
            reason says so; ``None`` if it did not come that far.
        at_real_eps: largest c(S) in float64 at the model's own weights and its own eps, or ``None``
            without a sphere or where the gradient is zero (behind a zero-initialised gain).
        probes: number of generic points.
        kind: how the claim was reached.
    """

    euler: float
    rescaling: float | None
    at_real_eps: float | None
    probes: int
    kind: str = "numerical"


@final
@dataclass(frozen=True)
class Finding:
    """The verdict on one parameter.

    Attributes:
        name: its name in ``model.named_parameters()``, wrappers removed.
        shape: its shape.
        sphere: ``"row"``, ``"col"``, ``"block:K"`` or ``"tensor"``, the finest that holds, or
            ``None``.
        evidence: the measurements, or ``None`` if nothing could be measured.
        reason: one sentence for a reader.
    """

    name: str
    shape: tuple[int, ...]
    sphere: str | None
    evidence: Evidence | None
    reason: str


@final
@dataclass(frozen=True, eq=False, repr=False)
class SphereReport(Mapping[str, Finding]):
    """Findings by parameter name, in the model's order.

    ``report[name]`` also takes the other names of a tied parameter and the names it has in the
    wrapped model (``module.``, ``_orig_mod.``); iteration and length count each parameter once.

    Attributes:
        findings: one finding per distinct parameter.
        aliases: further name -> the name in ``findings``.
    """

    findings: dict[str, Finding]
    aliases: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Finding:
        return self.findings[self.aliases.get(name, name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    @property
    def spheres(self) -> dict[str, str]:
        """Name -> sphere spec of the scale-invariant parameters."""
        return {name: f.sphere for name, f in self.findings.items() if f.sphere is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return the report as nested dicts of plain values, ready for ``json.dumps``."""
        return {
            "findings": [asdict(finding) for finding in self.findings.values()],
            "aliases": dict(self.aliases),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SphereReport:
        """Rebuild a report from ``to_dict``'s value."""
        findings = {}
        for item in data["findings"]:
            evidence = None if item["evidence"] is None else Evidence(**item["evidence"])
            fields = {**item, "shape": tuple(item["shape"]), "evidence": evidence}
            findings[item["name"]] = Finding(**fields)
        return cls(findings, dict(data["aliases"]))

    def __repr__(self) -> str:
        return f"SphereReport({len(self.spheres)} of {len(self)} parameters on spheres)"

    def __str__(self) -> str:
        header = ("parameter", "shape", "sphere", "euler", "real eps", "reason")
        rows = [header, *(_cells(finding) for finding in self.findings.values())]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header) - 1)]
        lines = [
            "  ".join([*(c.ljust(n) for c, n in zip(row, widths, strict=False)), row[-1]]).rstrip()
            for row in rows
        ]
        lines.append(f"{len(self.spheres)} of {len(self)} parameters are scale-invariant.")
        if any(_far_at_real_eps(finding) for finding in self.findings.values()):
            lines.append(
                f"! above {REAL_EPS_WARNING}: at these weights the normalization eps is not small "
                "against the variance, so their norm still matters."
            )
        return "\n".join(lines)


def _far_at_real_eps(finding: Finding) -> bool:
    value = None if finding.evidence is None else finding.evidence.at_real_eps
    return value is not None and value > REAL_EPS_WARNING


def _cells(finding: Finding) -> tuple[str, str, str, str, str, str]:
    evidence = finding.evidence
    euler = "-" if evidence is None else f"{evidence.euler:.0e}"
    real = (
        "-" if evidence is None or evidence.at_real_eps is None else f"{evidence.at_real_eps:.0e}"
    )
    mark = " !" if _far_at_real_eps(finding) else ""
    shape = "x".join(map(str, finding.shape)) or "scalar"
    return finding.name, shape, finding.sphere or "-", euler, real + mark, finding.reason

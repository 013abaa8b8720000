"""A report as text: one line per parameter, then what they add up to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import get_args

from .report import REAL_EPS_WARNING, Finding, SphereReport, Status

__all__ = ["listed", "table"]

_HEADER = ("parameter", "shape", "sphere", "status", "euler", "real eps", "radial", "reason")
#: Lines are folded here, except where names or shapes alone are longer.
_WIDTH = 200
#: What the last column gets at least, however long the names are.
_REASON = 60
_REAL_EPS = (
    f"! above {REAL_EPS_WARNING}: at these weights the normalization eps is not small against the "
    "variance, so their norm still matters."
)


def table(report: SphereReport) -> str:
    """Return what ``print(report)`` shows: a table of all parameters, then the totals.

    Args:
        report: What :func:`sphereopt.find_spheres` returned.

    Returns:
        Lines of ASCII text, without a newline at the end.

    Example:
        >>> from sphereopt.detect import Finding, SphereReport
        >>> found = Finding("fc.bias", (4,), None, (), "inert", None, "the next norm removes it")
        >>> print(table(SphereReport({"fc.bias": found})))
        parameter  shape  sphere  status  euler  real eps  radial  reason
        fc.bias    4      -       inert   -      -         -       the next norm removes it
        1 parameter tensor: 1 inert; 0.0 % of all entries on proved spheres.
        Inert, they waste memory and weight decay drives them: fc.bias
    """
    sets = _joint_sets(report)
    lines = _columns([_HEADER, *(_cells(f, sets) for f in report.findings.values())])
    for number, members in enumerate(sets, 1):
        lines += _folded(f"*{number} jointly: {listed(members, 4)}")
    lines += _totals(report)
    for note in report.notes:
        lines += _folded(f"Note: {note}")
    if any(_far_at_real_eps(f) for f in report.findings.values()):
        lines.append(_REAL_EPS)
    return "\n".join(lines)


def _joint_sets(report: SphereReport) -> list[tuple[str, ...]]:
    """Return the distinct sets of parameters that share spheres, members in the model's order."""
    place = {name: i for i, name in enumerate(report.findings)}
    sets = {
        tuple(sorted(f.members, key=lambda name: place.get(name, len(place))))
        for f in report.findings.values()
        if f.joint and f.sphere is not None
    }
    return sorted(sets, key=lambda members: [place.get(name, len(place)) for name in members])


def _cells(finding: Finding, sets: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    shape = "x".join(map(str, finding.shape)) or "scalar"
    sphere = finding.sphere or "-"
    if finding.sphere is not None and finding.joint:
        own = set(finding.members)
        sphere += f" *{[set(members) for members in sets].index(own) + 1}"
    euler = real = radial = None
    if finding.evidence is not None:
        euler, real = finding.evidence.euler, finding.evidence.at_real_eps
        radial = finding.evidence.radial
    numbers = [_number(euler), _number(real), "-" if radial is None else f"{radial:.2g}"]
    if _far_at_real_eps(finding):
        numbers[1] += " !"
    return (finding.name, shape, sphere, finding.status, *numbers, finding.reason)


def _number(value: float | None) -> str:
    """Return the order of magnitude, which is all that these numbers say."""
    if value is None:
        return "-"
    return "0" if value == 0 else f"{value:.0e}"


def _far_at_real_eps(finding: Finding) -> bool:
    value = None if finding.evidence is None else finding.evidence.at_real_eps
    return value is not None and value > REAL_EPS_WARNING


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align all columns and fold the last one."""
    rows = [[_ascii(cell) for cell in row] for row in rows]
    last = len(_HEADER) - 1
    widths = [max(len(row[i]) for row in rows) for i in range(last)]
    indent = sum(widths) + 2 * last
    lines = []
    for row in rows:
        start = "".join(cell.ljust(width) + "  " for cell, width in zip(row, widths, strict=False))
        folded = _wrapped(row[last], max(_WIDTH - indent, _REASON)) or [""]
        lines.append((start + folded[0]).rstrip())
        lines += [" " * indent + part for part in folded[1:]]
    return lines


def _totals(report: SphereReport) -> list[str]:
    findings = report.findings.values()
    counts = {s: sum(f.status == s for f in findings) for s in get_args(Status)}
    order = ("proved", "numerical", "inert", "none")
    parts = ", ".join(f"{counts[s]} {s}" for s in order if counts[s]) or "none"
    tensors = "1 parameter tensor" if len(report) == 1 else f"{len(report)} parameter tensors"
    lines = [f"{tensors}: {parts}; {100 * report.share():.1f} % of all entries on proved spheres."]
    inert = [f.name for f in findings if f.status == "inert"]
    if inert:
        lines += _folded(
            f"Inert, they waste memory and weight decay drives them: {listed(inert, 12)}"
        )
    if report.symmetries:
        n = len(report.symmetries)
        what = "1 rescaling symmetry" if n == 1 else f"{n} rescaling symmetries"
        lines.append(f"{what} besides the spheres (for any c > 0):")
        for symmetry in report.symmetries[:4]:
            lines += _folded("  " + _rescaling(symmetry))
        lines += [f"  and {n - 4} more"] if n > 4 else []
    return lines


def _rescaling(symmetry: Mapping[str, float]) -> str:
    """Return "v.weight * c, o.weight / c^2" for exponents 1 and -2."""
    return listed([_factor(name, exponent) for name, exponent in symmetry.items()], 4)


def _factor(name: str, exponent: float) -> str:
    size = abs(exponent)
    power = "c" if size == 1 else f"c^{size:g}"
    return f"{name} {'/' if exponent < 0 else '*'} {power}"


def listed(items: Sequence[str], shown: int) -> str:
    """Return the first items, and how many more there are.

    Args:
        items: Names.
        shown: How many of them to write out.

    Returns:
        The names with commas between them.

    Example:
        >>> listed(["a", "b", "c"], 2)
        'a, b and 1 more'
    """
    more = len(items) - shown
    return ", ".join(items[:shown]) + (f" and {more} more" if more > 0 else "")


def _folded(text: str) -> list[str]:
    """Fold a line; what follows the first line is indented a little further than it."""
    indent = " " * (len(text) - len(text.lstrip()))
    first, *rest = _wrapped(_ascii(text.strip()), _WIDTH - len(indent) - 2) or [""]
    return [indent + first, *(f"{indent}  {part}" for part in rest)]


def _wrapped(text: str, width: int) -> list[str]:
    return wrap(text, width, break_long_words=False, break_on_hyphens=False)


def _ascii(text: str) -> str:
    """Write what is not ASCII as an escape: the table must print on any terminal."""
    return text.encode("ascii", "backslashreplace").decode()

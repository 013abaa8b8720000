"""From equations on degrees to spheres: sets of units that may be scaled by one common factor.

A vector of exponents that solves all equations is an exact symmetry of the run. A sphere is a
solution of zeros and ones; the others, such as (1, -1), are rescaling symmetries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import final

from .forms import Form, Origin

# Elimination is cubic. More unknowns than this in one system come from no network seen so far.
_LARGEST_SYSTEM = 4000

Vector = dict[int, Fraction]


@final
@dataclass(slots=True)
class Solution:
    """What the equations allow.

    Attributes:
        spheres: Sets of units, disjoint; each may be scaled alone.
        origins: Unit on no sphere -> what is in the way.
        symmetries: Further solutions: unit -> exponent.
    """

    spheres: list[list[int]] = field(default_factory=list)
    origins: dict[int, Origin] = field(default_factory=dict)
    symmetries: list[dict[int, float]] = field(default_factory=list)


@final
class _Classes:
    """Units that must have equal exponents, by union-find."""

    def __init__(self, n: int) -> None:
        self._parent = list(range(n))

    def find(self, a: int) -> int:
        while self._parent[a] != a:
            self._parent[a] = self._parent[self._parent[a]]
            a = self._parent[a]
        return a

    def join(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        self._parent[max(a, b)] = min(a, b)

    def members(self) -> dict[int, list[int]]:
        sets: dict[int, list[int]] = {}
        for unit in range(len(self._parent)):
            sets.setdefault(self.find(unit), []).append(unit)
        return sets


def solve(n: int, equations: Mapping[Form, Origin], order: Mapping[int, int]) -> Solution:
    """Return disjoint spheres, as fine and as many as the equations allow.

    Args:
        n: Number of units.
        equations: Forms that must vanish, and where each came from.
        order: Unit -> when it was first used. Where a product of weights must scale, ``v`` then
            ``o``, the last one does: the writers of a residual stream, not what feeds them.

    Returns:
        The spheres. A unit that no equation mentions is one by itself.
    """
    classes = _Classes(n)
    zero: dict[int, Origin] = {}
    hard = _simplified(classes, zero, equations)
    first: dict[int, Origin] = {}
    # What cannot scale at all tells a reader more than what must scale alike.
    for form, origin in sorted(hard, key=lambda item: item[1].equality):
        for c in form:
            first.setdefault(c, origin)
    solution = Solution()
    members = classes.members()
    for c, units in members.items():
        if c not in zero and c not in first:
            solution.spheres.append(units)
    for system in _systems(hard):
        _solve_system(system, members, order, solution)
    on = {unit for sphere in solution.spheres for unit in sphere}
    for c, units in members.items():
        for unit in units:
            if unit not in on:
                solution.origins[unit] = zero.get(c) or first[c]
    return solution


def _simplified(
    classes: _Classes, zero: dict[int, Origin], equations: Mapping[Form, Origin]
) -> list[tuple[Vector, Origin]]:
    """Settle equations of one unknown, and those that say that two are equal; return the rest."""
    rest = [({unit: Fraction(k) for unit, k in form}, origin) for form, origin in equations.items()]
    while True:
        changed, later = False, []
        for form, origin in rest:
            reduced: Vector = {}
            for unit, k in form.items():
                c = classes.find(unit)
                if c not in zero:
                    reduced[c] = reduced.get(c, Fraction(0)) + k
            reduced = {c: k for c, k in reduced.items() if k}
            if len(reduced) == 1:
                zero[next(iter(reduced))] = origin
                changed = True
            elif len(reduced) == 2 and sum(reduced.values()) == 0:
                classes.join(*reduced)
                changed = True
            elif reduced:
                later.append((reduced, origin))
        rest = later
        if not changed:
            return rest


def _systems(hard: list[tuple[Vector, Origin]]) -> list[list[Vector]]:
    """Return the equations grouped into systems that share no unknowns."""
    home: dict[int, int] = {}
    systems: dict[int, list[Vector]] = {}
    for i, (form, _) in enumerate(hard):
        systems[i] = [form]
        for other in {home[c] for c in form if c in home}:
            for moved in systems[other]:
                home.update(dict.fromkeys(moved, i))
            systems[i] += systems.pop(other)
        home.update(dict.fromkeys(form, i))
    return list(systems.values())


def _solve_system(
    system: list[Vector],
    members: Mapping[int, list[int]],
    order: Mapping[int, int],
    solution: Solution,
) -> None:
    """Add the spheres and symmetries of one system."""
    unknowns = {c for form in system for c in form}
    if len(unknowns) > _LARGEST_SYSTEM:
        return
    late = {c: (min(order.get(u, 0) for u in members[c]), c) for c in unknowns}
    rows = _eliminated(system, late)
    basis = []
    for c in sorted(unknowns - rows.keys(), key=late.__getitem__):
        vector = {c: Fraction(1)}
        vector.update({pivot: -row[c] for pivot, row in rows.items() if c in row})
        basis.append(vector)
    taken: set[int] = set()
    # Small spheres first; among equals the one that was used last.
    basis.reverse()
    for vector in sorted(basis, key=len):
        units = {u: float(k) for c, k in vector.items() for u in members[c]}
        if all(k == 1 for k in vector.values()) and taken.isdisjoint(vector):
            taken |= vector.keys()
            solution.spheres.append(sorted(units))
        else:
            solution.symmetries.append(units)


def _eliminated(system: list[Vector], late: Mapping[int, tuple[int, int]]) -> dict[int, Vector]:
    """Return rows solved for the latest unknown of each: pivot -> coefficients of the others.

    Each row reads ``pivot + sum of the others = 0``, and no other is a pivot.
    """
    rows: dict[int, Vector] = {}
    for form in system:
        row = _reduced(form, rows)
        if not row:
            continue
        pivot = max(row, key=late.__getitem__)
        lead = row.pop(pivot)
        row = {c: k / lead for c, k in row.items()}
        for other, old in rows.items():
            if pivot in old:
                rows[other] = _plus(old, row, -old[pivot], without=pivot)
        rows[pivot] = row
    return rows


def _reduced(form: Vector, rows: Mapping[int, Vector]) -> Vector:
    """Substitute the pivots of an equation."""
    row = dict(form)
    for pivot in [c for c in form if c in rows]:
        k = row.pop(pivot)
        row = _plus(row, rows[pivot], -k)
    return row


def _plus(a: Vector, b: Vector, factor: Fraction, without: int | None = None) -> Vector:
    """Return ``a + factor*b``, less one unknown."""
    out = {c: k for c, k in a.items() if c != without}
    for c, k in b.items():
        out[c] = out.get(c, Fraction(0)) + factor * k
    return {c: k for c, k in out.items() if k}

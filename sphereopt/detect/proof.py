"""The proof: run the model once with degrees attached, then solve for what may be scaled."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from .claims import Claim, Shapes, gathered
from .degrees import Degree
from .forms import Origin
from .ideal import TINY_EPS
from .partition import Partition
from .propagate import Propagation
from .rules import MOVING, RULES
from .solve import Solution, solve
from .twin import Twin, drawn_by_python, hash_seed

#: How many more draws of a random path are followed: a branch of probability 1/3 is missed by
#: these and the first in one run of 38.
DRAWS = 8


@final
@dataclass(frozen=True, slots=True)
class Proof:
    """What the run proves.

    Attributes:
        claims: Spheres, finest first where there is a choice; a parameter is in one claim at most.
        origins: Name -> what is in the way of its own invariance, where something is.
        symmetries: Rescalings: name -> exponent.
        unexercised: Name -> how many of its indices no operation but a selection touched.
        tables: Names of parameters that an embedding looks up: their rows are alike.
        random_path: What runs is drawn at random.
        failures: Operations used in a way that their rules did not expect.
    """

    claims: list[Claim]
    origins: dict[str, Origin]
    symmetries: list[dict[str, float]]
    unexercised: dict[str, int]
    tables: set[str]
    random_path: bool
    failures: list[str]


@final
@dataclass(slots=True)
class _Units:
    """The unknowns: one per label of every parameter's partition."""

    parts: Mapping[str, Partition]
    owner: list[tuple[str, int]] = field(default_factory=list)
    first: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, part in self.parts.items():
            self.first[name] = len(self.owner)
            self.owner += [(name, label) for label in range(part.count)]

    def degree(self, p: Propagation, name: str, t: Tensor) -> Degree:
        """Return the degrees of the entries of a parameter: those of its units."""
        part, start = self.parts[name], self.first[name]
        ids = torch.tensor([p.forms.unit(start + i) for i in range(part.count)])
        return Degree(part.along(t.ndim, ids))


def prove(twin: Twin, parts: Mapping[str, Partition], seed: int) -> Proof:
    """Run the twin at its present point and return what follows.

    Args:
        twin: The copy, already placed.
        parts: For every parameter of the twin, the units whose exponents are unknown; labels must
            cover it (no -1).
        seed: For the model's randomness.
    """
    p, units = Propagation(RULES, MOVING), _Units(parts)
    _run(p, units, twin, seed)
    for draw in range(DRAWS if p.random_path else 0):
        # Layers that are skipped at random: what holds must hold on all paths.
        _run(p, units, twin, hash_seed(seed, str(draw)))
    table = p.forms.table
    equations = {table[x]: origin for x, origin in p.forms.equations.items()}
    solution = solve(len(units.owner), equations, p.used_at)
    shapes = {name: tuple(t.shape) for name, t in twin.params.items()}
    return Proof(
        list(gathered((_labels(units, s) for s in _seen(p, solution)), parts, shapes)),
        _origins(units, solution),
        [named for s in solution.symmetries if (named := _named(units, s, shapes))],
        _unexercised(p, units),
        {units.owner[unit][0] for unit in p.looked_up},
        p.random_path,
        list(dict.fromkeys(p.failures)),
    )


def _run(p: Propagation, units: _Units, twin: Twin, seed: int) -> None:
    """Run the twin with degrees attached; equations add up in ``p``."""
    with torch.no_grad(), sdpa_kernel([SDPBackend.MATH]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the missing gradients; the probes have shown others
        session = twin.session(seed, eps=TINY_EPS, dropout=True, on_escape=p.escape)
        with session, p.modules(twin.module):
            inputs = twin.fresh_inputs()
            for t in [*pytree.tree_leaves(inputs), *twin.tensors()]:
                if isinstance(t, Tensor):
                    p.mark_data(t)
            for name, t in twin.params.items():
                p.set(t, units.degree(p, name, t))
            before = drawn_by_python()
            with p:
                outs = twin.outputs(inputs)
            p.random_path |= drawn_by_python() != before
            p.demand_no_degree(outs)


def _seen(p: Propagation, solution: Solution) -> list[list[int]]:
    """Return the spheres that mean something: an operation used them.

    Rows of an embedding are alike, so that those not looked up share what those that were show.
    """
    exercised = p.forms.units_in(p.seen) | p.looked_up
    return [s for s in solution.spheres if any(unit in exercised for unit in s)]


def _labels(units: _Units, sphere: list[int]) -> dict[str, list[int]]:
    """Return name -> labels of the entries of a sphere."""
    labels: dict[str, list[int]] = {}
    for unit in sphere:
        name, label = units.owner[unit]
        labels.setdefault(name, []).append(label)
    return labels


def _origins(units: _Units, solution: Solution) -> dict[str, Origin]:
    origins: dict[str, Origin] = {}
    for unit in sorted(solution.origins):
        origins.setdefault(units.owner[unit][0], solution.origins[unit])
    return origins


def _named(units: _Units, symmetry: Mapping[int, float], shapes: Shapes) -> dict[str, float]:
    """Return name -> exponent if every tensor is scaled as a whole, else nothing."""
    names: dict[str, set[float]] = {}
    for unit in symmetry:
        names.setdefault(units.owner[unit][0], set())
    for name, exponents in names.items():
        start = units.first[name]
        count = units.parts[name].count
        exponents.update(symmetry.get(start + i, 0.0) for i in range(count))
    if any(len(exponents) > 1 for exponents in names.values()):
        return {}
    return {name: names[name].pop() for name in shapes if name in names}


def _unexercised(p: Propagation, units: _Units) -> dict[str, int]:
    exercised = p.forms.units_in(p.seen)
    missing: dict[str, int] = {}
    for unit, (name, label) in enumerate(units.owner):
        if unit not in exercised:
            indices = int((units.parts[name].labels == label).sum())
            missing[name] = missing.get(name, 0) + indices
    return missing

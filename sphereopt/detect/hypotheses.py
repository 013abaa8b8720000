"""From the numbers: which spheres may be there, to be proved and certified.

For every parameter, alone and then with the bias beside it, the finest partition whose Euler sums
all vanish. The partitions are also the unknowns of the proof, which is cheap because most tensors
of most networks have none and enter it as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch

from .claims import Claim, Shapes, bias_of
from .euler import Probe, read
from .partition import Partition


@final
@dataclass(frozen=True, slots=True)
class Hypotheses:
    """What the numbers suggest.

    Attributes:
        claims: Claims that pass Euler's test, a parameter in one at most.
        units: Name -> partition into unknowns for the proof.
        inert: Names of parameters that get no gradient in any probe.
    """

    claims: list[Claim]
    units: dict[str, Partition]
    inert: set[str]


def hypotheses(probes: Sequence[Probe], shapes: Shapes, real: Probe) -> Hypotheses:
    """Test all candidates against the probes.

    Args:
        probes: At generic points, with the normalization eps removed.
        shapes: Name -> shape of the parameters, in the model's order.
        real: At the model's own weights, where no dropout hides a signal.
    """
    # A bias that starts at zero has a gradient and no product with it.
    pulled = {name for name in shapes if real.pulls(name)}
    unseen = {
        name
        for name in shapes
        if name not in pulled and not read([*probes, real], _whole(name, shapes)).seen.any()
    }
    claims: list[Claim] = []
    units: dict[str, Partition] = {}
    for name in shapes:
        if name in units or not torch.Size(shapes[name]).numel():
            continue
        bias = bias_of(name, shapes)
        if bias is not None and (bias in units or len(shapes[bias]) != 1):
            bias = None
        claim = None if name in unseen else _finest(probes, shapes, name, bias)
        if claim is not None:
            claims.append(claim)
            units.update((n, _covering(part)) for n, part in claim.parts.items())
            if bias is not None and bias not in units:
                # Alone it says nothing, but a ReLU that is never off may hide that it belongs here.
                units.update(_like(claim.parts[name], bias, shapes))
        if name not in units and not read(probes, _whole(name, shapes)).seen.any():
            # No signal at the generic point: the proof has to do without a hint.
            units[name] = next(candidates((name,), shapes), _whole(name, shapes)).parts[name]
        units.setdefault(name, Partition.whole(shapes[name]))
    return Hypotheses(claims, {name: units[name] for name in shapes if name in units}, unseen)


def _whole(name: str, shapes: Shapes) -> Claim:
    return Claim({name: Partition.whole(shapes[name])})


def _covering(part: Partition) -> Partition:
    """Return the partition with what is on no sphere as one more part."""
    return Partition(part.axis, torch.where(part.labels < 0, part.count, part.labels))


def _like(part: Partition, bias: str, shapes: Shapes) -> dict[str, Partition]:
    if len(part.labels) != shapes[bias][0]:
        return {}
    return {bias: _covering(Partition(0, part.labels))}


def _finest(probes: Sequence[Probe], shapes: Shapes, name: str, bias: str | None) -> Claim | None:
    sets = [(name,)] if bias is None else [(name,), (name, bias)]
    for names in sets:
        # Sums of zeros are zero: no partition passes if the whole does not.
        whole = Claim({n: Partition.whole(shapes[n]) for n in names})
        passes = read(probes, whole).worst <= probes[0].precision.euler
        for claim in candidates(names, shapes) if passes else ():
            reading = read(probes, claim)
            if reading.worst <= probes[0].precision.euler and reading.seen.any():
                return claim
    partial = [_partial(probes, names, shapes) for names in sets]
    return max((c for c in partial if c is not None), key=_covered, default=None)


def _covered(claim: Claim) -> int:
    return int((next(iter(claim.parts.values())).labels >= 0).sum())


def candidates(names: Sequence[str], shapes: Shapes) -> Iterator[Claim]:
    """Yield the partitions that a weight, or a weight and its bias, may have; finest first.

    Args:
        names: A parameter, or several that are split alike along dim 0; for columns the later ones
            are vectors as long as dim 1 of the first.
        shapes: Name -> shape.
    """
    first, rest = shapes[names[0]], [shapes[name] for name in names[1:]]
    options = []
    if first and all(shape[:1] == first[:1] for shape in rest):
        n = first[0]
        ks = [k for k in range(n, 1, -1) if n % k == 0]
        options = [{name: Partition.blocks(n, k) for name in names} for k in ks]
    if len(first) > 1 and first[1] > 1 and all(tuple(s) == (first[1],) for s in rest):
        columns = {name: Partition.blocks(first[1], first[1]) for name in names[1:]}
        by_column = {names[0]: Partition.blocks(first[1], first[1], axis=1), **columns}
        options.insert(1 if options and options[0][names[0]].count == first[0] else 0, by_column)
    options.append({name: Partition.whole(shapes[name]) for name in names})
    for parts in options:
        claim = Claim(parts)
        if claim.has_directions(shapes) and claim.spec(shapes) is not None:
            yield claim


def _partial(probes: Sequence[Probe], names: Sequence[str], shapes: Shapes) -> Claim | None:
    """Return the blocks of dim 0 that pass by themselves, of each size those no finer one has."""
    shape = shapes[names[0]]
    if len(shape) < 2 or any(shapes[name][:1] != shape[:1] for name in names):
        return None
    n = shape[0]
    labels, number = torch.full((n,), -1), 0
    for size in (size for size in range(1, n) if n % size == 0):
        blocks = Partition.blocks(n, n // size)
        claim = Claim(dict.fromkeys(names, blocks))
        if not claim.has_directions(shapes):
            continue
        reading = read(probes, claim)
        passing = (reading.ratio <= probes[0].precision.euler) & reading.seen
        for block in passing.nonzero().flatten().tolist():
            rows = slice(block * size, (block + 1) * size)
            if bool((labels[rows] < 0).all()):
                labels[rows] = number
                number += 1
    if number == 0:
        return None
    # In the order of the rows, whatever size was found first.
    order = {label: i for i, label in enumerate(dict.fromkeys(labels[labels >= 0].tolist()))}
    ordered = torch.tensor([order.get(label, -1) for label in labels.tolist()])
    claim = Claim(dict.fromkeys(names, Partition(0, ordered)))
    return claim if claim.spec(shapes) is not None else None


def refined(
    claims: Sequence[Claim], units: Mapping[str, Partition], probes: Sequence[Probe], shapes: Shapes
) -> dict[str, Partition] | None:
    """Return finer unknowns, if tensors that were proved jointly as wholes split jointly.

    Args:
        claims: What was proved with ``units``.
        units: The unknowns so far.
        probes: At generic points.
        shapes: Name -> shape.
    """
    finer: dict[str, Partition] = {}
    for claim in claims:
        if len(claim.parts) < 2 or claim.count > 1:
            continue
        for candidate in candidates(claim.names, shapes):
            reading = read(probes, candidate)
            if reading.worst <= probes[0].precision.euler and candidate.count > 1:
                finer.update(candidate.parts)
                break
    return {**units, **finer} if finer else None

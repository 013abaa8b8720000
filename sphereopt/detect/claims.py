"""A claim: spheres that run over the same parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch

from .partition import Partition

Shapes = Mapping[str, Sequence[int]]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """Sphere number i consists of the entries labelled i of every member.

    Attributes:
        parts: Name -> partition; all have the same number of spheres.
    """

    parts: Mapping[str, Partition]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the members."""
        return tuple(self.parts)

    @property
    def count(self) -> int:
        """Number of spheres."""
        return next(iter(self.parts.values())).count

    def spec(self, shapes: Shapes) -> str | None:
        """Return the one spec that says these spheres for every member, or None."""
        if self.count == 1 and len(self.parts) > 1 and all(p.full for p in self.parts.values()):
            return "tensor"  # also of members with a single row
        specs = {name: part.spec(shapes[name]) for name, part in self.parts.items()}
        if "col" in specs.values():  # the bias of a transposed convolution goes by its only dim
            vectors = {name for name in specs if len(shapes[name]) == 1 and specs[name] == "row"}
            specs.update(dict.fromkeys(vectors, "col"))
        return next(iter(specs.values())) if len(set(specs.values())) == 1 else None

    def coarser(self) -> Claim:
        """Return the claim with all its spheres as one."""
        one = {
            name: Partition(part.axis, torch.where(part.labels < 0, -1, 0))
            for name, part in self.parts.items()
        }
        return Claim(one)

    def has_directions(self, shapes: Shapes) -> bool:
        """Return whether the spheres have more than one entry; a single one cannot turn."""
        entries = 0
        for name, part in self.parts.items():
            n = torch.Size(shapes[name]).numel()
            on = int((part.labels >= 0).sum())
            entries += n * on // max(len(part.labels), 1)
        return entries > self.count


def gathered(
    spheres: Iterable[Mapping[str, Sequence[int]]], parts: Mapping[str, Partition], shapes: Shapes
) -> Iterator[Claim]:
    """Yield claims from single spheres, expressible ones, a parameter in at most one of them.

    Args:
        spheres: For each sphere, name -> labels (in ``parts``) of its entries.
        parts: Name -> partition.
        shapes: Name -> shape.
    """
    by_names: dict[frozenset[str], list[Mapping[str, Sequence[int]]]] = {}
    for sphere in spheres:
        by_names.setdefault(frozenset(sphere), []).append(sphere)
    taken: set[str] = set()
    for names, group in sorted(by_names.items(), key=lambda item: -len(item[1])):
        if taken.isdisjoint(names):
            claim = _expressible(_claim(sorted(names), group, parts), shapes)
            if claim is not None:
                taken |= names
                yield claim


def _claim(
    names: Sequence[str],
    group: Sequence[Mapping[str, Sequence[int]]],
    parts: Mapping[str, Partition],
) -> Claim:
    group = sorted(group, key=lambda sphere: sphere[names[0]][0])
    numbered = {}
    for name in names:
        part = parts[name]
        number = torch.full((part.count,), -1)
        old = [label for sphere in group for label in sphere[name]]
        new = [i for i, sphere in enumerate(group) for _ in sphere[name]]
        number[torch.tensor(old)] = torch.tensor(new)
        numbered[name] = Partition(part.axis, number[part.labels])
    return Claim(numbered)


def _expressible(claim: Claim, shapes: Shapes) -> Claim | None:
    for form in (claim, claim.coarser()):
        if form.spec(shapes) is not None:
            return form if form.has_directions(shapes) else None
    return None


_COMPUTED = re.compile(r"parametrizations\.(\w+)\.original\d?$")


def bias_of(name: str, names: Mapping[str, object]) -> str | None:
    """Return the name of the bias beside a weight, by name; a guess to be tested, not a fact."""
    plain = _COMPUTED.sub(r"\1", name)
    module, _, leaf = plain.rpartition(".")
    if "weight" not in leaf:
        return None
    leaf = re.sub("weight(_v)?", "bias", leaf, count=1)
    bias = f"{module}.{leaf}" if module else leaf
    return bias if bias in names and bias != name else None

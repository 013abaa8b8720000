"""Degrees of homogeneity as numbers: linear forms in unknown exponents, and equations on them.

Scale the weights of unit ``i`` by ``c**s_i``. A quantity computed from them has degree
``d = sum_i k_i s_i`` if it is multiplied by ``c**d``. Such a form is a tuple of (unit, k); equal
forms have equal ids, so that a tensor of degrees is an integer tensor and most arithmetic is done
once per distinct pair. Coefficients are dyadic rationals, on which float arithmetic is exact.

This is inference of units of measure with one unknown unit per sphere.

References:
    Types for units-of-measure: theory and practice, Andrew Kennedy, 2009.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

#: Id of a value that is 0 or infinite whatever the weights: it has every degree.
ANY = 0
#: Id of degree zero.
ZERO = 1

Form = tuple[tuple[int, float], ...]


@final
@dataclass(frozen=True, slots=True)
class Origin:
    """Where an equation came from: the first operation that asked for it, and its module.

    Attributes:
        op: Name of the operation.
        module: Name of the module, empty for the model itself.
        equality: It puts together things that must scale alike, rather than being of a kind that
            takes only what does not scale.
    """

    op: str
    module: str
    equality: bool = False


@final
class Forms:
    """Linear forms by id, and the equations ``form = 0`` collected so far.

    Attributes:
        table: Id -> form; ``table[ANY]`` is a placeholder.
        equations: Id of a form that must vanish -> what asked for it first.
    """

    def __init__(self) -> None:
        self.table: list[Form] = [(), ()]
        self.equations: dict[int, Origin] = {}
        self._ids: dict[Form, int] = {(): ZERO}
        self._sums: dict[tuple[int, int, float], int] = {}

    def unit(self, index: int) -> int:
        """Return the id of the degree of unit ``index`` itself."""
        return self._id(((index, 1.0),))

    def _id(self, form: Form) -> int:
        known = self._ids.get(form)
        if known is None:
            known = self._ids[form] = len(self.table)
            self.table.append(form)
        return known

    def _plus(self, a: int, b: int, factor: float) -> int:
        """Return the id of ``a + factor*b``; ANY absorbs."""
        if a == ANY or b == ANY:
            return ANY
        if b == ZERO:
            return a
        key = (a, b, factor)
        known = self._sums.get(key)
        if known is None:
            form = dict(self.table[a])
            for unit, k in self.table[b]:
                form[unit] = form.get(unit, 0.0) + factor * k
            terms = ((unit, k) for unit, k in form.items() if k != 0)
            known = self._sums[key] = self._id(tuple(sorted(terms)))
        return known

    def add(self, a: Tensor, b: Tensor, factor: float = 1.0) -> Tensor:
        """Return the ids of ``a + factor*b``, broadcast."""
        if a.numel() == 1 and b.numel() == 1:
            value = self._plus(int(a), int(b), factor)
            return torch.full([1] * max(a.ndim, b.ndim), value)
        if b.numel() == 1 and int(b) == ZERO:
            return a if a.ndim >= b.ndim else a.reshape([1] * (b.ndim - a.ndim) + list(a.shape))
        a, b = broadcast(a, b)
        pairs, inverse = _pairs(a, b)
        sums = torch.tensor([self._plus(x, y, factor) for x, y in pairs], dtype=torch.long)
        return sums[inverse].reshape(a.shape)

    def scale(self, a: Tensor, factor: float) -> Tensor:
        """Return the ids of ``factor*a``."""
        unique, inverse = torch.unique(a, return_inverse=True)
        scaled = [x if x == ANY else self._plus(ZERO, x, factor) for x in unique.tolist()]
        return torch.tensor(scaled, dtype=torch.long)[inverse].reshape(a.shape)

    def demand_zero(self, a: Tensor, origin: Origin) -> None:
        """Ask that all of these degrees vanish."""
        for x in _distinct(a):
            if x > ZERO:
                self.equations.setdefault(x, origin)

    def demand_equal(self, a: Tensor, b: Tensor, origin: Origin) -> None:
        """Ask that these degrees agree, elementwise after broadcasting."""
        if a is b:
            return
        if a.numel() == 1 and b.numel() == 1:
            pairs = [(int(a), int(b))]
        else:
            pairs = _pairs(*broadcast(a, b))[0]
        for x, y in pairs:
            if x != y and x != ANY and y != ANY:
                self.equations.setdefault(self._plus(x, y, -1.0), replace(origin, equality=True))

    def units_in(self, ids: Iterable[int]) -> set[int]:
        """Return the units that occur in these forms."""
        return {unit for x in ids for unit, _ in self.table[x]}


def _distinct(a: Tensor) -> list[int]:
    return [int(a)] if a.numel() == 1 else torch.unique(a).tolist()


def _pairs(a: Tensor, b: Tensor) -> tuple[list[tuple[int, int]], Tensor]:
    """Return the distinct pairs of two tensors of one shape, and where each occurs."""
    if a.numel() == 0:
        return [], torch.zeros(0, dtype=torch.long)
    base = int(b.max()) + 1
    unique, inverse = torch.unique((a * base + b).flatten(), return_inverse=True)
    return [divmod(x, base) for x in unique.tolist()], inverse


def broadcast(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return both, expanded to one shape."""
    a, b = torch.broadcast_tensors(a, b)  # type: ignore[no-untyped-call]
    return a, b


def joined(a: Tensor, b: Tensor) -> Tensor:
    """Return one of two degrees that agree: the one that is not ANY."""
    if a is b:
        return a
    if b.numel() == 1 and int(b) == ANY:
        return a if a.ndim >= b.ndim else a.reshape([1] * (b.ndim - a.ndim) + list(a.shape))
    a, b = broadcast(a, b)
    return torch.where(a == ANY, b, a)


def representative(a: Tensor, dim: int) -> Tensor:
    """Return one degree per line along ``dim`` (kept, of size 1), not ANY where there is one."""
    if a.shape[dim] == 1:
        return a
    first = (a != ANY).to(torch.int8).argmax(dim, keepdim=True)
    return a.gather(dim, first)


def compressed(a: Tensor) -> Tensor:
    """Return the tensor with size 1 along the dims on which it is constant."""
    if a.numel() == 1:
        return a
    for dim in range(a.ndim):
        if a.shape[dim] > 1:
            first = a.narrow(dim, 0, 1)
            if bool((a == first).all()):
                a = first
    return a

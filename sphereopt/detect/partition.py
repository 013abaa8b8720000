"""Partitions of a parameter into spheres: labels along one dim, and their spec."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import final

import torch
from torch import Tensor


@final
@dataclass(frozen=True, slots=True, eq=False)
class Partition:
    """Which sphere each index of a dim belongs to.

    Attributes:
        axis: The dim, 0 or 1.
        labels: Shape (size of the dim,): number of the sphere, -1 for none.
    """

    axis: int
    labels: Tensor

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Partition:
        """Return the partition into one sphere."""
        return cls(0, torch.zeros(shape[0] if shape else 1, dtype=torch.long))

    @classmethod
    def blocks(cls, n: int, k: int, axis: int = 0) -> Partition:
        """Return the partition of n indices into k equal runs."""
        return cls(axis, torch.arange(n) // (n // k))

    @property
    def count(self) -> int:
        """Number of spheres."""
        return int(self.labels.max()) + 1 if len(self.labels) else 0

    @property
    def even(self) -> bool:
        """Whether the spheres are equal runs that cover everything, in order."""
        n, k = len(self.labels), self.count
        return k > 0 and n % k == 0 and torch.equal(self.labels, torch.arange(n) // (n // k))

    def sums(self, values: Tensor) -> Tensor:
        """Return sums over the indices of each sphere: ``(..., size)`` to ``(..., count)``."""
        if self.even:
            return values.reshape(*values.shape[:-1], self.count, -1).sum(-1)
        on = self.labels >= 0
        zeros = values.new_zeros(*values.shape[:-1], self.count)
        return zeros.index_add(-1, self.labels[on], values[..., on])

    @property
    def full(self) -> bool:
        """Whether every index is on a sphere."""
        return bool((self.labels >= 0).all())

    def along(self, ndim: int, values: Tensor) -> Tensor:
        """Return one value per index, shaped to broadcast against the parameter.

        Args:
            ndim: Dims of the parameter.
            values: Value of each sphere, and one more for indices on none.
        """
        per_index = values[self.labels]  # -1 picks the last
        if ndim == 0:
            return per_index.reshape([])
        return per_index.reshape([-1 if d == self.axis else 1 for d in range(ndim)])

    def spec(self, shape: Sequence[int]) -> str | None:
        """Return the spec of these spheres, or None if the language of specs has none."""
        if len(self.labels) == 0 or not bool((self.labels >= 0).any()):
            return None
        if self.count == 1 and self.full and (self.axis == 1 or len(self.labels) > 1):
            return "tensor"
        if self.axis == 1:
            return "col" if self.full and self.count == shape[1] else None
        if not shape:
            return "tensor"
        runs = list(_runs(self.labels.tolist()))
        if len({label for label, *_ in runs}) != len(runs):
            return None  # a sphere of indices that are not in a row
        pieces = list(_pieces(runs))
        if len(pieces) == 1 and pieces[0][1:] == (0, shape[0]):
            return pieces[0][0]
        return ",".join(f"{kind}@{start}:{stop}" for kind, start, stop in pieces)


def _runs(labels: list[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (label, start, stop) of the runs of equal labels that are on a sphere."""
    start = 0
    for label, run in groupby(labels):
        stop = start + len(list(run))
        if label >= 0:
            yield label, start, stop
        start = stop


def _pieces(runs: list[tuple[int, int, int]]) -> Iterator[tuple[str, int, int]]:
    """Yield (kind, start, stop) of what adjacent runs of equal size make up."""
    pending: list[tuple[int, int, int]] = []
    for run in [*runs, (-1, -1, -1)]:
        if pending:
            size = pending[0][2] - pending[0][1]
            if run[1] != pending[-1][2] or run[2] - run[1] != size:
                k, start, stop = len(pending), pending[0][1], pending[-1][2]
                kind = "row" if size == 1 else "tensor" if k == 1 else f"block:{k}"
                yield kind, start, stop
                pending = []
        pending.append(run)

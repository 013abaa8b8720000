"""Slabs: the portions of work of a step, of a size that suits the machine.

Three ways to arrange many tensors: small ones of like shape are *stacked* into one working tensor
(fewer operations), large ones are *cut* into runs of spheres (temporaries stay in cache), and what
results is *gathered* into slabs that share the arithmetic of their per-sphere numbers. The members
of a joint sphere stay together throughout. The step sees lists of tensors and how many of them in
a row share spheres, and never learns which of these happened.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sphereopt.products import NARROW, accumulator

__all__ = ["Block", "Slab", "slabs"]

# Tensors of at most SMALL entries are stacked, at least STACK of them; a slab has about LARGE
# entries, the size of its temporaries: cache-resident on a CPU, a bounded extra on a GPU.
# Chosen with benchmarks/step_time.py.
SMALL, STACK, LARGE = 8192, 3, {"cpu": 1 << 19}
ELSEWHERE = 1 << 25


@dataclass(slots=True)
class Block:
    """The spheres of one tensor, or of the member tensors of a joint group, as ``(k, ...)`` views.

    A spec of several pieces makes a block of each, and one of every run of rows between them, which
    are on no sphere: *ordinary* rows.

    Attributes:
        name: Name of the (first) parameter.
        weights: One view per member.
        grads: One view per member.
        buffers: State key to one view per member.
        radius: Stored norms, shape ``(k,)``; None for ordinary rows.
        virtual_radius: Believed norms, shape ``(k,)``, or None.
        step: How many steps the spheres have made, this one included.
    """

    name: str
    weights: list[Tensor]
    grads: list[Tensor]
    buffers: dict[str, list[Tensor]]
    radius: Tensor | None
    virtual_radius: Tensor | None
    step: int

    def rows(self, start: int, stop: int) -> Block:
        """Return the block of the spheres from start to stop, sharing memory."""

        def cut(xs: list[Tensor]) -> list[Tensor]:
            return [x[start:stop] for x in xs]

        return Block(
            self.name,
            cut(self.weights),
            cut(self.grads),
            {key: cut(xs) for key, xs in self.buffers.items()},
            None if self.radius is None else self.radius[start:stop],
            None if self.virtual_radius is None else self.virtual_radius[start:stop],
            self.step,
        )


def _gather(homes: list[Tensor]) -> Tensor:
    """Return one working tensor for several homes: the home itself if it can be worked on."""
    if homes[0].dtype in NARROW:
        homes = [x.to(accumulator(x.dtype)) for x in homes]
    return homes[0] if len(homes) == 1 else torch.cat(homes)


class Slab:
    """Blocks that are stepped together: one dtype, one device, lists of tensors.

    Attributes:
        bunches: Where the numbers live; the blocks of a bunch are stacked into one.
        members: How many tensors in a row share spheres.
        weights: Working tensors ``(k, ...)``, float32 or wider.
        grads: Likewise; never written to, they may be the user's own ``.grad``.
        buffers: Likewise, per state key.
        steps: For each tensor, how many steps its spheres have made, this one included.
        radius: Stored norms of all spheres in a row; None if these are ordinary rows.
        virtual_radius: Believed norms, or None.
    """

    def __init__(self, bunches: Sequence[Sequence[Block]]) -> None:
        self.bunches = bunches
        self.members = [len(bunch[0].weights) for bunch in bunches]
        self._away: list[tuple[Tensor, list[Tensor]]] = []
        self.weights = self._work([[b.weights for b in bunch] for bunch in bunches])
        self.grads = self._work([[b.grads for b in bunch] for bunch in bunches], keep=False)
        self.buffers = {
            key: self._work([[b.buffers[key] for b in bunch] for bunch in bunches])
            for key in bunches[0][0].buffers
        }
        steps = zip(bunches, self.members, strict=True)
        self.steps = [bunch[0].step for bunch, m in steps for _ in range(m)]
        blocks = [block for bunch in bunches for block in bunch]
        radius = [b.radius for b in blocks if b.radius is not None]
        self.radius = _gather(radius) if radius else None
        virtual = [b.virtual_radius for b in blocks if b.virtual_radius is not None]
        self.virtual_radius = self._come(virtual) if virtual else None

    def _work(self, bunches: list[list[list[Tensor]]], keep: bool = True) -> list[Tensor]:
        """Return a working tensor per bunch and member."""
        take = self._come if keep else _gather
        return [take(list(homes)) for bunch in bunches for homes in zip(*bunch, strict=True)]

    def _come(self, homes: list[Tensor]) -> Tensor:
        """Gather, and remember to write back what is a copy."""
        work = _gather(homes)
        if work is not homes[0]:
            self._away.append((work, homes))
        return work

    def write_back(self) -> None:
        """Bring working copies of weights, buffers and virtual radii back home, rounding once."""
        for work, homes in self._away:
            torch._foreach_copy_(homes, list(torch.split(work, [x.shape[0] for x in homes])))


def _size(block: Block) -> int:
    return sum(w.numel() for w in block.weights)


def _stackable(block: Block) -> bool:
    w = block.weights[0]
    return len(block.weights) == 1 and w.ndim == 2 and w.numel() <= SMALL


def _bunches(blocks: Sequence[Block], stack: bool) -> Iterator[list[Block]]:
    """Yield lists of blocks to stack; a block that is not stacked comes alone."""
    if not stack:
        yield from ([block] for block in blocks)
        return
    buckets: dict[object, list[Block]] = {}
    for block in blocks:
        w = block.weights[0]
        kind = (block.radius is None, w.dtype, w.device)
        key = (*kind, w.shape[1], block.step) if _stackable(block) else id(block)
        buckets.setdefault(key, []).append(block)
    for bucket in buckets.values():
        yield from [bucket] if len(bucket) >= STACK else [[block] for block in bucket]


def _runs(block: Block, limit: int) -> Iterator[Block]:
    """Yield runs of the spheres of a block, of about ``limit`` entries."""
    k, size = block.weights[0].shape[0], _size(block)
    rows = k if size <= limit else max(1, limit * k // size)
    for start in range(0, k, rows):
        yield block if rows == k else block.rows(start, min(k, start + rows))


def slabs(blocks: Sequence[Block], *, stack: bool) -> Iterator[Slab]:
    """Arrange the blocks of a group into slabs; together they hold every block exactly once.

    Args:
        blocks: The blocks of one parameter group.
        stack: Put small blocks of like shape under each other.

    Yields:
        Slabs, in no order that matters.
    """
    waiting: dict[object, list[list[Block]]] = {}
    sizes: dict[object, int] = {}
    for bunch in _bunches(blocks, stack):
        w = bunch[0].weights[0]
        limit = LARGE.get(w.device.type, ELSEWHERE)
        key = (bunch[0].radius is None, w.dtype, w.device)
        parts = [bunch] if len(bunch) > 1 else [[run] for run in _runs(bunch[0], limit)]
        for part in parts:
            size = sum(_size(block) for block in part)
            if sizes.get(key, 0) + size > limit and key in waiting:
                yield Slab(waiting.pop(key))
                sizes[key] = 0
            waiting.setdefault(key, []).append(part)
            sizes[key] = sizes.get(key, 0) + size
    for bunches in waiting.values():
        yield Slab(bunches)

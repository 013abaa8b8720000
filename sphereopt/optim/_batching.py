"""Slabs: the pieces of work of a step, of a size that suits the machine.

Two axes organize many tensors: *stacking* puts spheres of several small tensors under each other
(fewer, larger operations), *cutting* takes a large tensor a run of spheres at a time (temporaries
stay in cache and off the page-fault path). A joint sphere is a list of tensors in either case.
The step sees a slab and never learns which of these happened.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Block", "Slab", "slabs"]

# Tensors of at most SMALL entries are stacked, at least STACK of them; larger ones are cut into
# runs of about LARGE entries. Measured in benchmarks/step_time.py; on a GPU nothing is cut.
SMALL, STACK, LARGE = 8192, 3, 1 << 19


@dataclass(frozen=True, slots=True)
class Block:
    """The spheres of one tensor, or of the member tensors of a joint group, as ``(k, ...)`` views.

    Attributes:
        name: Name of the (first) parameter.
        weights: One view per member.
        grads: One view per member.
        buffers: State key to one view per member.
        radius: Stored norms, shape ``(k,)``.
        virtual_radius: Believed norms, shape ``(k,)``, or None.
        step: How many steps the spheres have made, this one included.
    """

    name: str
    weights: list[Tensor]
    grads: list[Tensor]
    buffers: dict[str, list[Tensor]]
    radius: Tensor
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
            self.radius[start:stop],
            None if self.virtual_radius is None else self.virtual_radius[start:stop],
            self.step,
        )


def _gather(homes: list[Tensor]) -> Tensor:
    """Return one working tensor for several homes: the home itself if it can be worked on."""
    dtype = torch.promote_types(homes[0].dtype, torch.float32)
    return homes[0].to(dtype) if len(homes) == 1 else torch.cat([x.to(dtype) for x in homes])


def _scatter(work: Tensor, homes: list[Tensor]) -> None:
    """Write a working tensor back to its homes, rounding once; nothing to do if it is one."""
    if work is not homes[0]:
        torch._foreach_copy_(homes, list(torch.split(work, [x.shape[0] for x in homes])))


class Slab:
    """Blocks that are stepped together: same members, same number of entries per sphere.

    Attributes:
        blocks: Where the numbers live.
        weights: Working tensors, one per member, ``(k, ...)``, float32 or wider.
        grads: Likewise; never written to, they may be the user's own ``.grad``.
        buffers: Likewise, per state key.
        radius: Shape ``(k,)``.
        virtual_radius: Shape ``(k,)``, or None.
        step: How many steps the spheres have made, this one included.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        first = blocks[0]
        members = range(len(first.weights))
        self.blocks = blocks
        self.step = first.step
        self.weights = [_gather([x.weights[i] for x in blocks]) for i in members]
        self.grads = [_gather([x.grads[i] for x in blocks]) for i in members]
        self.buffers = {
            key: [_gather([x.buffers[key][i] for x in blocks]) for i in members]
            for key in first.buffers
        }
        self.radius = _gather([x.radius for x in blocks])
        virtual = [x.virtual_radius for x in blocks if x.virtual_radius is not None]
        self.virtual_radius = _gather(virtual) if virtual else None

    def write_back(self) -> None:
        """Bring working copies of weights, buffers and virtual radii back home."""
        for i in range(len(self.weights)):
            _scatter(self.weights[i], [x.weights[i] for x in self.blocks])
            for key, works in self.buffers.items():
                _scatter(works[i], [x.buffers[key][i] for x in self.blocks])
        if self.virtual_radius is not None:
            homes = [x.virtual_radius for x in self.blocks if x.virtual_radius is not None]
            _scatter(self.virtual_radius, homes)


def _stackable(block: Block) -> bool:
    w = block.weights[0]
    return len(block.weights) == 1 and w.ndim == 2 and w.numel() <= SMALL


def _pieces(block: Block) -> Iterator[Block]:
    k = block.radius.shape[0]
    size = sum(w.numel() for w in block.weights)
    if block.weights[0].device.type != "cpu" or size <= LARGE or k == 1:
        yield block
        return
    rows = max(1, LARGE * k // size)
    for start in range(0, k, rows):
        yield block.rows(start, min(k, start + rows))


def slabs(blocks: Sequence[Block], *, stack: bool, cut: bool) -> Iterator[Slab]:
    """Arrange the blocks of a group into slabs; together they hold every block exactly once.

    Args:
        blocks: The blocks of one parameter group.
        stack: Put small blocks of like shape under each other.
        cut: Take large blocks a run of spheres at a time. Only for directions that treat every
            entry, or every sphere, by itself.

    Yields:
        Slabs, in no order that matters.
    """
    buckets: dict[object, list[Block]] = {}
    for block in blocks:
        if stack and _stackable(block):
            w = block.weights[0]
            key = (w.shape[1], w.dtype, w.device, block.step)
            buckets.setdefault(key, []).append(block)
        else:
            buckets[id(block)] = [block]
    for bucket in buckets.values():
        if len(bucket) >= STACK:
            yield Slab(bucket)
            continue
        for block in bucket:
            for piece in _pieces(block) if cut else [block]:
                yield Slab([piece])

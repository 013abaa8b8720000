"""Slabs: the portions of work of a step, of a size that suits the machine.

Three ways to arrange many tensors: small ones of like shape are *stacked* into one working tensor
(fewer operations), large ones are *cut* into runs of spheres (temporaries stay in cache), and what
results is *gathered* into slabs that share the arithmetic of their per-sphere numbers. The members
of a joint sphere stay together throughout. The step sees lists of tensors and how many of them in
a row share spheres, and never learns which of these happened.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from sphereopt.optim._rounding import Rounding
from sphereopt.products import NARROW, accumulator

__all__ = ["Block", "Slab", "arrange"]

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
        kind: Kind of the spec, see :mod:`sphereopt.spheres`; None for ordinary rows.
        weights: One view per member.
        grads: One view per member.
        buffers: State key to one view per member.
        numbers: State key to one number per sphere, shape ``(k,)``; empty for ordinary rows.
        rounded: Where ``weights`` is a float32 master copy: the parameter, one view per member.
        step: How many steps the spheres have made, this one included.
        whole: The direction needs all of it at once: neither stacked nor cut.
    """

    name: str
    kind: str | None
    weights: list[Tensor]
    grads: list[Tensor]
    buffers: dict[str, list[Tensor]]
    numbers: dict[str, Tensor]
    rounded: list[Tensor]
    step: int
    whole: bool = False

    def rows(self, start: int, stop: int) -> Block:
        """Return the block of the spheres from start to stop, sharing memory."""

        def cut(xs: list[Tensor]) -> list[Tensor]:
            return [x[start:stop] for x in xs]

        return replace(
            self,
            weights=cut(self.weights),
            grads=cut(self.grads),
            buffers={key: cut(xs) for key, xs in self.buffers.items()},
            numbers={key: x[start:stop] for key, x in self.numbers.items()},
            rounded=cut(self.rounded),
        )

    def likeness(self) -> tuple[object, ...]:
        """Return what blocks must share to be in one slab."""
        w = self.weights[0]
        return self.kind is None, tuple(self.buffers), bool(self.rounded), w.dtype, w.device


def _gather(homes: list[Tensor], copy: bool = False) -> Tensor:
    """Return one working tensor for several homes: the home itself if it can be worked on."""
    if homes[0].dtype in NARROW:
        homes = [x.to(accumulator(x.dtype)) for x in homes]
    if len(homes) > 1:
        return torch.cat(homes)
    return homes[0].clone() if copy else homes[0]


def _homes(bunches: Iterable[list[list[Tensor]]]) -> list[list[Tensor]]:
    """Return the homes of every working tensor, one per bunch and member."""
    return [list(homes) for bunch in bunches for homes in zip(*bunch, strict=True)]


class Slab:
    """Blocks that are stepped together: one dtype, one device, lists of tensors.

    Attributes:
        bunches: Where the numbers live; the blocks of a bunch are stacked into one.
        kinds: For each tensor, the kind of its block.
        members: How many tensors in a row share spheres.
        weights: Working tensors ``(k, ...)``, float32 or wider.
        grads: Likewise; never written to, they may be the user's own ``.grad``.
        buffers: Likewise, per state key.
        numbers: Per state key, the numbers of all spheres in a row; empty for ordinary rows.
        steps: For each tensor, how many steps its spheres have made, this one included.
        ordinary: These rows are on no sphere.
    """

    @_disable_dynamo
    def __init__(self, bunches: Sequence[Sequence[Block]], *, copy: bool = False) -> None:
        """Gather the blocks; ``copy`` makes copies of all that is changed, for autograd."""
        self.bunches, first = bunches, bunches[0][0]
        self.ordinary = first.kind is None
        self.members = [len(bunch[0].weights) for bunch in bunches]
        each = [bunch[0] for bunch in bunches for _ in bunch[0].weights]
        self.steps, self.kinds = [block.step for block in each], [block.kind for block in each]
        self._homes = {
            "weights": _homes([block.weights for block in bunch] for bunch in bunches),
            **{
                key: _homes([block.buffers[key] for block in bunch] for bunch in bunches)
                for key in first.buffers
            },
        }
        blocks = [block for bunch in bunches for block in bunch]
        self._numbers = {key: [block.numbers[key] for block in blocks] for key in first.numbers}
        self.grads = [
            _gather(homes)
            for homes in _homes([block.grads for block in bunch] for bunch in bunches)
        ]
        self.weights = [_gather(homes, copy) for homes in self._homes["weights"]]
        self.buffers = {
            key: [_gather(homes, copy) for homes in self._homes[key]] for key in first.buffers
        }
        self.numbers = {key: _gather(homes, copy) for key, homes in self._numbers.items()}

    @_disable_dynamo
    def write_back(self, rounding: Rounding) -> None:
        """Bring home what was worked on elsewhere; narrow weights are rounded once."""
        for key, works in self.buffers.items():
            for work, homes in zip(works, self._homes[key], strict=True):
                _bring_home(work, homes)
        for key, work in self.numbers.items():
            _bring_home(work, self._numbers[key])
        owners = [bunch for bunch in self.bunches for _ in bunch[0].weights]
        for work, homes, bunch in zip(self.weights, self._homes["weights"], owners, strict=True):
            if homes[0].dtype in NARROW:
                parts = torch.split(work, [x.shape[0] for x in homes])
                rounding.write(list(parts), homes, [block.name for block in bunch])
            else:
                _bring_home(work, homes)
        for bunch in self.bunches:
            for block in bunch:
                if block.rounded:
                    torch._foreach_copy_(block.rounded, block.weights)


def _bring_home(work: Tensor, homes: list[Tensor]) -> None:
    if work is homes[0]:
        return
    parts = list(torch.split(work, [x.shape[0] for x in homes]))
    if not torch.is_grad_enabled():
        torch._foreach_copy_(homes, parts)
        return
    for home, part in zip(homes, parts, strict=True):  # autograd has no _foreach_copy_
        # Another piece of the same tensor was written to: reading grad_fn tells this view so.
        _ = home.grad_fn
        home.copy_(part)


def _size(block: Block) -> int:
    return sum(w.numel() for w in block.weights)


def _stackable(block: Block) -> bool:
    w = block.weights[0]
    return len(block.weights) == 1 and w.ndim == 2 and w.numel() <= SMALL and not block.whole


def _bunches(blocks: Sequence[Block], stack: bool) -> Iterator[list[Block]]:
    """Yield lists of blocks to stack; a block that is not stacked comes alone."""
    if not stack:
        yield from ([block] for block in blocks)
        return
    buckets: dict[object, list[Block]] = {}
    for block in blocks:
        n = block.weights[0].shape[1]
        key = (*block.likeness(), n, block.step) if _stackable(block) else id(block)
        buckets.setdefault(key, []).append(block)
    for bucket in buckets.values():
        yield from [bucket] if len(bucket) >= STACK else [[block] for block in bucket]


def _runs(block: Block, limit: int) -> Iterator[Block]:
    """Yield runs of the spheres of a block, of about ``limit`` entries."""
    k, size = block.weights[0].shape[0], _size(block)
    rows = k if size <= limit or block.whole else max(1, limit * k // size)
    for start in range(0, k, rows):
        yield block if rows == k else block.rows(start, min(k, start + rows))


@_disable_dynamo
def arrange(blocks: Sequence[Block], *, stack: bool) -> list[list[list[Block]]]:
    """Arrange the blocks of a group into slabs; together they hold every block exactly once.

    Args:
        blocks: The blocks of one parameter group.
        stack: Put small blocks of like shape under each other.

    Returns:
        For every slab its bunches, in no order that matters.
    """
    waiting: dict[object, list[list[Block]]] = {}
    sizes: dict[object, int] = {}
    full: list[list[list[Block]]] = []
    for bunch in _bunches(blocks, stack):
        key = bunch[0].likeness()
        limit = LARGE.get(bunch[0].weights[0].device.type, ELSEWHERE)
        parts = [bunch] if len(bunch) > 1 else [[run] for run in _runs(bunch[0], limit)]
        for part in parts:
            size = sum(_size(block) for block in part)
            if sizes.get(key, 0) + size > limit and key in waiting:
                full.append(waiting.pop(key))
                sizes[key] = 0
            waiting.setdefault(key, []).append(part)
            sizes[key] = sizes.get(key, 0) + size
    return full + list(waiting.values())

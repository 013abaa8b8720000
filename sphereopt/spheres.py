"""Spheres: which entries of a tensor share one norm.

A spec string names the sphere every entry belongs to:

=============  ==============================  ================================
spec           one sphere is                   typical weight
=============  ==============================  ================================
``"tensor"``   the whole tensor                a linear layer before LayerNorm
``"row"``      one index of dim 0              conv filters before BatchNorm
``"col"``      one index of dim 1              transposed convolutions
``"block:K"``  one of K equal runs of dim 0    attention heads, GroupNorm
=============  ==============================  ================================

All but ``"col"`` may be limited to rows of dim 0, and such *pieces* joined by commas:
``"block:8@0:512,block:8@512:1024"`` are the eight query and eight key heads of a fused attention
weight whose values, from row 1024 on, are on no sphere. Every piece is a spec itself.

Everything else in the package sees a tensor through :func:`view`: the same memory with the sphere
index first, ``(k, ...)``, one view per piece.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["SphereSpec", "check", "count", "parse", "pieces", "rest", "split", "view", "views"]

_PIECE = re.compile(r"(tensor|row|col|block:([1-9][0-9]*))(?:@(0|[1-9][0-9]*):([1-9][0-9]*))?")


class SphereSpec(NamedTuple):
    """A parsed piece of a sphere spec; ``str`` gives the string back.

    Attributes:
        kind: ``"tensor"``, ``"row"``, ``"col"`` or ``"block"``.
        blocks: Number of blocks along dim 0; 1 unless ``kind`` is ``"block"``.
        start: First row of dim 0.
        stop: The row after the last, or None for all rows.

    Example:
        >>> parse("block:8")
        SphereSpec(kind='block', blocks=8, start=0, stop=None)
    """

    kind: str
    blocks: int = 1
    start: int = 0
    stop: int | None = None

    def __str__(self) -> str:
        name = f"block:{self.blocks}" if self.kind == "block" else self.kind
        return name if self.stop is None else f"{name}@{self.start}:{self.stop}"

    def size(self, shape: Sequence[int]) -> int:
        """Return the number of rows of dim 0 that it covers in a tensor of this shape."""
        return (shape[0] if self.stop is None else self.stop) - self.start


@lru_cache(maxsize=256)
def parse(sphere: str) -> SphereSpec:
    """Return the parsed form of a spec string of one piece.

    Args:
        sphere: ``"tensor"``, ``"row"``, ``"col"`` or ``"block:K"`` with K a positive integer; all
            but ``"col"`` may be followed by ``"@START:STOP"``, rows of dim 0.

    Returns:
        The parsed spec.

    Raises:
        ValueError: If the string is none of these.

    Example:
        >>> parse("row@4:8")
        SphereSpec(kind='row', blocks=1, start=4, stop=8)
        >>> parse("filter")
        Traceback (most recent call last):
        ...
        ValueError: sphere='filter' is not a sphere spec; use 'tensor', 'row', 'col' or 'block:K',
        or pieces like 'block:8@0:512,row@512:520'
    """
    found = _PIECE.fullmatch(sphere) if isinstance(sphere, str) else None
    if found is None and isinstance(sphere, str) and "," in sphere:
        raise ValueError(f"sphere={sphere!r} has several pieces; take them one by one, by pieces()")
    if found is None:
        raise ValueError(
            f"sphere={sphere!r} is not a sphere spec; use 'tensor', 'row', 'col' or 'block:K', "
            "or pieces like 'block:8@0:512,row@512:520'"
        )
    name, blocks, start, stop = found.groups()
    ends = (int(start), int(stop)) if stop else (0, None)
    spec = SphereSpec(name.partition(":")[0], int(blocks or 1), *ends)
    if spec.stop is not None and spec.kind == "col":
        raise ValueError(f"sphere={sphere!r} limits columns to some rows; use 'col' alone")
    if spec.stop is not None and spec.start >= spec.stop:
        raise ValueError(f"sphere={sphere!r} has no rows; START must be less than STOP")
    return spec


@lru_cache(maxsize=256)
def pieces(sphere: str) -> tuple[str, ...]:
    """Return the pieces of a spec string, each of them a spec itself.

    Args:
        sphere: One spec, or several with ranges of rows, joined by commas.

    Returns:
        One string per piece, in the order of their rows.

    Raises:
        ValueError: If a piece is not a spec, lacks its range, or begins before the last one ends.

    Example:
        >>> pieces("row"), pieces("block:2@0:8,row@8:12")
        (('row',), ('block:2@0:8', 'row@8:12'))
    """
    parts = tuple(sphere.split(",")) if isinstance(sphere, str) else (sphere,)
    if len(parts) == 1:
        parse(sphere)
        return parts
    try:
        specs = [parse(part) for part in parts]
    except ValueError as error:
        raise ValueError(f"sphere={sphere!r} has a wrong piece: {error}") from None
    for part, spec in zip(parts, specs, strict=True):
        if spec.stop is None:
            raise ValueError(
                f"sphere={sphere!r} has several pieces, so {part!r} needs its rows: "
                f"'{part}@START:STOP'"
            )
    for one, two in pairwise(specs):
        if one.stop is None or two.start < one.stop:
            raise ValueError(
                f"sphere={sphere!r} has pieces that overlap or are out of order: '{two}' begins "
                f"before '{one}' ends"
            )
    return parts


def check(sphere: str, shape: Sequence[int], *, joint: bool = False) -> None:
    """Raise a ValueError, saying why, if a tensor of this shape has no such spheres.

    Args:
        sphere: A spec string.
        shape: Shape of the tensor.
        joint: The tensor is one member of a joint sphere, so one entry per sphere is enough, and
            a vector is split by its only dimension.

    Raises:
        ValueError: If the spec does not parse or does not fit the shape.

    Example:
        >>> check("block:3", (8, 4))
        Traceback (most recent call last):
        ...
        ValueError: sphere='block:3' needs a dim 0 that 3 divides; use 'row' or 'tensor'
        >>> check("tensor@0:4,row@4:10", (8, 4))
        Traceback (most recent call last):
        ...
        ValueError: sphere='row@4:10' needs a dim 0 of 10 or more
    """
    for piece in pieces(sphere):
        spec, ndim = parse(piece), len(shape)
        if spec.kind in ("row", "col") and ndim < (1 if joint else 2):
            raise ValueError(
                f"sphere={piece!r} needs two or more dimensions; use 'tensor' or no sphere"
            )
        if spec.stop is not None and (ndim < 1 or shape[0] < spec.stop):
            raise ValueError(f"sphere={piece!r} needs a dim 0 of {spec.stop} or more")
        if spec.kind == "block" and (ndim < 1 or spec.size(shape) % spec.blocks):
            what = "a dim 0" if spec.stop is None else "a number of rows"
            raise ValueError(
                f"sphere={piece!r} needs {what} that {spec.blocks} divides; use 'row' or 'tensor'"
            )


def count(sphere: str, shape: Sequence[int]) -> int:
    """Return how many spheres a tensor of this shape has.

    Args:
        sphere: A spec string that fits the shape.
        shape: Shape of the tensor.

    Returns:
        The number k of spheres, over all pieces.

    Example:
        >>> count("row", (64, 3, 7, 7)), count("col", (64, 3)), count("block:4", (64,))
        (64, 3, 4)
        >>> count("block:2@0:8,row@8:12", (16, 5))
        6
    """
    total = 0
    for spec in map(parse, pieces(sphere)):
        if spec.kind == "row":
            total += spec.size(shape)
        else:
            total += shape[min(1, len(shape) - 1)] if spec.kind == "col" else spec.blocks
    return total


def view(tensor: Tensor, sphere: str) -> Tensor:
    """Return the same memory as ``(k, ...)``: sphere index first, the sphere's entries after it.

    Args:
        tensor: Any dense tensor: any strides, any number of dimensions; a complex one is seen as
            real and imaginary parts.
        sphere: A spec string of one piece that fits its shape; see :func:`split` for several.

    Returns:
        A view with at least two dimensions, never a copy.

    Raises:
        ValueError: If the spec has several pieces.

    Notes:
        Dims are moved and split, never merged, so channels_last and strided tensors work.
        (``weight.view(rows, -1)`` raises on those, and ``weight.flatten(1)`` silently copies,
        which turns an in-place update into nothing.)

    Example:
        >>> w = torch.zeros(8, 3, 5, 5).to(memory_format=torch.channels_last)
        >>> view(w, "row").shape, view(w, "block:4").shape, view(w, "tensor").shape
        (torch.Size([8, 3, 5, 5]), torch.Size([4, 2, 3, 5, 5]), torch.Size([1, 8, 3, 5, 5]))
        >>> view(w, "row").data_ptr() == w.data_ptr()
        True
    """
    spec = parse(sphere)
    x = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if spec.stop is not None:
        x = x[spec.start : spec.stop]
    if spec.kind == "tensor":
        x = x.unsqueeze(0)
    elif spec.kind == "col" and tensor.ndim > 1:  # the bias among joint columns has one dim
        x = x.movedim(1, 0)
    elif spec.kind == "block":
        x = torch.unflatten(x, 0, (spec.blocks, x.shape[0] // spec.blocks))
    return x if x.ndim > 1 else x.unsqueeze(1)


def views(tensors: Sequence[Tensor], sphere: str) -> list[Tensor]:
    """Return the views of tensors of one shape, flattened to ``(k, n)`` where all memory allows.

    Args:
        tensors: A weight, its gradient, its buffers: one shape, any layouts.
        sphere: A spec string of one piece that fits the shape.

    Returns:
        Views of one common shape, never copies.

    Example:
        >>> w = torch.zeros(8, 3, 5, 5)
        >>> [v.shape for v in views([w, w], "row")]
        [torch.Size([8, 75]), torch.Size([8, 75])]
    """
    vs = [view(tensor, sphere) for tensor in tensors]
    if vs[0].ndim == 2 or not all(v.is_contiguous() for v in vs):
        return vs
    return [v.flatten(1) for v in vs]


def split(tensor: Tensor, sphere: str) -> list[Tensor]:
    """Return the views of all pieces: the entries that are on spheres.

    Args:
        tensor: Any dense tensor.
        sphere: A spec string that fits its shape.

    Returns:
        One :func:`view` per piece.

    Example:
        >>> [v.shape for v in split(torch.zeros(16, 5), "block:2@0:8,row@8:12")]
        [torch.Size([2, 4, 5]), torch.Size([4, 5])]
    """
    return [view(tensor, piece) for piece in pieces(sphere)]


def rest(tensor: Tensor, sphere: str) -> list[Tensor]:
    """Return the runs of rows that no piece covers: the entries that are on no sphere.

    Args:
        tensor: Any dense tensor.
        sphere: A spec string that fits its shape.

    Returns:
        Views, in order; none for a spec without ranges.

    Example:
        >>> [x.shape for x in rest(torch.zeros(16, 5), "block:2@2:8,row@8:12")]
        [torch.Size([2, 5]), torch.Size([4, 5])]
    """
    specs = [parse(piece) for piece in pieces(sphere)]
    if specs[0].stop is None:
        return []
    starts = [0, *(spec.stop for spec in specs)]
    stops = [*(spec.start for spec in specs), tensor.shape[0]]
    return [tensor[i:j] for i, j in zip(starts, stops, strict=True) if i != j]

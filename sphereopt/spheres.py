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

Everything else in the package sees a tensor through :func:`view`: the same memory with the sphere
index first, ``(k, ...)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["SphereSpec", "check", "count", "parse", "view", "views"]


class SphereSpec(NamedTuple):
    """A parsed sphere spec.

    Attributes:
        kind: ``"tensor"``, ``"row"``, ``"col"`` or ``"block"``.
        blocks: Number of blocks along dim 0; 1 unless ``kind`` is ``"block"``.

    Example:
        >>> parse("block:8")
        SphereSpec(kind='block', blocks=8)
    """

    kind: str
    blocks: int = 1


@lru_cache(maxsize=256)
def parse(sphere: str) -> SphereSpec:
    """Return the parsed form of a spec string.

    Args:
        sphere: ``"tensor"``, ``"row"``, ``"col"`` or ``"block:K"`` with K a positive integer.

    Returns:
        The parsed spec.

    Raises:
        ValueError: If the string is none of these.

    Example:
        >>> parse("filter")
        Traceback (most recent call last):
        ...
        ValueError: sphere='filter' is not a sphere spec; use 'tensor', 'row', 'col' or 'block:K'
    """
    kind, _, number = str(sphere).partition(":")
    if kind == "block" and number.isdecimal() and int(number) > 0:
        return SphereSpec("block", int(number))
    if sphere in ("tensor", "row", "col"):
        return SphereSpec(sphere)
    raise ValueError(
        f"sphere={sphere!r} is not a sphere spec; use 'tensor', 'row', 'col' or 'block:K'"
    )


def check(sphere: str, shape: Sequence[int], *, joint: bool = False) -> None:
    """Raise a ValueError, saying why, if a tensor of this shape has no such spheres.

    Args:
        sphere: A spec string.
        shape: Shape of the tensor.
        joint: The tensor is one member of a joint sphere, so one entry per sphere is enough.

    Raises:
        ValueError: If the spec does not parse or does not fit the shape.

    Example:
        >>> check("block:3", (8, 4))
        Traceback (most recent call last):
        ...
        ValueError: sphere='block:3' needs a dim 0 that 3 divides; use 'row' or 'tensor'
    """
    spec, ndim = parse(sphere), len(shape)
    if spec.kind == "row" and ndim < (1 if joint else 2):
        raise ValueError("sphere='row' needs two or more dimensions; use 'tensor' or no sphere")
    if spec.kind == "col" and ndim < 2:
        raise ValueError("sphere='col' needs two or more dimensions; use 'tensor' or no sphere")
    if spec.kind == "block" and (ndim < 1 or shape[0] % spec.blocks):
        raise ValueError(
            f"sphere={sphere!r} needs a dim 0 that {spec.blocks} divides; use 'row' or 'tensor'"
        )


def count(sphere: str, shape: Sequence[int]) -> int:
    """Return how many spheres a tensor of this shape has.

    Args:
        sphere: A spec string that fits the shape.
        shape: Shape of the tensor.

    Returns:
        The number k of spheres.

    Example:
        >>> count("row", (64, 3, 7, 7)), count("col", (64, 3)), count("block:4", (64,))
        (64, 3, 4)
    """
    spec = parse(sphere)
    if spec.kind == "tensor":
        return 1
    if spec.kind == "block":
        return spec.blocks
    return shape[0 if spec.kind == "row" else 1]


def view(tensor: Tensor, sphere: str) -> Tensor:
    """Return the same memory as ``(k, ...)``: sphere index first, the sphere's entries after it.

    Args:
        tensor: Any dense tensor: any strides, any number of dimensions; a complex one is seen as
            real and imaginary parts.
        sphere: A spec string that fits its shape.

    Returns:
        A view with at least two dimensions, never a copy.

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
    if spec.kind == "tensor":
        x = x.unsqueeze(0)
    elif spec.kind == "col":
        x = x.movedim(1, 0)
    elif spec.kind == "block":
        x = torch.unflatten(x, 0, (spec.blocks, x.shape[0] // spec.blocks))
    return x if x.ndim > 1 else x.unsqueeze(1)


def views(tensors: Sequence[Tensor], sphere: str) -> list[Tensor]:
    """Return the views of tensors of one shape, flattened to ``(k, n)`` where all memory allows.

    Args:
        tensors: A weight, its gradient, its buffers: one shape, any layouts.
        sphere: A spec string that fits the shape.

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

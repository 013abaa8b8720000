r"""Spheres: which entries of a tensor share one norm, and the sums over them.

A spec string names the sphere every entry belongs to:

=============  ====================================================  ================================
spec           one sphere is                                         typical weight
=============  ====================================================  ================================
``"tensor"``   the whole tensor                                      a linear layer before LayerNorm
``"row"``      one index of dim 0                                    conv filters before BatchNorm
``"col"``      one index of dim 1                                    transposed convolutions
``"block:K"``  one of K equal runs along dim 0                       attention heads, GroupNorm
=============  ====================================================  ================================

Everything else in the package sees a tensor through :func:`view`: the same memory with the sphere
index first, ``(k, ...)``. A sphere that spans several tensors (*joint*: weight and bias before a
LayerNorm) is a list of such views; its inner products are sums over the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sphereopt.moves import Gram

__all__ = ["SphereSpec", "check", "combine", "count", "dot", "gram", "parse", "project", "spread", "view", "views"]


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
    return [v.flatten(1) for v in vs] if all(v.is_contiguous() for v in vs) else vs


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums run: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)


def scalar_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of per-sphere numbers: float64 wherever the device has it."""
    # One number per sphere costs nothing, and cos(angle) - 1 at 1e-4 rad is below float32.
    return torch.float32 if device.type == "mps" else torch.float64


def dot(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    r"""Return :math:`\langle x,y\rangle` per sphere.

    Args:
        xs: Views ``(k, ...)``, one per member tensor of the sphere.
        ys: Views of the same shapes.

    Returns:
        Shape ``(k,)``, float64 where the device has it. Sums run in float32 or wider.

    Notes:
        A multiply and torch's cascaded sum: ``torch.linalg.vector_norm`` and ``torch.dot`` add
        serially in float32 on CPUs and are off by 3e-3 and 1e-3 at 4e7 entries, this by 6e-8.

    Example:
        >>> dot([torch.ones(2, 3)], [torch.full((2, 3), 2.0)])
        tensor([6., 6.], dtype=torch.float64)
    """
    total: Tensor | None = None
    for x, y in zip(xs, ys, strict=True):
        dtype = accumulator(x.dtype)
        part = (x.to(dtype) * y.to(dtype)).sum(dim=tuple(range(1, x.ndim)))
        part = part.to(scalar_dtype(x.device))
        total = part if total is None else total + part
    if total is None:
        raise ValueError("a sphere needs at least one member tensor")
    return total


def gram(ws: Sequence[Tensor], us: Sequence[Tensor], ww: Tensor | None = None) -> Gram:
    """Return the inner products of weights and directions, per sphere.

    Args:
        ws: Weights as views ``(k, ...)``, one per member tensor.
        us: Directions, of the same shapes.
        ww: The squared norm of the weights, if known already.

    Returns:
        Three tensors of shape ``(k,)``.

    Example:
        >>> gram([torch.ones(1, 2)], [torch.ones(1, 2)])
        Gram(ww=tensor([2.], ...), wu=tensor([2.], ...), uu=tensor([2.], ...))
    """
    return Gram(dot(ws, ws) if ww is None else ww, dot(ws, us), dot(us, us))


def spread(scalars: Tensor, x: Tensor) -> Tensor:
    """Shape one number per sphere so that it broadcasts over the view x, in the dtype of x."""
    return scalars.to(x.dtype).reshape(-1, *([1] * (x.ndim - 1)))


def _wide(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """Return both in float32 or wider, and the dtype of their sum: coefficients are not rounded."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(accumulator(dtype)), y.to(accumulator(dtype)), dtype


def combine(a: Tensor, xs: Sequence[Tensor], b: Tensor, ys: Sequence[Tensor]) -> list[Tensor]:
    """Return a*x + b*y with one pair of numbers per sphere.

    Args:
        a: Shape ``(k,)``.
        xs: Views ``(k, ...)``.
        b: Shape ``(k,)``.
        ys: Views of the same shapes.

    Returns:
        New tensors of the shapes of ``xs``.

    Example:
        >>> combine(torch.tensor([2.0]), [torch.ones(1, 2)], torch.tensor([3.0]), [torch.ones(1, 2)])
        [tensor([[5., 5.]])]
    """
    wide = [_wide(x, y) for x, y in zip(xs, ys, strict=True)]
    return [
        torch.addcmul(spread(a, x) * x, spread(b, y), y).to(dtype) for x, y, dtype in wide
    ]


def project(xs: Sequence[Tensor], ws: Sequence[Tensor], ww: Tensor | None = None) -> list[Tensor]:
    r"""Return the tangent part :math:`x - \frac{\langle w,x\rangle}{\langle w,w\rangle}w`.

    Args:
        xs: Views ``(k, ...)``, one per member tensor.
        ws: Weights, of the same shapes; where they are zero, x is returned as it is.
        ww: The squared norm of the weights, if known already.

    Returns:
        New tensors of the shapes of ``xs``.

    Example:
        >>> project([torch.tensor([[1.0, 1.0]])], [torch.tensor([[2.0, 0.0]])])
        [tensor([[0., 1.]])]
    """
    rate = Gram(dot(ws, ws) if ww is None else ww, wu := dot(ws, xs), wu).radial_rate()
    wide = [_wide(x, w) for x, w in zip(xs, ws, strict=True)]
    return [torch.addcmul(x, spread(-rate, w), w).to(dtype) for x, w, dtype in wide]


def tangent_form(
    ws: Sequence[Tensor], us: Sequence[Tensor], gram_of: Gram
) -> tuple[list[Tensor], Gram]:
    """Return the tangent part of u formed explicitly, and its Gram with w.

    Args:
        ws: Weights as views ``(k, ...)``, one per member tensor.
        us: Directions, of the same shapes.
        gram_of: Their Gram.

    Returns:
        New tensors, and a Gram whose ``wu`` is zero. A tangent part that is only the rounding of
        a radial direction counts as zero.

    Notes:
        For moves that divide by its norm: ``uu - wu**2/ww`` is noise once |t|/|u| is below the
        root of the precision, while the vector difference stays good to the precision itself.

    Example:
        >>> w, u = [torch.tensor([[3.0, 4.0]])], [torch.tensor([[0.3, 0.4]])]
        >>> tangent_form(w, u, gram(w, u))[1].uu
        tensor([0.], dtype=torch.float64)
    """
    rate = gram_of.radial_rate()
    ts = combine(torch.ones_like(rate), us, -rate, ws)
    tt = dot(ts, ts)
    noise = 4 * torch.finfo(ts[0].dtype).eps
    tt = torch.where(tt <= noise**2 * gram_of.uu, 0, tt)
    return ts, Gram(gram_of.ww, torch.zeros_like(tt), tt)

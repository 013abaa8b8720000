r"""Inner products of spheres, and the vectors that follow from them.

Tensors come as lists of views ``(k, ...)``, see :func:`sphereopt.spheres.view`. A sphere that spans
several tensors (*joint*: weight and bias before a LayerNorm) is several views in a row; its inner
products are sums over them. Everything else is one view per block of spheres.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from sphereopt.moves import Gram

__all__ = [
    "NARROW",
    "accumulator",
    "combine",
    "dot",
    "gram",
    "mean_square",
    "project",
    "scalar_dtype",
    "scale",
    "spread",
    "square",
    "tangent_form",
]

#: Lengths up to which a serial sum in float32 is good to 1e-6.
_SERIAL = 1 << 16

NARROW = frozenset({torch.bfloat16, torch.float16})


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums run: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)


def widened(x: Tensor) -> Tensor:
    """Return a tensor in the dtype in which sums run; itself, if it is that wide."""
    return x.to(accumulator(x.dtype))


def scalar_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of per-sphere numbers: float64 wherever the device has it."""
    # One number per sphere costs nothing, and cos(angle) - 1 at 1e-4 rad is below float32.
    return torch.float32 if device.type == "mps" else torch.float64


def dot(xs: Sequence[Tensor], ys: Sequence[Tensor], members: Sequence[int] | None = None) -> Tensor:
    r"""Return :math:`\langle x,y\rangle` per sphere.

    Args:
        xs: Views ``(k, ...)``, one per member tensor of the spheres.
        ys: Views of the same shapes.
        members: How many of the tensors in a row share spheres, block by block. By default all
            of them do: they are the members of one joint sphere.

    Returns:
        Shape ``(k,)``, block after block; float64 where the device has it. Sums run in float32
        or wider.

    Notes:
        A multiply and torch's cascaded sum, good to float32's rounding at any length (a test
        holds it to 1e-6 at four million entries). ``torch.linalg.vector_norm`` and ``torch.dot``
        add serially in float32 on CPUs, and lose digits as the length grows.

    Example:
        >>> dot([torch.ones(2, 3)], [torch.full((2, 3), 2.0)])
        tensor([6., 6.], dtype=torch.float64)
    """
    if not xs:
        raise ValueError("a sphere needs at least one member tensor")
    parts = []
    for x, y in zip(xs, ys, strict=True):
        if x.dtype in NARROW or y.dtype in NARROW:
            x, y = x.to(accumulator(x.dtype)), y.to(accumulator(y.dtype))
        parts.append((x * y).sum(1 if x.ndim == 2 else tuple(range(1, x.ndim))))
    return _over_members(parts, members)


def _over_members(parts: list[Tensor], members: Sequence[int] | None) -> Tensor:
    """Add what belongs to one sphere; return one float64 vector."""
    wide = scalar_dtype(parts[0].device)
    sizes = [len(parts)] if members is None else members
    if len(sizes) < len(parts):
        ends = list(accumulate(sizes))
        sums = zip([0, *ends[:-1]], ends, strict=True)
        parts = [torch.stack([p.to(wide) for p in parts[i:j]]).sum(0) for i, j in sums]
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).to(wide)


def square(xs: Sequence[Tensor], members: Sequence[int] | None = None) -> Tensor:
    r"""Return :math:`\langle x,x\rangle` per sphere, faster and less exact than ``dot``.

    Args:
        xs: Views ``(k, ...)``, one per member tensor.
        members: As in :func:`dot`.

    Returns:
        Shape ``(k,)``, as :func:`dot`, to 1e-6 of its value: for numbers that are only watched.

    Notes:
        ``torch.linalg.vector_norm`` makes no temporary. It adds serially, so long rows are cut.

    Example:
        >>> square([torch.full((2, 4), 2.0)])
        tensor([16., 16.], dtype=torch.float64)
    """
    parts = []
    for x in xs:
        flat = x.to(accumulator(x.dtype)).flatten(1)
        if flat.stride(1) == 1:
            runs = [torch.linalg.vector_norm(run, dim=1) for run in torch.split(flat, _SERIAL, 1)]
            parts.append(torch.stack(runs).to(scalar_dtype(x.device)).square().sum(0))
        else:  # columns: reading down them, it would add all of them serially
            parts.append(flat.square().sum(1))
    return _over_members(parts, members)


def mean_square(xs: Sequence[Tensor], members: Sequence[int] | None = None) -> Tensor:
    r"""Return the mean of the squared entries of every sphere.

    Args:
        xs: Views ``(k, ...)``, one per member tensor.
        members: As in :func:`dot`.

    Returns:
        Shape ``(k,)``, as :func:`dot`.

    Example:
        >>> mean_square([torch.tensor([[1.0, 3.0]])])
        tensor([5.], dtype=torch.float64)
    """
    sizes = [len(xs)] if members is None else members
    ends = [0, *accumulate(sizes)]
    entries = [sum(x[0].numel() for x in xs[i:j]) for i, j in pairwise(ends)]
    counts = [xs[i].shape[0] for i in ends[:-1]]
    sums = torch.split(dot(xs, xs, members), counts)
    return torch.cat([x / n for x, n in zip(sums, entries, strict=True)])


def gram(
    ws: Sequence[Tensor],
    us: Sequence[Tensor],
    ww: Tensor | None = None,
    members: Sequence[int] | None = None,
) -> Gram:
    """Return the inner products of weights and directions, per sphere.

    Args:
        ws: Weights as views ``(k, ...)``, one per member tensor.
        us: Directions, of the same shapes.
        ww: The squared norm of the weights, if known already.
        members: As in :func:`dot`.

    Returns:
        Three tensors of shape ``(k,)``.

    Example:
        >>> gram([torch.ones(1, 2)], [torch.ones(1, 2)])
        Gram(ww=tensor([2.], ...), wu=tensor([2.], ...), uu=tensor([2.], ...))
    """
    ww = dot(ws, ws, members) if ww is None else ww
    return Gram(ww, dot(ws, us, members), dot(us, us, members))


def spread(
    scalars: Tensor, xs: Sequence[Tensor], members: Sequence[int] | None = None
) -> list[Tensor]:
    """Shape one number per sphere so that it broadcasts over the views, in their dtype.

    Args:
        scalars: Shape ``(k,)``.
        xs: Views ``(k, ...)``, one per member tensor.
        members: As in :func:`dot`.

    Returns:
        One tensor per view.

    Example:
        >>> [s.shape for s in spread(torch.zeros(5), [torch.ones(2, 4), torch.ones(3, 6)], [1, 1])]
        [torch.Size([2, 1]), torch.Size([3, 1])]
    """
    scalars = scalars.to(xs[0].dtype)
    if members is None:
        return [scalars.reshape(-1, *([1] * (x.ndim - 1))) for x in xs]
    firsts = [0, *accumulate(members)][:-1]
    pieces = torch.split(scalars, [xs[i].shape[0] for i in firsts])
    each = [piece for piece, m in zip(pieces, members, strict=True) for _ in range(m)]
    return [piece.reshape(-1, *([1] * (x.ndim - 1))) for piece, x in zip(each, xs, strict=True)]


def _wide(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """Return both in float32 or wider, and the dtype of their sum: coefficients are not rounded."""
    if x.dtype == y.dtype and x.dtype not in NARROW:
        return x, y, x.dtype
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(accumulator(dtype)), y.to(accumulator(dtype)), dtype


def scale(a: Tensor, xs: Sequence[Tensor], members: Sequence[int] | None = None) -> list[Tensor]:
    """Return a*x with one number per sphere.

    Args:
        a: Shape ``(k,)``.
        xs: Views ``(k, ...)``.
        members: As in :func:`dot`.

    Returns:
        New tensors like ``xs``.

    Example:
        >>> scale(torch.tensor([2.0]), [torch.ones(1, 2)])
        [tensor([[2., 2.]])]
    """
    wide = [x.to(accumulator(x.dtype)) for x in xs]
    factors = spread(a, wide, members)
    return [(c * w).to(x.dtype) for c, w, x in zip(factors, wide, xs, strict=True)]


def combine(
    a: Tensor,
    xs: Sequence[Tensor],
    b: Tensor,
    ys: Sequence[Tensor],
    members: Sequence[int] | None = None,
) -> list[Tensor]:
    """Return a*x + b*y with one pair of numbers per sphere.

    Args:
        a: Shape ``(k,)``.
        xs: Views ``(k, ...)``.
        b: Shape ``(k,)``.
        ys: Views of the same shapes.
        members: As in :func:`dot`.

    Returns:
        New tensors of the shapes of ``xs``.

    Example:
        >>> two, three = torch.tensor([2.0]), torch.tensor([3.0])
        >>> combine(two, [torch.ones(1, 2)], three, [torch.ones(1, 2)])
        [tensor([[5., 5.]])]
    """
    wide = [_wide(x, y) for x, y in zip(xs, ys, strict=True)]
    left = spread(a, [x for x, _, _ in wide], members)
    right = spread(b, [x for x, _, _ in wide], members)
    return [
        torch.addcmul(c * x, d, y).to(dtype)
        for (x, y, dtype), c, d in zip(wide, left, right, strict=True)
    ]


def project(
    xs: Sequence[Tensor],
    ws: Sequence[Tensor],
    ww: Tensor | None = None,
    members: Sequence[int] | None = None,
) -> list[Tensor]:
    r"""Return the tangent part :math:`x - \frac{\langle w,x\rangle}{\langle w,w\rangle}w`.

    Args:
        xs: Views ``(k, ...)``, one per member tensor.
        ws: Weights, of the same shapes; where they are zero, x is returned as it is.
        ww: The squared norm of the weights, if known already.
        members: As in :func:`dot`.

    Returns:
        New tensors of the shapes of ``xs``.

    Example:
        >>> project([torch.tensor([[1.0, 1.0]])], [torch.tensor([[2.0, 0.0]])])
        [tensor([[0., 1.]])]
    """
    ww = dot(ws, ws, members) if ww is None else ww
    wx = dot(ws, xs, members)
    rate = Gram(ww, wx, wx).radial_rate()
    wide = [_wide(x, w) for x, w in zip(xs, ws, strict=True)]
    rates = spread(-rate, [x for x, _, _ in wide], members)
    return [torch.addcmul(x, c, w).to(dtype) for (x, w, dtype), c in zip(wide, rates, strict=True)]


def tangent_form(
    ws: Sequence[Tensor],
    us: Sequence[Tensor],
    ww: Tensor,
    members: Sequence[int] | None = None,
    *,
    inplace: bool = False,
) -> tuple[list[Tensor], Gram]:
    """Return the tangent part of u formed explicitly, and its Gram with w.

    Args:
        ws: Weights as views ``(k, ...)``, one per member tensor.
        us: Directions, of the same shapes.
        ww: The squared norm of the weights, shape ``(k,)``.
        members: As in :func:`dot`.
        inplace: Overwrite the directions.

    Returns:
        The tangent parts, and a Gram whose ``wu`` is zero. A tangent part that is only the
        rounding of a radial direction counts as zero.

    Notes:
        For moves that divide by its norm: ``uu - wu**2/ww`` is noise once |t|/|u| is below the
        root of the precision, while the vector difference stays good to the precision itself.

    Example:
        >>> w, u = [torch.tensor([[3.0, 4.0]])], [torch.tensor([[0.3, 0.4]])]
        >>> tangent_form(w, u, dot(w, w))[1].uu
        tensor([0.], dtype=torch.float64)
    """
    wu = dot(ws, us, members)
    rate = Gram(ww, wu, wu).radial_rate()
    rates = spread(-rate, ws, members)
    add = Tensor.addcmul_ if inplace else torch.addcmul
    ts = [add(u, c, w) for u, c, w in zip(us, rates, ws, strict=True)]
    tt = dot(ts, ts, members)
    noise = 4 * torch.finfo(ts[0].dtype).eps
    tt = tt.masked_fill(tt <= noise**2 * (tt + rate * wu), 0)
    return ts, Gram(ww, torch.zeros_like(tt), tt)

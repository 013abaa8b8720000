r"""Geometry of spheres inside tensors: functions on tensors, at any granularity.

Every function takes a point ``w`` (any shape, dtype and memory layout) and a ``sphere`` spec that
says which entries share a norm; radii are those of the point. Below, per sphere, :math:`r=|w|` and
:math:`\hat w=w/r`. Results have the dtype and layout of their tensor argument, sums run in float32
or wider, and nothing divides zero by zero: a zero sphere is a point, and stays where it is.

Where a spec has pieces, the rows that none of them covers are no part of the geometry: points keep
theirs, and tangent vectors are zero there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sphereopt import moves, products, spheres
from sphereopt.moves import _divide, _root

__all__ = [
    "TRANSPORTS",
    "angle",
    "distance",
    "exp",
    "log",
    "norm",
    "random",
    "retract",
    "tangent",
    "transport",
]

TRANSPORTS = ("project", "parallel", "rescale", "none")


def _checked(sphere: str, *tensors: Tensor) -> tuple[list[Tensor], ...]:
    """Return the pieces of each tensor (of one shape) as ``(k, ...)``, float32 or wider."""
    shape = tensors[0].shape
    spheres.check(sphere, shape)
    for tensor in tensors[1:]:
        if tensor.shape != shape:
            raise ValueError(
                f"the point has shape {tuple(shape)} and the other tensor {tuple(tensor.shape)}; "
                "they must agree"
            )
    # Half precision is widened here and rounded once, in _like.
    return tuple(
        [v.to(products.accumulator(v.dtype)) for v in spheres.split(x, sphere)] for x in tensors
    )


def _apart(views: Sequence[Tensor]) -> list[int]:
    """Return the ``members`` of :mod:`sphereopt.products`: each piece has spheres of its own."""
    return [1] * len(views)


def _like(results: Sequence[Tensor], tensor: Tensor, sphere: str, *, keep: bool = False) -> Tensor:
    """Undo :func:`_checked`; rows without a sphere keep the tensor's values, or are zero."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    specs = [spheres.parse(piece) for piece in spheres.pieces(sphere)]
    if specs[0].stop is None:
        (whole,) = results
        if specs[0].kind == "col":
            whole = whole.reshape(real.movedim(1, 0).shape).movedim(0, 1)
        whole = whole.reshape(real.shape).to(real.dtype)
    else:
        whole = real if keep else torch.zeros_like(real)
        for spec, result in zip(specs, results, strict=True):
            rows = result.reshape(real[spec.start : spec.stop].shape).to(real.dtype)
            whole = whole.slice_scatter(rows, 0, spec.start, spec.stop)
    return torch.view_as_complex(whole) if tensor.is_complex() else whole


def norm(w: Tensor, sphere: str = "tensor") -> Tensor:
    r"""Return the norm :math:`r=\sqrt{\langle w,w\rangle}` of every sphere.

    Args:
        w: The point, any shape.
        sphere: Sphere spec.

    Returns:
        Shape ``(k,)``, float64 where the device has it.

    Raises:
        ValueError: If the spec does not fit the shape.

    Example:
        >>> norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), "row")
        tensor([5., 0.], dtype=torch.float64)
    """
    (vs,) = _checked(sphere, w)
    return _root(products.dot(vs, vs, _apart(vs)))


def tangent(w: Tensor, x: Tensor, sphere: str = "tensor") -> Tensor:
    r"""Return the part of x that is tangent at w: :math:`x - \langle\hat w,x\rangle\,\hat w`.

    Args:
        w: The point, any shape.
        x: Any tensor of the same shape, such as a gradient.
        sphere: Sphere spec.

    Returns:
        A tensor like x; x itself where w is zero, and zero where no sphere is.

    Raises:
        ValueError: If the spec does not fit, or the shapes differ.

    References:
        Optimization Algorithms on Matrix Manifolds, Absil, Mahony and Sepulchre, 2008,
        section 3.6.1.

    Example:
        >>> tangent(torch.tensor([2.0, 0.0]), torch.tensor([5.0, 7.0]))
        tensor([0., 7.])
    """
    ws, xs = _checked(sphere, w, x)
    return _like(products.project(xs, ws, members=_apart(ws)), x, sphere)


def _move(name: str, w: Tensor, t: Tensor, sphere: str) -> Tensor:
    ws, ts = _checked(sphere, w, t)
    g = products.gram(ws, ts, members=_apart(ws))
    # Not moves.coefficients: it makes b zero for a zero t, and with it the derivative by t.
    a, b = moves.MOVES[name](g, torch.full_like(g.ww, -1), _root(g.ww))
    return _like(products.combine(a, ws, b, ts, _apart(ws)), w, sphere, keep=True)


def retract(w: Tensor, t: Tensor, sphere: str = "tensor") -> Tensor:
    r"""Return the projection retraction :math:`r\,(w+t)/|w+t|`, t tangent at w.

    It moves by the angle :math:`\operatorname{atan}(|t|/r)` and agrees with :func:`exp` to second
    order in t.

    Args:
        w: The point, any shape.
        t: A vector of the same shape; only its tangent part counts.
        sphere: Sphere spec.

    Returns:
        The new point, like w, with the norms of w.

    Raises:
        ValueError: If the spec does not fit, or the shapes differ.

    References:
        Optimization Algorithms on Matrix Manifolds, Absil, Mahony and Sepulchre, 2008,
        example 4.1.1.

    Example:
        >>> retract(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
        tensor([0.7071, 0.7071])
    """
    return _move("retract", w, t, sphere)


def exp(w: Tensor, t: Tensor, sphere: str = "tensor") -> Tensor:
    r"""Return the end of the geodesic: :math:`w\cos\theta+r\,\hat t\sin\theta,\ \theta=|t|/r`.

    Args:
        w: The point, any shape.
        t: A vector of the same shape; only its tangent part counts.
        sphere: Sphere spec.

    Returns:
        The new point, like w, with the norms of w.

    Raises:
        ValueError: If the spec does not fit, or the shapes differ.

    References:
        Optimization Algorithms on Matrix Manifolds, Absil, Mahony and Sepulchre, 2008,
        example 5.4.1.

    Example:
        >>> exp(torch.tensor([2.0, 0.0]), torch.tensor([0.0, torch.pi / 3]))
        tensor([1.7321, 1.0000])
    """
    return _move("exp", w, t, sphere)


def log(w: Tensor, y: Tensor, sphere: str = "tensor") -> Tensor:
    r"""Return the tangent vector at w whose geodesic reaches the direction of y.

    .. math:: \log_w(y) = r\,\theta\,\hat t,\qquad \theta=\angle(w,y),\quad
              \hat t = \text{unit tangent part of } y

    Args:
        w: The point, any shape.
        y: The target; its norms do not matter.
        sphere: Sphere spec.

    Returns:
        A tensor like w, the shortest such vector; zero for antipodal points, where every tangent
        direction is as short.

    Raises:
        ValueError: If the spec does not fit, or the shapes differ.

    Example:
        >>> log(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0]))
        tensor([0.0000, 3.1416])
    """
    ws, ys = _checked(sphere, w, y)
    members = _apart(ws)
    g = products.gram(ws, ys, members=members)
    rate = g.radial_rate()
    t = products.combine(-rate, ws, torch.ones_like(rate), ys, members)  # tangent, laid out like w
    tt = products.dot(t, t, members)
    # Past a right angle, a tangent part that is rounding would be stretched to a half turn.
    noise = 4 * torch.finfo(t[0].dtype).eps
    length = _root(torch.where((g.wu < 0) & (tt <= noise**2 * g.uu), 0, tt))
    theta = torch.atan2(length, _divide(g.wu, _root(g.ww)))
    scale = _divide(_root(g.ww) * theta, length)
    return _like(products.scale(scale, t, members), w, sphere)


def angle(w: Tensor, y: Tensor, sphere: str = "tensor") -> Tensor:
    r"""Return the angle between two points, :math:`2\operatorname{atan2}(|\hat w-\hat y|,
    |\hat w+\hat y|)`.

    Args:
        w: A point, any shape.
        y: Another, of the same shape; norms do not matter.
        sphere: Sphere spec.

    Returns:
        Radians in [0, pi], shape ``(k,)``; zero where a point is zero.

    Raises:
        ValueError: If the spec does not fit, or the shapes differ.

    Notes:
        Good to the rounding of the points, some 1e-8 rad in float32, where the arc cosine form is
        noise below 1e-3 rad.

    References:
        How Futile are Mindless Assessments of Roundoff in Floating-Point Computation?, Kahan,
        2006, section 12.

    Example:
        >>> angle(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1e-7]))
        tensor([1.0000e-07], dtype=torch.float64)
    """
    ws, ys = _checked(sphere, w, y)
    members = _apart(ws)
    ww, yy = products.dot(ws, ws, members), products.dot(ys, ys, members)
    one = torch.ones_like(ww)
    # Both rounded alike, so that equal points are exactly zero apart (addcmul rounds once).
    units = [
        products.scale(_divide(one, _root(xx)), xs, members) for xs, xx in ((ws, ww), (ys, yy))
    ]
    apart = [x - y for x, y in zip(*units, strict=True)]
    along = [x + y for x, y in zip(*units, strict=True)]
    theta = 2 * torch.atan2(*(_root(products.dot(xs, xs, members)) for xs in (apart, along)))
    return torch.where((ww == 0) | (yy == 0), 0, theta)


def distance(w: Tensor, y: Tensor, sphere: str = "tensor") -> Tensor:
    r"""Return the length :math:`r\,\angle(w,y)` of the shortest path on the sphere of w.

    Args:
        w: A point, any shape; its norms are the radii.
        y: Another, of the same shape.
        sphere: Sphere spec.

    Returns:
        Shape ``(k,)``.

    Raises:
        ValueError: If the spec does not fit, or the shapes differ.

    Example:
        >>> distance(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0]))
        tensor([4.7124], dtype=torch.float64)
    """
    return norm(w, sphere) * angle(w, y, sphere)


def transport_views(
    ms: Sequence[Tensor],
    ws: Sequence[Tensor],
    ys: Sequence[Tensor],
    how: str,
    members: Sequence[int] | None = None,
) -> list[Tensor]:
    """Carry views of tangent vectors from the points w to the points y; see :func:`transport`."""
    yy = products.dot(ys, ys, members)
    if how == "parallel":
        ww, ym = products.dot(ws, ws, members), products.dot(ys, ms, members)
        cosine = _divide(products.dot(ws, ys, members), _root(ww * yy))
        rate = -_divide(_divide(ym, _root(yy)), 1 + cosine)
        to_w, to_y = _divide(rate, _root(ww)), _divide(rate, _root(yy))
        sums = products.combine(to_w, ws, to_y, ys, members)
        return [m + s for m, s in zip(ms, sums, strict=True)]
    moved = products.project(ms, ys, yy, members)
    if how == "rescale":
        before, after = products.dot(ms, ms, members), products.dot(moved, moved, members)
        return products.scale(_divide(_root(before), _root(after)), moved, members)
    return moved


def transport(
    w: Tensor, y: Tensor, m: Tensor, sphere: str = "tensor", how: str = "parallel"
) -> Tensor:
    r"""Carry the tangent vector m from the point w to the point y.

    .. math::
        \text{parallel:}\quad & m-\frac{\langle\hat y,m\rangle}{1+\langle\hat w,\hat y\rangle}
                                (\hat w+\hat y) \\
        \text{project:}\quad  & P_y m = m-\langle\hat y,m\rangle\,\hat y \\
        \text{rescale:}\quad  & P_y m\;|m|/|P_y m|

    Args:
        w: The old point, any shape.
        y: The new point, of the same shape.
        m: A vector tangent at w, of the same shape.
        sphere: Sphere spec.
        how: ``"parallel"`` (along the shortest geodesic: keeps lengths and angles), ``"project"``
            (shrinks the part along the path by the cosine of the step), ``"rescale"`` (projects,
            then restores the length) or ``"none"`` (returns m).

    Returns:
        A tensor like m, tangent at y (unless ``"none"``).

    Raises:
        ValueError: If the spec does not fit, the shapes differ, or ``how`` is none of these.

    References:
        Optimization Algorithms on Matrix Manifolds, Absil, Mahony and Sepulchre, 2008,
        section 8.1. Riemannian approach to batch normalization, Cho and Lee, 2017.

    Example:
        >>> w, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> transport(w, y, torch.tensor([0.0, 3.0]))
        tensor([-3.,  0.])
    """
    if how not in TRANSPORTS:
        raise ValueError(f"there is no transport {how!r}; use one of {', '.join(TRANSPORTS)}")
    ws, ys, ms = _checked(sphere, w, y, m)
    if how == "none":
        return m.clone()
    return _like(transport_views(ms, ws, ys, how, _apart(ws)), m, sphere)


def random(
    shape: Sequence[int],
    sphere: str = "tensor",
    radius: float | Tensor = 1.0,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Return a point drawn uniformly from the spheres: :math:`r\,x/|x|,\ x\sim N(0,I)`.

    Args:
        shape: Shape of the tensor.
        sphere: Sphere spec.
        radius: One number, or one per sphere, shape ``(k,)``.
        generator: Source of randomness.
        dtype: As in :func:`torch.randn`.
        device: As in :func:`torch.randn`.

    Returns:
        A tensor of this shape; rows without a sphere are standard normal.

    Raises:
        ValueError: If the spec does not fit the shape.

    Example:
        >>> norm(random((4, 3, 3, 3), "row", radius=2.0), "row").round(decimals=5)
        tensor([2., 2., 2., 2.], dtype=torch.float64)
    """
    x = torch.randn(tuple(shape), generator=generator, dtype=dtype, device=device)
    (vs,) = _checked(sphere, x)
    members = _apart(vs)
    scale = _divide(torch.as_tensor(radius, device=x.device), _root(products.dot(vs, vs, members)))
    return _like(products.scale(scale, vs, members), x, sphere, keep=True)

r"""Spheres as a manifold of ``geoopt``, for its optimizers and samplers.

:class:`Spheres` is the product of all spheres of one tensor. What geoopt knows as batch dimensions
is the index of the sphere here: inner products, norms and distances come one per sphere. This
module is the only one that needs ``geoopt``; import it by its name, ``import sphereopt.manifold``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from geoopt import ManifoldTensor
from geoopt.manifolds import Manifold
from geoopt.utils import size2shape
from torch import Tensor

from sphereopt import geometry, products, spheres

__all__ = ["Spheres"]

_MOVES = ("retract", "exp")
_TRANSPORTS = ("project", "parallel", "rescale")


class Spheres(Manifold):  # type: ignore[misc]  # geoopt has no type hints
    r"""The spheres of a tensor: rows, filters, heads, or the tensor as a whole.

    .. math:: \{w : |w_i| = r_i \text{ for every sphere } i\}

    with the metric of the surrounding space. A point is a whole tensor: there are no batch
    dimensions, and ``sphere`` says which of its entries share a norm.

    Args:
        sphere: Sphere spec; its pieces, if it has any, cover every row.
        radius: One norm for all spheres, or one each, shape ``(k,)``. By default every point keeps
            the norms it has, and so is on the manifold unless one of them is zero.
        move: What ``retr`` does: ``"retract"``, as ``geoopt.Sphere``, or ``"exp"``, as
            ``geoopt.SphereExact``.
        transport: What ``transp`` does: ``"project"``, as geoopt's spheres, ``"parallel"``, or
            ``"rescale"``. Samplers need one of the last two.

    Raises:
        ValueError: If the spec leaves rows without a sphere, a radius is not positive, or there is
            no such move or transport.

    Notes:
        ``Spheres("row", 1.0)`` is ``geoopt.Sphere()`` on matrices. Unlike there, zero spheres stay
        where they are instead of turning into NaN, distances are accurate at all angles, and half
        precision works. ``retr`` and ``expmap`` see only the tangent part of their vector.

        ``reversible`` is True if the transport keeps lengths: then going back along the transported
        vector ends where one started, for the projection retraction too, since it moves along the
        same geodesic by an angle that depends on the length only. Only ``move="exp"`` with
        ``"parallel"`` or ``"rescale"`` is the geodesic flow, though, with lengths as times.

        With ``radius=None`` norms are read from the weights at every step and so drift by rounding;
        in half precision give a radius.

    References:
        Geoopt: Riemannian Optimization in PyTorch, Kochurov, Karimov and Kozlukov, 2020.
        Optimization Algorithms on Matrix Manifolds, Absil, Mahony and Sepulchre, 2008, chapters 3
        to 5 and 8.

    Example:
        >>> import geoopt
        >>> from sphereopt.manifold import Spheres
        >>> filters = geoopt.ManifoldParameter(torch.randn(8, 3, 3, 3), manifold=Spheres("row"))
        >>> before = filters.detach().flatten(1).norm(dim=1)
        >>> optimizer = geoopt.optim.RiemannianSGD([filters], lr=0.1)
        >>> filters.cos().sum().backward()
        >>> optimizer.step()
        >>> torch.allclose(filters.flatten(1).norm(dim=1), before)
        True
    """

    name = "Spheres"
    ndim = 1

    def __init__(
        self,
        sphere: str = "row",
        radius: float | Tensor | None = None,
        *,
        move: str = "retract",
        transport: str = "project",
    ) -> None:
        super().__init__()
        _check_covering(sphere)
        for key, value, known in (("move", move, _MOVES), ("transport", transport, _TRANSPORTS)):
            if value not in known:
                raise ValueError(f"{key}={value!r} is none of {', '.join(map(repr, known))}")
        self.sphere, self.move, self.transport = sphere, move, transport
        self.reversible = transport != "project"
        self.register_buffer("radius", None if radius is None else _radius(radius))

    # What a point and a vector are

    def _check_shape(self, shape: Sequence[int], name: str) -> tuple[bool, str | None]:
        try:
            spheres.check(self.sphere, shape)
        except ValueError as error:
            return False, f"'{name}' has shape {tuple(shape)}, but {error}"
        if len(shape) < self.ndim:
            return False, f"'{name}' has no dimensions; a single number has no directions"
        stop = spheres.parse(spheres.pieces(self.sphere)[-1]).stop
        if stop is not None and stop != shape[0]:
            rows = f"rows from {stop} on of {shape[0]}"
            return False, f"sphere={self.sphere!r} leaves {rows} of '{name}' without a sphere"
        count = spheres.count(self.sphere, shape)
        if self.radius is not None and self.radius.numel() not in (1, count):
            have = tuple(self.radius.shape)
            return False, f"'{name}' has {count} spheres, and radius has shape {have}"
        return True, None

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        norms = geometry.norm(x, self.sphere)
        if self.radius is None:
            ok = bool((norms > 0).all() and norms.isfinite().all())
            return ok, None if ok else "a norm is zero or not finite"
        ok = torch.allclose(norms, self._radii(x).expand_as(norms), atol=atol, rtol=rtol)
        return ok, None if ok else f"`norm(x) != radius` with atol={atol}, rtol={rtol}"

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        sizes = geometry.norm(x, self.sphere), geometry.norm(u, self.sphere)
        radial = self._dot(x, u).abs()
        ok = bool((radial <= sizes[0] * (atol + rtol * sizes[1])).all())
        return ok, None if ok else f"`<x, u> != 0` with atol={atol}, rtol={rtol}"

    # One number per sphere

    def _dot(self, u: Tensor, v: Tensor) -> Tensor:
        us, vs = spheres.split(u, self.sphere), spheres.split(v, self.sphere)
        return products.dot(us, vs, [1] * len(us))

    def _radii(self, x: Tensor) -> Tensor:
        values: Tensor = self.radius.to(x.device, products.scalar_dtype(x.device))
        return values

    def _each(self, values: Tensor, x: Tensor, keepdim: bool) -> Tensor:
        """Return numbers per sphere as geoopt does, or so that they broadcast with x."""
        values = values.to(products.accumulator(x.dtype if x.is_floating_point() else values.dtype))
        if keepdim:
            return _spread(values, self.sphere, x.shape)
        return values.squeeze(0) if self.sphere == "tensor" else values

    def inner(
        self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False
    ) -> Tensor:
        r"""Return :math:`\langle u,v\rangle` of every sphere.

        Args:
            x: The point, any shape.
            u: A tangent vector of the same shape.
            v: Another; u by default.
            keepdim: Shape the numbers so that they broadcast with x.

        Returns:
            Shape ``(k,)``, or ``()`` for ``sphere="tensor"``; float32 or wider. With ``keepdim``
            every row of a block has the number of its block.

        Example:
            >>> from sphereopt.manifold import Spheres
            >>> heads, x, u = Spheres("block:2"), torch.ones(4, 3), torch.arange(12.0).view(4, 3)
            >>> heads.inner(x, u), heads.inner(x, u, keepdim=True).shape
            (tensor([ 55., 451.]), torch.Size([4, 1]))
        """
        return self._each(self._dot(u, u if v is None else v), x, keepdim)

    def component_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """Return :meth:`inner` shaped to broadcast: each entry meets its own sphere's number.

        Args:
            x: The point, any shape.
            u: A tangent vector of the same shape.
            v: Another; u by default.

        Returns:
            A tensor that broadcasts with x.
        """
        return self.inner(x, u, v, keepdim=True)

    def norm(self, x: Tensor, u: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the length of u on every sphere.

        Args:
            x: The point, any shape.
            u: A tangent vector of the same shape.
            keepdim: As in :meth:`inner`.

        Returns:
            As :meth:`inner`. Its derivative at zero is zero.
        """
        return self._each(geometry.norm(u, self.sphere), x, keepdim)

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        r"""Return the distance :math:`r\,\angle(x,y)` on every sphere.

        Args:
            x: A point, any shape.
            y: Another, of the same shape.
            keepdim: As in :meth:`inner`.

        Returns:
            As :meth:`inner`.
        """
        return self._each(geometry.distance(x, y, self.sphere), x, keepdim)

    # Points and vectors

    def projx(self, x: Tensor) -> Tensor:
        r"""Return the nearest point of the manifold, :math:`r\,x/|x|`; zero where x is zero.

        Args:
            x: Any tensor.

        Returns:
            A tensor like x; x itself with ``radius=None``.
        """
        if self.radius is None:
            return x
        norms = geometry.norm(x, self.sphere)
        factor = self._radii(x) / norms.masked_fill(norms == 0, 1)
        wide = x.to(products.accumulator(x.dtype))
        return (_spread(factor, self.sphere, x.shape).to(wide.dtype) * wide).to(x.dtype)

    def _settled(self, step: Callable[..., Tensor], x: Tensor, u: Tensor) -> Tensor:
        """Return the end of a step at the radius, rounded once: twice would not reach it."""
        wide = x.to(products.accumulator(x.dtype))
        return self.projx(step(wide, u, self.sphere)).to(x.dtype)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the tangent part of u at x; see :func:`sphereopt.geometry.tangent`.

        Args:
            x: The point, any shape.
            u: Any tensor of the same shape.

        Returns:
            A tensor like u.
        """
        return geometry.tangent(x, u, self.sphere)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the Riemannian gradient, the tangent part of the gradient.

        Args:
            x: The point, any shape.
            u: The gradient of autograd, of the same shape.

        Returns:
            A tensor like u.
        """
        return self.proju(x, u)

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the end of the retraction that ``move`` names.

        Args:
            x: The point, any shape.
            u: A tangent vector of the same shape.

        Returns:
            A tensor like x, of norm ``radius``.
        """
        if self.move == "exp":
            return self.expmap(x, u)
        return self._settled(geometry.retract, x, u)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the end of the geodesic from x with velocity u; see ``geometry.exp``.

        Args:
            x: The point, any shape.
            u: A tangent vector of the same shape.

        Returns:
            A tensor like x, of norm ``radius``.
        """
        return self._settled(geometry.exp, x, u)

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the shortest tangent vector whose geodesic ends at y; see ``geometry.log``.

        Args:
            x: A point, any shape.
            y: Another, of the same shape.

        Returns:
            A tensor like x; zero for antipodal points.
        """
        return geometry.log(x, y, self.sphere)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Carry a tangent vector from x to y as ``transport`` says; see ``geometry.transport``.

        Args:
            x: The old point, any shape.
            y: The new point, of the same shape.
            v: A vector tangent at x, of the same shape.

        Returns:
            A tensor like v, tangent at y.
        """
        return geometry.transport(x, y, v, self.sphere, self.transport)

    def random(
        self,
        *size: int | Sequence[int],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return a point drawn uniformly; of norm 1 if the manifold has no radius.

        Args:
            size: Shape of the tensor.
            dtype: As in :func:`torch.randn`.
            device: As in :func:`torch.randn`.
            generator: Source of randomness.

        Returns:
            A ``geoopt.ManifoldTensor``.

        Raises:
            ValueError: If the spec or the radius does not fit the shape.

        Example:
            >>> from sphereopt.manifold import Spheres
            >>> Spheres("tensor", radius=2.0).random(3, 5).norm().round(decimals=4)
            tensor(2.)
        """
        shape = size2shape(*size)
        self._assert_check_shape(shape, "x")
        radius = 1.0 if self.radius is None else self.radius
        x = geometry.random(
            shape, self.sphere, radius, generator=generator, dtype=dtype, device=device
        )
        point: Tensor = ManifoldTensor(x, manifold=self)
        return point

    random_uniform = random

    def extra_repr(self) -> str:
        """Return the arguments that are not the default ones."""
        parts = [repr(self.sphere)]
        if self.radius is not None:
            one = self.radius.numel() == 1
            parts.append(f"radius={self.radius.item() if one else tuple(self.radius.shape)}")
        parts += [f"move={self.move!r}"] if self.move != "retract" else []
        parts += [f"transport={self.transport!r}"] if self.transport != "project" else []
        return ", ".join(parts)


def _check_covering(sphere: str) -> None:
    """Raise if a spec cannot cover all rows of any tensor."""
    row = 0
    for spec in map(spheres.parse, spheres.pieces(sphere)):
        if spec.stop is not None and spec.start != row:
            raise ValueError(
                f"sphere={sphere!r} leaves rows {row} to {spec.start} without a sphere, and a "
                "manifold has every entry on one; cover them, or put them in a tensor of their own"
            )
        row = spec.stop or 0


def _radius(radius: float | Tensor) -> Tensor:
    values = torch.as_tensor(radius, dtype=torch.float64).detach().clone()
    if values.ndim > 1:
        raise ValueError(f"radius has shape {tuple(values.shape)}; it is one number, or (k,)")
    if not all(x > 0 and math.isfinite(x) for x in values.flatten().tolist()):
        raise ValueError(f"radius={radius!r} is out of range; it must be positive and finite")
    return values


def _spread(values: Tensor, sphere: str, shape: Sequence[int]) -> Tensor:
    """Return one number per sphere (or one for all) so that it broadcasts with the tensor."""
    if values.ndim == 0:
        return values
    specs: Any = [spheres.parse(piece) for piece in spheres.pieces(sphere)]
    ones = [1] * (len(shape) - 1)
    if specs[0].stop is None and specs[0].kind in ("tensor", "col"):
        return values.reshape(1, -1, *ones[1:]) if ones else values
    parts, start = [], 0
    for spec in specs:
        k = spec.size(shape) if spec.kind == "row" else spec.blocks
        part = values[start : start + k]
        start += k
        parts.append(part if spec.kind == "row" else part.repeat_interleave(spec.size(shape) // k))
    return torch.cat(parts).reshape(-1, *ones)

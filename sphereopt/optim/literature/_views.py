"""Views of spheres and their numbers: what the updates of the published optimizers are made of.

A sphere view is ``(k, ...)``: k spheres, then the entries of each. Numbers per sphere come as
``(k, 1, ...)``, so that they broadcast over it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sphereopt import spheres
from sphereopt.moves import _divide as divide

__all__ = [
    "buffers",
    "divide",
    "dot",
    "norm",
    "numbers",
    "off_spheres",
    "on_spheres",
    "rate",
    "retract_",
    "tangent",
    "tick",
]

Group = dict[str, Any]
State = dict[str, Any]


def on_spheres(
    sphere: str | None, tensors: Sequence[Tensor], numbers: Sequence[Tensor] = ()
) -> Iterator[list[Tensor]]:
    """Yield the views of each piece of a spec; writing to a view writes to its tensor.

    Args:
        sphere: A sphere spec, or None for no spheres.
        tensors: Tensors of the weights' shape.
        numbers: Tensors of one number per sphere, ``(k,)``.

    Returns:
        For each piece, views ``(k, ...)`` of the tensors, then ``(k, 1, ...)`` of the numbers.

    Example:
        >>> w, r = torch.ones(4, 3), torch.ones(4)
        >>> [x.shape for views in on_spheres("row", [w], [r]) for x in views]
        [torch.Size([4, 3]), torch.Size([4, 1])]
    """
    start = 0
    for piece in spheres.pieces(sphere) if sphere is not None else ():
        views = [spheres.view(x, piece) for x in tensors]
        stop = start + len(views[0])
        ones = [1] * (views[0].ndim - 1)
        yield [*views, *[x[start:stop].view(-1, *ones) for x in numbers]]
        start = stop


def off_spheres(sphere: str | None, tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the views of what is on no sphere: all of it, or rows that no piece covers.

    Args:
        sphere: A sphere spec, or None.
        tensors: Tensors of the weights' shape.

    Returns:
        Views of one common shape, one per tensor.

    Example:
        >>> [x.shape for (x,) in off_spheres("row@0:3", [torch.ones(4, 3)])]
        [torch.Size([1, 3])]
    """
    if sphere is None:
        yield list(tensors)
        return
    yield from (
        list(rows) for rows in zip(*[spheres.rest(x, sphere) for x in tensors], strict=True)
    )


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Return the inner products of views ``(k, ...)``, one per sphere, ``(k, 1, ...)``."""
    return (x * y).sum(dim=tuple(range(1, x.ndim)), keepdim=True)


def norm(x: Tensor) -> Tensor:
    """Return the norms of the spheres of a view ``(k, ...)``, shape ``(k, 1, ...)``."""
    return dot(x, x).sqrt()


def tangent(x: Tensor, y: Tensor) -> Tensor:
    r"""Return the part of y that is tangent at x: :math:`y-\langle x,y\rangle x/|x|^2`."""
    return y - divide(dot(x, y), dot(x, x)) * x


def retract_(x: Tensor, step: Tensor, radius: Tensor) -> None:
    r"""Set x to :math:`r\,(x-s)/|x-s|`; a step s of zero changes nothing, not even by rounding."""
    moved = x - step
    moved.mul_(divide(radius, norm(moved)))
    x.copy_(torch.where(norm(step) == 0, x, moved))


def tick(state: State) -> float:
    """Count a step, and return how many there have been."""
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
    state["step"] += 1
    return float(state["step"].item())


def buffers(state: State, w: Tensor, *keys: str) -> list[Tensor]:
    """Return the buffers of these names, like the weights and zero at first."""
    for key in keys:
        if key not in state:
            state[key] = torch.zeros_like(w, memory_format=torch.preserve_format)
    return [state[key] for key in keys]


def numbers(state: State, w: Tensor, sphere: str | None, key: str) -> Tensor:
    """Return one number per sphere, ``(k,)``, zero at first; none for an ordinary parameter."""
    if sphere is None:
        return w.new_zeros(0)
    if key not in state:
        state[key] = w.new_zeros(spheres.count(sphere, w.shape))
    value: Tensor = state[key]
    return value


def rate(group: Group) -> float | Tensor:
    """Return the learning rate as a float or a tensor without dimensions."""
    lr: float | Tensor = group["lr"]
    return lr.reshape(()) if isinstance(lr, Tensor) else lr

"""What a step tells those who watch it: inner products that it has computed anyway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from sphereopt.moves import Gram, _divide, _root
from sphereopt.radius import Travel

__all__ = ["Pull", "Reading", "joined", "with_decay"]


class Pull(NamedTuple):
    r"""Inner products with the gradient g of what is minimized, one entry per sphere.

    Attributes:
        wg: :math:`\langle w,g\rangle`, shape ``(k,)``.
        gg: :math:`\langle g,g\rangle`, shape ``(k,)``.
        ug: :math:`\langle u,g\rangle`, shape ``(k,)``.
        ww: :math:`\langle w,w\rangle` of the weights that g was taken at, shape ``(k,)``.
    """

    wg: Tensor
    gg: Tensor
    ug: Tensor
    ww: Tensor


@dataclass(frozen=True, slots=True)
class Reading:
    """The numbers of one step of some spheres, still on their device.

    Attributes:
        optimizer: Class of the optimizer.
        group: The parameter group (not a copy).
        names: Parameters, in order; a parameter may go on in the next reading.
        counts: Number of spheres of each.
        shapes: Shape of a sphere of each; of the first member of a joint one.
        dims: Number of weights in a sphere of each.
        travel: Inner products, coefficients and believed norms, ``(k,)`` each. The direction is all
            of what the step adds to the weights over -lr, decoupled weight decay included.
        pull: Inner products with the gradient, ``(k,)`` each.
        lr: Learning rate of the group.
        homogeneity: The direction scales like the gradient to this power.
        free: The norm may change; False on spheres of fixed radius.
    """

    optimizer: type[Optimizer]
    group: dict[str, Any]
    names: list[str]
    counts: list[int]
    shapes: list[tuple[int, ...]]
    dims: list[int]
    travel: Travel
    pull: Pull
    lr: float | Tensor
    homogeneity: int
    free: bool


def joined(readings: Sequence[Reading]) -> Reading:
    """Return several readings of one group as one: fewer operations for those who look at all.

    Args:
        readings: At least one, of one group and step.
    """
    first = readings[0]
    if len(readings) == 1:
        return first
    trips = [reading.travel for reading in readings]
    gram = Gram(*map(torch.cat, zip(*(trip.gram for trip in trips), strict=True)))
    rest = map(torch.cat, zip(*(trip[1:] for trip in trips), strict=True))
    pulls = zip(*(reading.pull for reading in readings), strict=True)
    return replace(
        first,
        names=[name for reading in readings for name in reading.names],
        counts=[count for reading in readings for count in reading.counts],
        shapes=[shape for reading in readings for shape in reading.shapes],
        dims=[dim for reading in readings for dim in reading.dims],
        travel=Travel(gram, *rest),
        pull=Pull(*map(torch.cat, pulls)),
    )


def with_decay(
    trip: Travel, pull: Pull, lr: float | Tensor, decay: float | Tensor
) -> tuple[Travel, Pull]:
    r"""Return the numbers of a step as if decoupled weight decay were part of its direction.

    .. math:: (1-lr\,\lambda)w - lr\,u = w - lr\,(u+\lambda w)

    Args:
        trip: Numbers of the step from the weights after decay.
        pull: Inner products with the gradient.
        lr: Learning rate.
        decay: Weight decay :math:`\lambda`.

    Returns:
        Numbers of the step from the weights before decay.
    """
    seen = trip.gram
    shrink = 1 - lr * decay
    ww, wu = seen.ww / shrink**2, seen.wu / shrink
    gram = Gram(ww, wu + decay * ww, seen.uu + 2 * decay * wu + decay**2 * ww)
    # The gradient was taken at the stored weights, of the same direction and another norm.
    ug = pull.ug + decay * _divide(_root(ww), _root(pull.ww)) * pull.wg
    return trip._replace(gram=gram, a=-trip.b / lr), pull._replace(ug=ug)

"""The step of one slab: gradients, direction, Gram, move, transport.

``rule`` is the optimizer: it gives the direction, the names of the buffers that are tangent
vectors, and how weight decay acts. Where autograd runs through the step (``differentiable``)
nothing is overwritten that it may still need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sphereopt import products
from sphereopt.geometry import transport_views
from sphereopt.moves import NORMALIZED, Gram, _divide, _root
from sphereopt.optim._batching import Slab
from sphereopt.optim._reading import Pull
from sphereopt.radius import Travel, travel

if TYPE_CHECKING:
    from sphereopt.optim.base import SphereOptimizer

__all__ = ["step_ordinary", "step_spheres"]

Group = dict[str, Any]


def _gradients(rule: SphereOptimizer, slab: Slab, group: Group, ww: Tensor) -> list[Tensor]:
    """Return gradients as the direction wants them: tangent, plain, or as they are."""
    grads = [-g for g in slab.grads] if group["maximize"] else slab.grads
    if "virtual_radius" in slab.numbers:
        # The gradient at norm rho is that at norm |w| times |w|/rho; L2 pulls at rho*v.
        norm, rho, (l2, _) = _root(ww), slab.numbers["virtual_radius"], rule.decay(group)
        factor = _divide(norm, rho)
        if l2 == 0:
            return products.scale(factor, grads, slab.members)
        pull = l2 * _divide(rho, norm)
        return products.combine(factor, grads, pull, slab.weights, slab.members)
    if group["transport"] != "none" and not rule.linear:
        return products.project(grads, slab.weights, ww, slab.members)
    return grads


def _directions(
    rule: SphereOptimizer, slab: Slab, group: Group, ww: Tensor
) -> tuple[list[Tensor], Gram]:
    """Return the direction and its Gram with the weights; make buffers tangent here.

    A buffer that was tangent where the weights came from is carried along by projecting it
    here, where it is used; a linear direction is projected as a whole, with its gradient.
    """
    w, members, tangent = slab.weights, slab.members, group["transport"] != "none"
    carried = [key for key in rule.tangent_buffers if tangent and key in slab.buffers]

    def carry(key: str) -> tuple[list[Tensor], Gram]:
        inplace = not group["differentiable"]
        form = products.tangent_form(w, slab.buffers[key], ww, members, inplace=inplace)
        slab.buffers[key] = form[0]
        return form

    if not rule.linear:
        for key in carried:
            carry(key)
    u = rule.direction(_gradients(rule, slab, group, ww), slab, group)
    if tangent and rule.linear:
        is_buffer = bool(carried) and u is slab.buffers[carried[0]]
        forms = [carry(key) for key in carried]
        return forms[0] if is_buffer else products.tangent_form(w, u, ww, members)
    if group["move"] in NORMALIZED:
        return products.tangent_form(w, u, ww, members)
    return u, products.gram(w, u, ww, members)


def step_ordinary(rule: SphereOptimizer, slab: Slab, group: Group) -> None:
    """Step rows without a sphere as ``torch.optim`` does: the direction, times lr."""
    w, grads, (l2, shrink) = slab.weights, slab.grads, rule.decay(group)
    if group["maximize"]:
        grads = [-g for g in grads]
    if l2 != 0:
        grads = [torch.add(g, x, alpha=l2) for g, x in zip(grads, w, strict=True)]
    u = rule.direction(grads, slab, group)
    lr = group["lr"]
    if group["differentiable"]:
        slab.weights = [x * shrink - y * lr for x, y in zip(w, u, strict=True)]
        return
    for x, y in zip(w, u, strict=True):
        x.mul_(shrink).sub_(y * lr)


def _pull(slab: Slab, u: list[Tensor], ww: Tensor, group: Group) -> Pull:
    """Return the inner products with the gradient, of which a step needs none itself."""
    g, members = slab.grads, slab.members
    sign = -1 if group["maximize"] else 1
    wg, ug = (sign * products.dot(x, g, members) for x in (slab.weights, u))
    return Pull(wg, products.square(g, members), ug, ww)


def step_spheres(
    rule: SphereOptimizer, slab: Slab, group: Group, *, watched: bool
) -> tuple[Travel, Pull | None]:
    """Step the spheres of a slab; return the numbers of the step."""
    w, members, numbers = slab.weights, slab.members, slab.numbers
    ww = products.dot(w, w, members)
    for key in ("radius", "virtual_radius") if "virtual_radius" in numbers else ("radius",):
        # Spheres that were zero and have been initialized since keep the norm they were given.
        numbers[key] = torch.where(numbers[key] == 0, _root(ww), numbers[key])
    u, gram = _directions(rule, slab, group, ww)
    pull = _pull(slab, u, ww, group) if watched else None
    trip = travel(
        gram,
        group["lr"],
        move=group["move"],
        radius=numbers["radius"],
        virtual_radius=numbers.get("virtual_radius"),
        shrink=rule.decay(group)[1],
    )
    eager = group["transport"] in ("parallel", "rescale")
    old = [x.clone() for x in w] if eager else []
    if group["differentiable"]:
        slab.weights = products.combine(trip.keep, w, trip.b, u, members)
    else:
        torch._foreach_mul_(w, products.spread(trip.keep, w, members))
        torch._foreach_addcmul_(w, u, products.spread(trip.b, w, members))
    for key in set(rule.tangent_buffers) & slab.buffers.keys() if eager else ():
        ms = slab.buffers[key]
        slab.buffers[key] = transport_views(ms, old, slab.weights, group["transport"], members)
    if "virtual_radius" in numbers:
        numbers["virtual_radius"] = trip.norm
    return trip, pull

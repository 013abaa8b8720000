"""Spheres of any optimizer: which it has, and what a step of its own has done to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from sphereopt import products, spheres
from sphereopt.geometry import transport_views
from sphereopt.moves import _divide, _root
from sphereopt.names import did_you_mean, plain
from sphereopt.optim._checks import check_spheres, parameter_name, units
from sphereopt.optim._state import SphereError

if TYPE_CHECKING:
    from sphereopt.detect import SphereReport

__all__ = ["Bunch", "Held", "Specs", "bunches", "by_groups", "find", "pulled"]

Group = dict[str, Any]
States = Mapping[Tensor, dict[str, Any]]
Specs: TypeAlias = "Mapping[Any, str | None] | SphereReport"


@dataclass(frozen=True, eq=False)
class Held:
    """A parameter on spheres, or the members of joint ones.

    Attributes:
        name: Its name, or the names of the members joined by " + ".
        params: The member tensors.
        sphere: Sphere spec.
        groups: For each member the number of its parameter group.
    """

    name: str
    params: list[Tensor]
    sphere: str
    groups: list[int]

    def norm(self) -> Tensor:
        """Return the measured norms, shape ``(k,)``, piece after piece."""
        pieces = zip(*[spheres.split(p.detach(), self.sphere) for p in self.params], strict=True)
        return _root(torch.cat([products.dot(views, views) for views in pieces]))


def find(optimizer: Optimizer, specs: Specs | None) -> list[Held]:
    """Return the spheres of an optimizer: by its group keys if ``specs`` is None, else by name."""
    return by_groups(optimizer) if specs is None else _by_names(optimizer, specs)


def by_groups(optimizer: Optimizer, start: int = 0) -> list[Held]:
    """Return the spheres that groups ask for by ``sphere`` and ``joint``, from one on.

    Args:
        optimizer: Any optimizer.
        start: Number of the first group to look at.

    Raises:
        ValueError: If a sphere does not fit.
        TypeError: If a parameter is sharded or has no real numbers.
    """
    found = []
    for index, group in enumerate(optimizer.param_groups[start:], start):
        if group.get("sphere") is None:
            continue
        check_spheres({"joint": False, **group}, index)
        for first, params in units(group):
            name = parameter_name(group, index, first, len(params))
            found.append(Held(name, list(params), group["sphere"], [index] * len(params)))
    return [_uniform(held) for held in found if any(p.numel() for p in held.params)]


def _by_names(optimizer: Optimizer, specs: Specs) -> list[Held]:
    """Return the spheres that a mapping or a report asks for.

    Args:
        optimizer: An optimizer whose groups have ``param_names``.
        specs: Name, or tuple of names of a joint sphere, to spec; or a report, of which the
            spheres that the optimizer has all members of are taken, but those of norm gains and
            biases only.

    Raises:
        ValueError: If the optimizer has no names or not this one, a parameter is named twice, or a
            sphere does not fit.
        TypeError: If a parameter is sharded or has no real numbers.
    """
    table: Mapping[Any, Any] = getattr(specs, "spheres", specs)
    places = _places(optimizer)
    found: list[Held] = []
    claimed: set[str] = set()
    for key, spec in table.items():
        names = [plain(name) for name in ([key] if isinstance(key, str) else key)]
        if spec is None or (table is not specs and not _wanted(names, places)):
            continue
        for name in names:
            if name not in places:
                raise ValueError(
                    f"the optimizer has no parameter {name!r}{did_you_mean(name, places)}"
                )
            if name in claimed:
                raise ValueError(f"parameter {name!r} is given two spheres; name it once")
            claimed.add(name)
        params, groups = [places[n][0] for n in names], [places[n][1] for n in names]
        joint = {"params": params, "param_names": names, "sphere": spec, "joint": len(names) > 1}
        check_spheres(joint, groups[0])
        found.append(Held(" + ".join(names), params, spec, groups))
    return [_uniform(held) for held in found if any(p.numel() for p in held.params)]


def _places(optimizer: Optimizer) -> dict[str, tuple[Tensor, int]]:
    """Return tensor and group of every named parameter."""
    places = {
        plain(name): (p, index)
        for index, group in enumerate(optimizer.param_groups)
        for name, p in zip(group.get("param_names", []), group["params"], strict=False)
    }
    if not places:
        raise ValueError(
            "the optimizer does not know its parameters' names; build it from "
            "model.named_parameters(), or from the groups of sphereopt.param_groups"
        )
    return places


def _wanted(names: list[str], places: Mapping[str, tuple[Tensor, int]]) -> bool:
    """Take what ``param_groups`` takes of a report: no frozen members, not norms and biases."""
    here = all(name in places for name in names)
    return here and any(places[name][0].ndim > 1 for name in names)


def _uniform(held: Held) -> Held:
    """Return it if its members can be worked on together."""
    for p, q in pairwise(held.params):
        if (p.dtype, p.device) != (q.dtype, q.device):
            raise ValueError(
                f"the joint sphere {held.name!r} has members of {p.dtype} on {p.device} and "
                f"{q.dtype} on {q.device}; give them one dtype and device"
            )
    return held


class Bunch:
    """Spheres of one dtype and device, before and after a step of their optimizer.

    Args:
        held: The spheres.
        keep: Keep a copy of the weights of before.
    """

    def __init__(self, held: list[Held], *, keep: bool = False) -> None:
        self.held = held
        self.members = [len(x.params) for x in held for _ in spheres.pieces(x.sphere)]
        self.weights = self.views([[p.detach() for p in x.params] for x in held])
        self.square = products.dot(self.weights, self.weights, self.members)
        self._old = [w.clone() for w in self.weights] if keep else self.weights

    def views(self, tensors: list[list[Tensor]]) -> list[Tensor]:
        """Return the views of tensors shaped like the parameters, piece by piece."""
        return [
            spheres.view(tensor, piece)
            for x, own in zip(self.held, tensors, strict=True)
            for piece in spheres.pieces(x.sphere)
            for tensor in own
        ]

    def tangent_grads(self) -> list[tuple[Tensor, Tensor]]:
        """Return the parameters with copies of their gradients, tangent on the spheres."""
        self._refuse_sparse()
        copies = [
            [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in x.params]
            for x in self.held
        ]
        views = self.views(copies)
        tangent = products.project(views, self.weights, self.square, self.members)
        torch._foreach_copy_(views, tangent)
        return [
            (p, copy)
            for x, own in zip(self.held, copies, strict=True)
            for p, copy in zip(x.params, own, strict=True)
            if p.grad is not None
        ]

    def _refuse_sparse(self) -> None:
        for x in self.held:
            for p in x.params:
                if p.grad is not None and p.grad.layout is not torch.strided:
                    raise SphereError(
                        f"parameter {x.name!r} of shape {tuple(p.shape)} has a sparse gradient, "
                        "whose tangent part is not sparse; use sparse=False, or project=False"
                    )

    def retract(self, radius: Tensor) -> tuple[Tensor, Tensor]:
        """Scale the weights to a norm, where a step has changed it.

        Args:
            radius: Shape ``(k,)``.

        Returns:
            The factors, and where there was nothing to do.
        """
        square = products.dot(self.weights, self.weights, self.members)
        still = square == self.square
        # Spheres that were zero and have been initialized since keep the norm they were given.
        radius = torch.where(radius == 0, _root(self.square), radius)
        factor = _divide(radius, _root(square)).masked_fill(still, 1)
        self._multiply(self.weights, factor)
        return factor, still

    def scale(self, states: States, key: str, factor: Tensor) -> None:
        """Scale a second set of weights, kept in the optimizer's state, like the first."""
        points = self._buffers(states, key)
        if points is not None:
            self._multiply(self.views(points), factor)

    def carry(self, states: States, key: str, how: str, still: Tensor) -> None:
        """Transport a buffer of tangent vectors from where the weights were to where they are."""
        buffers = self._buffers(states, key)
        if buffers is None:
            return
        ms = self.views(buffers)
        moved = transport_views(ms, self._old, self.weights, how, self.members)
        stay = products.spread(still, ms, self.members)
        kept = [torch.where(s != 0, m, n) for s, m, n in zip(stay, ms, moved, strict=True)]
        torch._foreach_copy_(ms, kept)

    def _multiply(self, xs: list[Tensor], factor: Tensor) -> None:
        if xs[0].dtype in products.NARROW:
            torch._foreach_copy_(xs, products.scale(factor, xs, self.members))
        else:
            torch._foreach_mul_(xs, products.spread(factor, xs, self.members))

    def _buffers(self, states: States, key: str) -> list[list[Tensor]] | None:
        """Return a state of all parameters, zero where there is none; None if no one has it."""
        found = [[states.get(p, {}).get(key) for p in x.params] for x in self.held]
        if all(buffer is None for own in found for buffer in own):
            return None
        for x, own in zip(self.held, found, strict=True):
            for p, buffer in zip(x.params, own, strict=True):
                if buffer is not None and not _plain_like(buffer, p):
                    raise SphereError(
                        f"parameter {x.name!r} of shape {tuple(p.shape)} has a {key} that is "
                        f"quantized or of another shape ({type(buffer).__name__}, "
                        f"{getattr(buffer, 'dtype', None)}, {tuple(getattr(buffer, 'shape', ()))})"
                        "; use transport='none'"
                    )
        return [
            [torch.zeros_like(p) if b is None else b for p, b in zip(x.params, own, strict=True)]
            for x, own in zip(self.held, found, strict=True)
        ]


def _plain_like(buffer: Any, p: Tensor) -> bool:
    """Tell whether a buffer is an ordinary tensor of numbers, shaped like the parameter."""
    if type(buffer) not in (Tensor, torch.nn.Parameter) or buffer.shape != p.shape:
        return False
    return bool(buffer.dtype.is_floating_point or buffer.dtype.is_complex)


def bunches(held: list[Held], *, keep: bool = False) -> list[Bunch]:
    """Return what can be worked on together in bunches; ``keep`` as there."""
    alike: dict[object, list[Held]] = {}
    for x in held:
        alike.setdefault((x.params[0].dtype, x.params[0].device), []).append(x)
    return [Bunch(own, keep=keep) for own in alike.values()]


def pulled(held: list[Held]) -> list[Held]:
    """Return the spheres that have a gradient."""
    return [x for x in held if any(p.grad is not None for p in x.params)]

"""State of weights on spheres, and the blocks of a step.

Keys are torch's (``step``, ``momentum_buffer``, ``exp_avg``, ...) plus ``radius``, the stored norm
of every sphere, and under ``radius="free"`` also ``virtual_radius``, the believed one. Both have
one float64 number per sphere, piece after piece: growth of 1e-9 per step would be lost in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sphereopt import products, spheres
from sphereopt.moves import _root
from sphereopt.optim._batching import Block
from sphereopt.optim._checks import parameter_name, units

__all__ = ["SphereError", "blocks"]

State = dict[str, Any]
Group = dict[str, Any]


class SphereError(RuntimeError):
    """A step that cannot be made: the message names the parameter and the remedy."""


class _Unit(NamedTuple):
    """What has spheres of its own: a parameter, or the members of a joint group."""

    name: str
    params: list[Tensor]
    grads: list[Tensor]
    states: list[State]


def blocks(
    states: Mapping[Tensor, State], group: Group, index: int, keys: tuple[str, ...]
) -> list[Block]:
    """Return what there is to step in a group, creating its state and counting the step.

    Args:
        states: The optimizer's state, by parameter.
        group: A parameter group with a sphere.
        index: Its number, for messages of groups without names.
        keys: Names of the buffers that the direction uses.

    Returns:
        For every parameter that has a gradient, or jointly for the group: a block of each piece of
        its spec, and one of each run of ordinary rows between them.

    Raises:
        SphereError: If a gradient is sparse. Nothing has been changed then.
    """
    work = []
    for start, params in units(group):
        if all(p.grad is None for p in params) or not any(p.numel() for p in params):
            continue
        name = parameter_name(group, index, start, len(params))
        # Another member's gradient may be missing: that one then does not pull.
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        for p, grad in zip(params, grads, strict=True):
            if grad.layout is not torch.strided:
                raise SphereError(
                    f"parameter {name!r} of shape {tuple(p.shape)} has a sparse gradient, and a "
                    "sphere moves as a whole; use sparse=False or leave it out of the spheres"
                )
        work.append(_Unit(name, params, grads, [states[p] for p in params]))
    sphere, free = group["sphere"], group["radius"] == "free"
    needed = ("step", "radius", *(["virtual_radius"] if free else []), *keys)
    for unit in work:
        for state in unit.states:
            if not all(key in state for key in needed):
                _create(unit, sphere, keys, free)
    clocks = [state["step"] for unit in work for state in unit.states]
    if clocks:
        torch._foreach_add_(clocks, 1)
    found: list[Block] = []
    for unit in work:
        found += _pieces(unit, sphere, keys, free)
        found += _ordinary(unit, sphere, keys)
    return found


def _pieces(unit: _Unit, sphere: str, keys: tuple[str, ...], free: bool) -> Iterator[Block]:
    """Yield the views of the member tensors, piece by piece."""
    first, start = unit.states[0], 0
    for state in unit.states[1:]:
        # Members of a joint sphere share its numbers, also after a checkpoint parted them.
        state.update({k: first[k] for k in ("radius", "virtual_radius") if k in first})
    pieces, step = spheres.pieces(sphere), int(first["step"].item())
    for piece in pieces:
        members = [
            spheres.views([p.detach(), grad, *[state[key] for key in keys]], piece)
            for p, grad, state in zip(unit.params, unit.grads, unit.states, strict=True)
        ]
        weights, gradients, *buffers = (list(x) for x in zip(*members, strict=True))
        radius, virtual = first["radius"], first["virtual_radius"] if free else None
        if len(pieces) > 1:
            stop = start + weights[0].shape[0]
            radius = radius[start:stop]
            virtual = None if virtual is None else virtual[start:stop]
            start = stop
        named = dict(zip(keys, buffers, strict=True))
        yield Block(unit.name, weights, gradients, named, radius, virtual, step)


def _ordinary(unit: _Unit, sphere: str, keys: tuple[str, ...]) -> Iterator[Block]:
    """Yield the views of the rows that no piece covers, of parameters that have a gradient."""
    for p, grad, state in zip(unit.params, unit.grads, unit.states, strict=True):
        if p.grad is None or not spheres.rest(p, sphere):
            continue
        own = [p.detach(), grad, *[state[key] for key in keys]]
        for rows in zip(*[spheres.rest(x, sphere) for x in own], strict=True):
            weight, gradient, *buffers = spheres.views(rows, "row")
            named = {key: [x] for key, x in zip(keys, buffers, strict=True)}
            step = int(state["step"].item())
            yield Block(unit.name, [weight], [gradient], named, None, None, step)


def _create(unit: _Unit, sphere: str, keys: tuple[str, ...], free: bool) -> None:
    """Measure the radius and allocate buffers; what a checkpoint brought along stays."""
    pieces = zip(*[spheres.split(p.detach(), sphere) for p in unit.params], strict=True)
    radius = _root(torch.cat([products.dot(views, views) for views in pieces]))
    if any("radius" not in state for state in unit.states) and bool((radius == 0).any()):
        warnings.warn(
            f"parameter {unit.name!r} of shape {tuple(unit.params[0].shape)} has "
            f"{int((radius == 0).sum())} of {radius.numel()} spheres of norm zero: they have "
            "no direction and will not move; initialize them or use sphere=None for them",
            stacklevel=5,
        )
    for p, state in zip(unit.params, unit.states, strict=True):
        # A checkpoint of torch.optim.SGD has a buffer and no step count: its first step is past.
        known = any(state.get(key) is not None for key in keys)
        state.setdefault("step", torch.tensor(1.0 if known else 0.0))
        for key in keys:
            if state.get(key) is None:
                dtype = torch.promote_types(p.dtype, torch.float32)
                form = torch.preserve_format
                state[key] = torch.zeros_like(p, dtype=dtype, memory_format=form)
        state.setdefault("radius", radius.clone())
        if free:
            state.setdefault("virtual_radius", state["radius"].clone())

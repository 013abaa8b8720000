"""State of weights on spheres, and the blocks of a step.

Keys are torch's (``step``, ``momentum_buffer``, ``exp_avg``, ...) plus ``radius``, the stored norm
of every sphere, and under ``radius="free"`` also ``virtual_radius``, the believed one. Both have
one float64 number per sphere: growth of 1e-9 per step would be lost in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

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
        A block for every parameter that has a gradient, or a joint one for the group.

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
        work.append((name, params, grads, [states[p] for p in params]))
    free = group["radius"] == "free"
    needed = ("step", "radius", *(["virtual_radius"] if free else []), *keys)
    for name, params, _, own in work:
        for state in own:
            if not all(key in state for key in needed):
                _create(name, params, own, group["sphere"], keys, free)
    clocks = [state["step"] for *_, own in work for state in own]
    if clocks:
        torch._foreach_add_(clocks, 1)
    return [_block(*item, group["sphere"], keys, free) for item in work]


def _block(
    name: str,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[State],
    sphere: str,
    keys: tuple[str, ...],
    free: bool,
) -> Block:
    """Return the views of the member tensors of a sphere."""
    first = states[0]
    for state in states[1:]:
        # Members of a joint sphere share its numbers, also after a checkpoint parted them.
        state.update({k: first[k] for k in ("radius", "virtual_radius") if k in first})
    members = [
        spheres.views([p.detach(), grad, *[state[key] for key in keys]], sphere)
        for p, grad, state in zip(params, grads, states, strict=True)
    ]
    weights, gradients, *buffers = (list(x) for x in zip(*members, strict=True))
    radius, virtual = first["radius"], first["virtual_radius"] if free else None
    named = dict(zip(keys, buffers, strict=True))
    return Block(name, weights, gradients, named, radius, virtual, int(first["step"].item()))


def _create(
    name: str,
    params: list[Tensor],
    states: list[State],
    sphere: str,
    keys: tuple[str, ...],
    free: bool,
) -> None:
    """Measure the radius and allocate buffers; what a checkpoint brought along stays."""
    views = [spheres.view(p.detach(), sphere) for p in params]
    radius = _root(products.dot(views, views))
    if any("radius" not in state for state in states) and bool((radius == 0).any()):
        warnings.warn(
            f"parameter {name!r} of shape {tuple(params[0].shape)} has "
            f"{int((radius == 0).sum())} of {radius.numel()} spheres of norm zero: they have "
            "no direction and will not move; initialize them or use sphere=None for them",
            stacklevel=5,
        )
    for p, state in zip(params, states, strict=True):
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

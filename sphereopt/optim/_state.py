"""State of weights on spheres, and the blocks of a step.

Keys are torch's (``step``, ``momentum_buffer``, ``exp_avg``, ...) plus ``radius``, the stored norm
of every sphere, and under ``radius="free"`` also ``virtual_radius``, the believed one. Both have
one float64 number per sphere, piece after piece: growth of 1e-9 per step would be lost in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer

from sphereopt import products, spheres
from sphereopt.moves import _root
from sphereopt.optim._batching import Block
from sphereopt.optim._checks import parameter_name, units
from sphereopt.optim._plain import clock
from sphereopt.optim._warn import warn_user

__all__ = ["Keys", "SphereError", "blocks", "check_gradients", "load_checked"]

State = dict[str, Any]
Group = dict[str, Any]


class SphereError(RuntimeError):
    """A step that cannot be made: the message names the parameter and the remedy."""


class Keys(NamedTuple):
    """The state that an optimizer keeps of a parameter.

    Attributes:
        buffers: Names of the buffers shaped like the parameter.
        numbers: Names of what there is one number of per sphere, beside the radius.
        whole: The direction needs all of the parameter at once.
    """

    buffers: tuple[str, ...]
    numbers: tuple[str, ...] = ()
    whole: bool = False


class _Unit(NamedTuple):
    """What has spheres of its own: a parameter, or the members of a joint group."""

    name: str
    params: list[Tensor]
    grads: list[Tensor]
    states: list[State]
    keys: Keys


@_disable_dynamo
def check_gradients(group: Group, index: int) -> None:
    """Raise if a gradient cannot be stepped: before any group has been.

    Args:
        group: A parameter group.
        index: Its number, for messages of groups without names.

    Raises:
        SphereError: If a gradient is sparse where the parameter is stepped as a whole.
    """
    if group["sphere"] is None and group["rounding"] == "nearest":
        return  # torch's own step
    for i, p in enumerate(group["params"]):
        if p.grad is not None and p.grad.layout is not torch.strided:
            raise SphereError(
                f"parameter {parameter_name(group, index, i)!r} of shape {tuple(p.shape)} has a "
                "sparse gradient, and is stepped as a whole; use sparse=False, or leave it out of "
                "the spheres (with rounding='nearest')"
            )


@_disable_dynamo
def blocks(
    states: Mapping[Tensor, State],
    group: Group,
    index: int,
    keys_of: Callable[[Group, list[Tensor]], Keys],
) -> list[Block]:
    """Return what there is to step in a group, creating its state and counting the step.

    Args:
        states: The optimizer's state, by parameter.
        group: A parameter group.
        index: Its number, for messages of groups without names.
        keys_of: Tells the state that the direction needs for a parameter, or the members of a
            joint sphere.

    Returns:
        For every parameter that has a gradient, or jointly for the group: a block of each piece of
        its spec, and one of each run of ordinary rows between them.
    """
    work = []
    for start, params in units(group):
        if all(p.grad is None for p in params) or not any(p.numel() for p in params):
            continue
        name = parameter_name(group, index, start, len(params))
        # Another member's gradient may be missing: that one then does not pull.
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        keys = keys_of(group, params)
        work.append(_Unit(name, params, grads, [states[p] for p in params], keys))
    for unit in work:
        needed = _needed(unit, group)
        if any(not needed <= state.keys() for state in unit.states):
            _create(unit, group)
    clocks = [state["step"] for unit in work for state in unit.states]
    if clocks:
        torch._foreach_add_(clocks, 1)
    found: list[Block] = []
    covered = group["sphere"] is not None and "@" not in group["sphere"]
    for unit in work:
        views = _Views(unit, group)
        found += views.spheres()
        if not covered:
            found += views.ordinary()
    return found


def _own_numbers(group: Group, keys: Keys) -> tuple[str, ...]:
    """Return the names of what there is one number of per sphere."""
    if group["sphere"] is None:
        return ()
    virtual = ("virtual_radius",) if group["radius"] == "free" else ()
    return ("radius", *virtual, *keys.numbers)


def _needed(unit: _Unit, group: Group) -> set[str]:
    master = ("master",) if _has_master(unit, group) else ()
    return {"step", *_own_numbers(group, unit.keys), *unit.keys.buffers, *master}


def _has_master(unit: _Unit, group: Group) -> bool:
    return group["rounding"] == "master" and any(p.dtype in products.NARROW for p in unit.params)


class _Views:
    """The blocks of one unit: views of its parameters, gradients, buffers and numbers."""

    def __init__(self, unit: _Unit, group: Group) -> None:
        self._unit, self._sphere = unit, group["sphere"]
        self._numbers = _own_numbers(group, unit.keys)
        self._has_master = _has_master(unit, group)
        self._tensors = []
        for p, grad, state in zip(unit.params, unit.grads, unit.states, strict=True):
            home = p if group["differentiable"] else p.detach()
            own = [home, grad, *[state[key] for key in unit.keys.buffers]]
            if self._has_master:
                master = state["master"]
                # Whoever wrote to the parameter since (a checkpoint, an initializer) is right.
                master.copy_(torch.where(master.to(p.dtype) == home, master, home))
                own = [master, *own[1:], home]
            self._tensors.append(own)
        for state in unit.states[1:]:
            # Members of a joint sphere share its numbers, also after a checkpoint parted them.
            state.update({key: unit.states[0][key] for key in self._numbers})

    def _block(
        self, kind: str | None, views: list[list[Tensor]], numbers: dict[str, Tensor], step: Tensor
    ) -> Block:
        weights, grads, *buffers = (list(x) for x in zip(*views, strict=True))
        rounded = buffers.pop() if self._has_master else []
        return Block(
            self._unit.name,
            kind,
            weights,
            grads,
            dict(zip(self._unit.keys.buffers, buffers, strict=True)),
            numbers,
            rounded,
            int(step.item()),
            self._unit.keys.whole,
        )

    def _view(self, tensors: list[Tensor], piece: str) -> list[Tensor]:
        if self._unit.keys.whole:
            return [spheres.view(x, piece) for x in tensors]
        return spheres.views(tensors, piece)

    def spheres(self) -> Iterator[Block]:
        """Yield a block per piece of the spec."""
        if self._sphere is None:
            return
        first, start, pieces = self._unit.states[0], 0, spheres.pieces(self._sphere)
        for piece in pieces:
            views = [self._view(tensors, piece) for tensors in self._tensors]
            numbers = {key: first[key] for key in self._numbers}
            if len(pieces) > 1:
                stop = start + views[0][0].shape[0]
                numbers = {key: x[start:stop] for key, x in numbers.items()}
                start = stop
            yield self._block(spheres.parse(piece).kind, views, numbers, first["step"])

    def ordinary(self) -> Iterator[Block]:
        """Yield the runs of rows that no piece covers, of parameters that have a gradient."""
        for p, tensors, state in zip(
            self._unit.params, self._tensors, self._unit.states, strict=True
        ):
            if p.grad is None:
                continue
            if self._sphere is None:
                yield self._block(None, [self._rows(tensors)], {}, state["step"])
            elif spheres.rest(p, self._sphere):
                for rows in zip(*[spheres.rest(x, self._sphere) for x in tensors], strict=True):
                    yield self._block(None, [self._rows(list(rows))], {}, state["step"])

    def _rows(self, tensors: list[Tensor]) -> list[Tensor]:
        return self._view(tensors, "row" if tensors[0].ndim > 1 else "tensor")


def _create(unit: _Unit, group: Group) -> None:
    """Measure the radius and allocate buffers; what a checkpoint brought along stays."""
    numbers = _own_numbers(group, unit.keys)
    radius = _measure(unit, group["sphere"]) if numbers else None
    for p, state in zip(unit.params, unit.states, strict=True):
        # A checkpoint of torch.optim.SGD has a buffer and no step count: its first step is past.
        known = any(state.get(key) is not None for key in unit.keys.buffers)
        state.setdefault("step", clock(1.0 if known else 0.0))
        wide = products.accumulator(p.dtype)
        for key in unit.keys.buffers:
            if state.get(key) is None:
                form = torch.preserve_format
                state[key] = torch.zeros_like(p, dtype=wide, memory_format=form)
        if _has_master(unit, group):
            state.setdefault("master", p.detach().to(wide, memory_format=torch.preserve_format))
        if radius is not None:
            start = {"radius": radius, "virtual_radius": state.get("radius", radius)}
            zeros = torch.zeros_like(radius)
            for key in numbers:
                state.setdefault(key, start.get(key, zeros).clone())


def _measure(unit: _Unit, sphere: str) -> Tensor:
    """Return the norms of the spheres; warn if any is zero and was not known to be."""
    pieces = zip(*[spheres.split(p.detach(), sphere) for p in unit.params], strict=True)
    radius = _root(torch.cat([products.dot(views, views) for views in pieces]))
    if any("radius" not in state for state in unit.states) and bool((radius == 0).any()):
        warn_user(
            f"parameter {unit.name!r} of shape {tuple(unit.params[0].shape)} has "
            f"{int((radius == 0).sum())} of {radius.numel()} spheres of norm zero: they have "
            "no direction and will not move; initialize them or use sphere=None for them"
        )
    return radius


def load_checked(
    optimizer: Optimizer,
    load: Callable[[State], None],
    state_dict: State,
    check: Callable[[State], None],
    restore: Callable[[State, State, Tensor, Group], None],
) -> None:
    """Load a checkpoint among the hooks that a user may have registered.

    Args:
        optimizer: What loads it.
        load: torch's own ``load_state_dict``.
        state_dict: The checkpoint. Options that it lacks, as one of the torch optimizer lacks those
            of spheres, stay what they are.
        check: Raises if it does not fit. It sees what hooks made of the checkpoint.
        restore: Is called with the state of a parameter, its saved state, the parameter and its
            group, to undo torch's casts; before hooks that look at what was loaded.
    """
    loaded: State = {}

    def prepare(_: Optimizer, state_dict: State) -> State:
        check(state_dict)
        pairs = zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
        loaded.update(state_dict, param_groups=[{**ours, **saved} for ours, saved in pairs])
        return loaded

    def finish(_: Optimizer) -> None:
        for saved, group in zip(loaded["param_groups"], optimizer.param_groups, strict=True):
            for number, p in zip(saved["params"], group["params"], strict=True):
                if number in loaded["state"]:
                    restore(optimizer.state[p], loaded["state"][number], p, group)

    handles = [
        optimizer.register_load_state_dict_pre_hook(prepare),
        optimizer.register_load_state_dict_post_hook(finish, prepend=True),
    ]
    try:
        load(state_dict)
    finally:
        for handle in handles:
            handle.remove()

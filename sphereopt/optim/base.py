r"""The one step that all sphere optimizers share.

An optimizer is a *direction* (a subclass of :class:`SphereOptimizer`), a *move* (a key of
``moves.MOVES``) and a *radius* policy (``radius.py``). For every slab of spheres the step is

1. gradients: read, never written; tangent, or in plain units under ``radius="free"``;
2. ``u = direction(gradients, buffers)``;
3. ``G = gram(w, u)``: three numbers per sphere;
4. ``a, b = MOVES[move](G, lr, radius)``: two more;
5. ``w <- a*w + b*u``, in place;
6. tangent buffers are carried to the new point.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from sphereopt import spheres
from sphereopt.geometry import transport_views
from sphereopt.moves import NORMALIZED, _divide, _root
from sphereopt.optim._batching import Block, Slab, slabs
from sphereopt.optim._checks import check_checkpoint, check_group, resolve, units
from sphereopt.radius import Travel, travel

__all__ = ["Reading", "SphereError", "SphereOptimizer"]

Group = dict[str, Any]


class SphereError(RuntimeError):
    """A step that cannot be made: the message names the parameter and the remedy."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The numbers of one step of some spheres, still on their device.

    Attributes:
        names: Parameters, in order; a parameter may go on in the next reading.
        counts: Number of spheres of each.
        travel: Inner products, coefficients and believed norms, ``(k,)`` each.
        radius: Stored norms, ``(k,)``.
        lr: Learning rate of the group.
        group: The parameter group (not a copy).
        homogeneity: The direction scales like the gradient to this power.
    """

    names: list[str]
    counts: list[int]
    travel: Travel
    radius: Tensor
    lr: float | Tensor
    group: Group
    homogeneity: int


class SphereOptimizer(Optimizer, ABC):
    r"""Base of the sphere optimizers: everything but the direction.

    A subclass says which way to go (:meth:`direction`), which buffers that takes
    (:meth:`state_keys`), what it does on ordinary parameters (:meth:`plain_step`), and how its
    ``weight_decay`` acts (:meth:`decay`).

    Args:
        params: Parameters, named parameters, or groups, as for any ``torch.optim`` optimizer.
            Groups may carry ``sphere``, ``joint``, ``kind``, ``move``, ``radius``, ``transport``.
        defaults: Options of groups that do not set their own.

    Notes:
        ``step()`` never writes to ``p.grad``, updates storage in place and makes no host sync
        (but one, at the first step, to see whether any weight is zero). State is torch's, plus
        ``radius`` and, under ``radius="free"``, ``virtual_radius``: one number per sphere.

    References:
        Optimization Algorithms on Matrix Manifolds, Absil, Mahony and Sepulchre, 2008, chapter 4.
    """

    #: Buffers that are tangent vectors and travel with the weights.
    tangent_buffers: ClassVar[tuple[str, ...]] = ()
    #: Move of groups that name none, under ``radius="fixed"``.
    default_move: ClassVar[str] = "retract"
    #: The direction scales like the gradient to this power: 1 for SGD, 0 for Adam.
    homogeneity: ClassVar[int] = 1
    #: A list here makes the next steps append their readings to it; see ``monitor``.
    readings: list[Reading] | None = None

    def __init__(self, params: ParamsT, defaults: Group) -> None:
        super().__init__(params, defaults)

    @abstractmethod
    def direction(
        self, grads: list[Tensor], buffers: dict[str, list[Tensor]], step: int, group: Group
    ) -> list[Tensor]:
        """Return the direction u, one tensor per member; touch nothing but the buffers.

        Args:
            grads: One ``(k, ...)`` tensor per member of the sphere. Not to be written to.
            buffers: State key to tensors like ``grads``, to be updated in place.
            step: How many steps these spheres have made, this one included.
            group: Options.

        Returns:
            What a plain optimizer would subtract, before the learning rate. May be a buffer or a
            gradient itself: nobody writes to it.
        """

    @abstractmethod
    def state_keys(self, group: Group) -> tuple[str, ...]:
        """Return the names of the buffers the direction uses, each shaped like the parameter."""

    @abstractmethod
    def plain_step(self, params: list[Tensor], states: list[Group], group: Group) -> None:
        """Step ordinary parameters (``sphere=None``) as ``torch.optim`` does."""

    @abstractmethod
    def decay(self, group: Group) -> tuple[float, float | Tensor]:
        """Return (L2 coefficient added to the gradient, factor on the weights) of a step."""

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters, ordinary or on spheres.

        Args:
            param_group: As for torch, plus the sphere keys.

        Raises:
            ValueError: If an option does not fit a parameter; the group is then not added.
        """
        super().add_param_group(param_group)
        try:
            resolve(param_group, type(self).default_move)
            check_group(param_group, len(self.param_groups) - 1)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint, after checking that it was made for these parameters and spheres.

        Args:
            state_dict: What ``state_dict()`` returned.

        Raises:
            ValueError: If groups, names, spheres or shapes differ; the message names the first
                parameter that does. Nothing has been changed then.

        Notes:
            torch casts floating state to the dtype of the parameter. Sphere state keeps its own.
        """
        check_checkpoint(state_dict, self.param_groups)
        # A checkpoint of the torch optimizer has no sphere keys: those stay what they are here.
        state_dict = {
            **state_dict,
            "param_groups": [
                {**ours, **saved}
                for ours, saved in zip(self.param_groups, state_dict["param_groups"], strict=True)
            ],
        }
        super().load_state_dict(state_dict)
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            if group["sphere"] is None:
                continue
            for index, p in zip(saved["params"], group["params"], strict=True):
                for key, value in state_dict["state"].get(index, {}).items():
                    if isinstance(value, Tensor) and key != "step":
                        self.state[p][key] = value.to(p.device, copy=True)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make one step.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            The loss that the closure returned, if there is one.

        Raises:
            SphereError: If a gradient is sparse, or a group cannot be stepped.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            if group["sphere"] is None:
                params = [p for p in group["params"] if p.grad is not None]
                if params:
                    self.plain_step(params, [self.state[p] for p in params], group)
                continue
            if group["radius"] == "fixed" and group["weight_decay"] != 0:
                check_group(group, index)  # a scheduler may have set it; this raises
            for slab in slabs(
                self._blocks(group, index), stack=group["foreach"] is not False, cut=True
            ):
                self._step_slab(slab, group)
        return loss

    def _blocks(self, group: Group, index: int) -> list[Block]:
        """Return what there is to step in a group: a block per parameter, or a joint one."""
        return [
            self._block(params, names, group)
            for names, params in units(group, index)
            if any(p.grad is not None for p in params) and any(p.numel() for p in params)
        ]

    def _block(self, params: list[Tensor], names: list[str], group: Group) -> Block:
        """Return the views of the member tensors of a sphere, creating their state."""
        keys, first = self.state_keys(group), self.state[params[0]]
        states = [self.state[p] for p in params]
        # Another member's gradient may be missing: that one then does not pull.
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        for p, grad, name in zip(params, grads, names, strict=True):
            if grad.layout != torch.strided:
                raise SphereError(
                    f"parameter {name!r} of shape {tuple(p.shape)} has a sparse gradient, and a "
                    "sphere moves as a whole; use sparse=False or leave it out of the spheres"
                )
        if any(key not in state for state in states for key in (*keys, "step", "radius")):
            self._init_state(params, states, names, group)
        if group["radius"] == "free" and "virtual_radius" not in first:
            first["virtual_radius"] = first["radius"].clone()
        members = []
        for p, grad, state in zip(params, grads, states, strict=True):
            state["step"] += 1
            # Members of a joint sphere share its numbers, also after a checkpoint parted them.
            state.update({k: first[k] for k in ("radius", "virtual_radius") if k in first})
            members.append(
                spheres.views([p.detach(), grad, *(state[key] for key in keys)], group["sphere"])
            )
        return Block(
            " + ".join(names),
            [m[0] for m in members],
            [m[1] for m in members],
            {key: [m[2 + i] for m in members] for i, key in enumerate(keys)},
            first["radius"],
            first["virtual_radius"] if group["radius"] == "free" else None,
            int(first["step"].item()),
        )

    def _init_state(
        self, params: list[Tensor], states: list[Group], names: list[str], group: Group
    ) -> None:
        """Measure the radius and allocate buffers; what a checkpoint brought along stays."""
        views = [spheres.view(p.detach(), group["sphere"]) for p in params]
        radius = _root(spheres.dot(views, views))
        if any("radius" not in state for state in states) and bool((radius == 0).any()):
            warnings.warn(
                f"parameter {names[0]!r} of shape {tuple(params[0].shape)} has "
                f"{int((radius == 0).sum())} of {radius.numel()} spheres of norm zero: they have "
                "no direction and will not move; initialize them or use sphere=None for them",
                stacklevel=4,
            )
        for p, state in zip(params, states, strict=True):
            dtype = torch.promote_types(p.dtype, torch.float32)
            known = any(state.get(key) is not None for key in self.state_keys(group))
            state.setdefault("step", torch.tensor(1.0 if known else 0.0))
            for key in self.state_keys(group):
                if state.get(key) is None:
                    state[key] = torch.zeros_like(
                        p, dtype=dtype, memory_format=torch.preserve_format
                    )
            state.setdefault("radius", radius.clone())

    def _gradients(self, slab: Slab, group: Group, ww: Tensor, l2: float) -> list[Tensor]:
        """Return gradients as the direction wants them: tangent, plain, or as they are."""
        grads = [-g for g in slab.grads] if group["maximize"] else slab.grads
        if slab.virtual_radius is not None:
            # The gradient at norm rho is that at norm |w| times |w|/rho; L2 pulls at rho*v.
            norm = _root(ww)
            factor = _divide(norm, slab.virtual_radius)
            pull = l2 * _divide(slab.virtual_radius, norm)
            return spheres.combine(factor, grads, pull, slab.weights)
        if group["transport"] != "none":
            return spheres.project(grads, slab.weights, ww)
        return grads

    def _step_slab(self, slab: Slab, group: Group) -> None:
        w, lr = slab.weights, group["lr"]
        l2, shrink = self.decay(group)
        ww = spheres.dot(w, w)
        u = self.direction(
            self._gradients(slab, group, ww, l2), slab.buffers, slab.step, group
        )
        gram = spheres.gram(w, u, ww)
        if group["move"] in NORMALIZED:
            u, gram = spheres.tangent_form(w, u, gram)
        trip = travel(
            gram,
            lr,
            move=group["move"],
            radius=slab.radius,
            virtual_radius=slab.virtual_radius,
            shrink=shrink,
        )
        old = [x.clone() for x in w] if group["transport"] == "parallel" else w
        for x, direction in zip(w, u, strict=True):
            x.mul_(spheres.spread(trip.a * trip.scale, x))
            x.addcmul_(direction, spheres.spread(trip.b, x))
        if group["transport"] != "none":
            for key in set(self.tangent_buffers) & slab.buffers.keys():
                moved = transport_views(slab.buffers[key], old, w, group["transport"])
                torch._foreach_copy_(slab.buffers[key], moved)
        if slab.virtual_radius is not None:
            slab.virtual_radius.copy_(trip.norm)
        slab.write_back()
        if self.readings is not None:
            names, counts = [x.name for x in slab.blocks], [len(x.radius) for x in slab.blocks]
            self.readings.append(
                Reading(names, counts, trip, slab.radius, lr, group, self.homogeneity)
            )

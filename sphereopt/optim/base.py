r"""The one step that all sphere optimizers share.

An optimizer is a *direction* (a subclass of :class:`SphereOptimizer`), a *move* (a key of
``moves.MOVES``) and a *radius* policy (``radius.py``). For every slab of spheres the step is

1. gradients: read, never written; tangent, or in plain units under ``radius="free"``;
2. ``u = direction(gradients, buffers)``;
3. ``G = gram(w, u)``: three numbers per sphere;
4. ``a, b = MOVES[move](G, lr, radius)``: two more;
5. ``w <- a*w + b*u``, in place;
6. tangent buffers are carried to the new point. ``transport="project"`` does this at the next
   step, where the buffer is used: the stored buffer is tangent at the point it was made.

Rows that no piece of a spec covers take the direction as a plain optimizer does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from sphereopt import products
from sphereopt.geometry import transport_views
from sphereopt.moves import NORMALIZED, Gram, _divide, _root
from sphereopt.optim._batching import Slab, slabs
from sphereopt.optim._checks import check_checkpoint, check_group, resolve
from sphereopt.optim._state import SphereError, blocks
from sphereopt.radius import Travel, travel

__all__ = ["Reading", "SphereError", "SphereOptimizer"]

Group = dict[str, Any]

_DEFAULTS: Group = {
    "weight_decay": 0.0,
    "sphere": None,
    "joint": False,
    "kind": "proved",
    "move": None,
    "radius": "fixed",
    "transport": None,
    "maximize": False,
    "foreach": None,
    "fused": None,
}


@dataclass(frozen=True, slots=True)
class Reading:
    """The numbers of one step of some spheres, still on their device.

    Attributes:
        names: Parameters, in order; a parameter may go on in the next reading.
        counts: Number of spheres of each.
        travel: Inner products, coefficients and believed norms, ``(k,)`` each.
        lr: Learning rate of the group.
        group: The parameter group (not a copy).
        homogeneity: The direction scales like the gradient to this power.
    """

    names: list[str]
    counts: list[int]
    travel: Travel
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
            Rows that no piece of a ``sphere`` covers move by the direction times lr, as in torch,
            with the buffers (float32 or wider) and the ``weight_decay`` of the group.
        defaults: Options of groups that do not set their own; sphere options left out take the
            values they have in :class:`sphereopt.SphereSGD`.

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
    #: The direction and the buffers are linear in the gradients.
    linear: ClassVar[bool] = False
    #: A list here makes the next steps append their readings to it; see ``monitor``.
    readings: list[Reading] | None = None

    def __init__(self, params: ParamsT, defaults: Group) -> None:
        super().__init__(params, {**_DEFAULTS, **defaults})

    @abstractmethod
    def direction(
        self,
        grads: list[Tensor],
        buffers: dict[str, list[Tensor]],
        steps: list[int],
        group: Group,
    ) -> list[Tensor]:
        """Return the direction u, one tensor per gradient; touch nothing but the buffers.

        Args:
            grads: Tensors ``(k, ...)``. Not to be written to.
            buffers: State key to tensors like ``grads``, to be updated in place.
            steps: For each tensor, how many steps it has made, this one included.
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
            work = blocks(self.state, group, index, self.state_keys(group))
            for slab in slabs(work, stack=group["foreach"] is not False):
                self._step_slab(slab, group)
        return loss

    def _gradients(self, slab: Slab, group: Group, ww: Tensor) -> list[Tensor]:
        """Return gradients as the direction wants them: tangent, plain, or as they are."""
        grads = [-g for g in slab.grads] if group["maximize"] else slab.grads
        if slab.virtual_radius is not None:
            # The gradient at norm rho is that at norm |w| times |w|/rho; L2 pulls at rho*v.
            norm, (l2, _) = _root(ww), self.decay(group)
            factor = _divide(norm, slab.virtual_radius)
            if l2 == 0:
                return products.scale(factor, grads, slab.members)
            pull = l2 * _divide(slab.virtual_radius, norm)
            return products.combine(factor, grads, pull, slab.weights, slab.members)
        if group["transport"] != "none" and not self.linear:
            return products.project(grads, slab.weights, ww, slab.members)
        return grads

    def _directions(self, slab: Slab, group: Group, ww: Tensor) -> tuple[list[Tensor], Gram]:
        """Return the direction and its Gram with the weights; make buffers tangent here.

        A buffer that was tangent where the weights came from is carried along by projecting it
        here, where it is used; a linear direction is projected as a whole, with its gradient.
        """
        w, members, tangent = slab.weights, slab.members, group["transport"] != "none"
        buffers = [slab.buffers[key] for key in self.tangent_buffers if key in slab.buffers]
        if tangent and not self.linear:
            for m in buffers:
                products.tangent_form(w, m, ww, members, inplace=True)
        u = self.direction(self._gradients(slab, group, ww), slab.buffers, slab.steps, group)
        if tangent and self.linear:
            forms = [products.tangent_form(w, m, ww, members, inplace=True) for m in buffers]
            if forms and u is buffers[0]:
                return forms[0]
            return products.tangent_form(w, u, ww, members)
        if group["move"] in NORMALIZED:
            return products.tangent_form(w, u, ww, members)
        return u, products.gram(w, u, ww, members)

    def _step_ordinary(self, slab: Slab, group: Group) -> None:
        """Step rows without a sphere as ``torch.optim`` does: the direction, times lr."""
        w, grads, (l2, shrink) = slab.weights, slab.grads, self.decay(group)
        if group["maximize"]:
            grads = [-g for g in grads]
        if l2 != 0:
            grads = [torch.add(g, x, alpha=l2) for g, x in zip(grads, w, strict=True)]
        u = self.direction(grads, slab.buffers, slab.steps, group)
        for x, y in zip(w, u, strict=True):
            x.mul_(shrink).sub_(y * group["lr"])
        slab.write_back()

    def _step_slab(self, slab: Slab, group: Group) -> None:
        if slab.radius is None:
            self._step_ordinary(slab, group)
            return
        w, members = slab.weights, slab.members
        u, gram = self._directions(slab, group, products.dot(w, w, members))
        trip = travel(
            gram,
            group["lr"],
            move=group["move"],
            radius=slab.radius,
            virtual_radius=slab.virtual_radius,
            shrink=self.decay(group)[1],
        )
        eager = group["transport"] in ("parallel", "rescale")
        old = [x.clone() for x in w] if eager else []
        torch._foreach_mul_(w, products.spread(trip.keep, w, members))
        torch._foreach_addcmul_(w, u, products.spread(trip.b, w, members))
        for key in set(self.tangent_buffers) & slab.buffers.keys() if eager else ():
            moved = transport_views(slab.buffers[key], old, w, group["transport"], members)
            torch._foreach_copy_(slab.buffers[key], moved)
        if slab.virtual_radius is not None:
            slab.virtual_radius.copy_(trip.norm)
        slab.write_back()
        if self.readings is not None:
            blocks = [block for bunch in slab.bunches for block in bunch]
            names, counts = [x.name for x in blocks], [len(x.weights[0]) for x in blocks]
            self.readings.append(Reading(names, counts, trip, group["lr"], group, self.homogeneity))

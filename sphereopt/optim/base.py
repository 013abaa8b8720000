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
from typing import TYPE_CHECKING, Any, ClassVar, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer, ParamsT

from sphereopt import products
from sphereopt.optim._batching import Slab, arrange
from sphereopt.optim._checks import check_checkpoint, check_group, resolve
from sphereopt.optim._manifolds import split_manifolds
from sphereopt.optim._plain import clock
from sphereopt.optim._reading import Pull, Reading, with_decay
from sphereopt.optim._rounding import Rounding
from sphereopt.optim._state import Keys, SphereError, blocks, check_gradients, load_checked
from sphereopt.optim._step import step_ordinary, step_spheres
from sphereopt.radius import Travel

if TYPE_CHECKING:
    from sphereopt.monitor.composer import LastStep

__all__ = ["Keys", "Reading", "Slab", "SphereError", "SphereOptimizer"]

Group = dict[str, Any]

_DEFAULTS: Group = {
    "lr": None,
    "weight_decay": 0.0,
    "sphere": None,
    "joint": False,
    "kind": "proved",
    "move": None,
    "radius": "fixed",
    "transport": "none",
    "rounding": "nearest",
    "maximize": False,
    "foreach": None,
    "fused": None,
    "differentiable": False,
}


class SphereOptimizer(Optimizer, ABC):
    r"""Base of the sphere optimizers: everything but the direction.

    A subclass says which way to go (:meth:`direction`), which buffers that takes
    (:meth:`state_keys`), what it does on ordinary parameters (:meth:`plain_step`), and how its
    ``weight_decay`` acts (:meth:`decay`).

    Args:
        params: Parameters, named parameters, or groups, as for any ``torch.optim`` optimizer.
            Groups may carry ``sphere``, ``joint``, ``kind``, ``move``, ``radius``, ``transport``,
            ``rounding``.
            Rows that no piece of a ``sphere`` covers move by the direction times lr, as in torch,
            with the buffers (float32 or wider) and the ``weight_decay`` of the group.
        defaults: Options of groups that do not set their own; sphere options left out take the
            values they have in :class:`sphereopt.SphereSGD`.

    Notes:
        ``step()`` never writes to ``p.grad``, updates storage in place and makes no host sync (but
        one at the first step, to see whether any weight is zero, and in bf16 and fp16 some to see
        whether steps are lost, at powers of two until one is). State is torch's, plus
        ``radius`` and, under ``radius="free"``, ``virtual_radius``: one number per sphere.

    References:
        Optimization Algorithms on Matrix Manifolds, Absil, Mahony and Sepulchre, 2008, chapter 4.
    """

    #: Buffers that are tangent vectors and travel with the weights.
    tangent_buffers: ClassVar[tuple[str, ...]] = ()
    #: State keys of what there is one number of per sphere, beside the radius.
    sphere_numbers: ClassVar[tuple[str, ...]] = ()
    #: Move of groups that name none but an lr, under ``radius="fixed"``.
    default_move: ClassVar[str] = "retract"
    #: Learning rate of groups that name none, on spheres: radians per step, by measurement.
    default_angle: ClassVar[float] = 0.02
    #: The same of ordinary groups.
    ordinary_lr: ClassVar[float] = 1e-3
    #: The plain optimizer's own: under ``radius="free"``, and with a move in its unit.
    plain_lr: ClassVar[float] = 1e-3
    #: The direction scales like the gradient to this power: 1 for SGD, 0 for Adam.
    homogeneity: ClassVar[int] = 1
    #: The direction and the buffers are linear in the gradients.
    linear: ClassVar[bool] = False
    #: The direction has a useful derivative, so ``differentiable=True`` makes sense.
    smooth: ClassVar[bool] = True
    #: Who takes the readings of the next steps; none are made while it is empty. See ``monitor``.
    listeners: tuple[Callable[[Reading], object], ...] = ()
    _told_of_rounding: bool = False
    _last_step: LastStep | None = None

    def __init__(self, params: ParamsT, defaults: Group) -> None:
        super().__init__(params, {**_DEFAULTS, **defaults})

    @abstractmethod
    def direction(self, grads: list[Tensor], slab: Slab, group: Group) -> list[Tensor]:
        """Return the direction u, one tensor per gradient; touch nothing but the buffers.

        Args:
            grads: Tensors ``(k, ...)``. Not to be written to.
            slab: Its ``buffers`` (state key to tensors like ``grads``) and ``numbers`` (state key
                to one number per sphere) are to be updated in place; ``steps`` tells how many
                steps each tensor has made, this one included, and ``members`` how many tensors in
                a row share spheres.
            group: Options.

        Returns:
            What a plain optimizer would subtract, before the learning rate. May be a buffer or a
            gradient itself: nobody writes to it.
        """

    @abstractmethod
    def state_keys(self, group: Group, params: list[Tensor]) -> Keys:
        """Return the state that the direction needs for a parameter, or for joint members."""

    @abstractmethod
    def plain_step(self, params: list[Tensor], states: list[Group], group: Group) -> None:
        """Step ordinary parameters (``sphere=None``) as ``torch.optim`` does."""

    @abstractmethod
    def decay(self, group: Group) -> tuple[float, float | Tensor]:
        """Return (L2 coefficient added to the gradient, factor on the weights) of a step."""

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters, ordinary or on spheres.

        Args:
            param_group: As for torch, plus the sphere keys. It is copied, so that one list of
                groups serves several optimizers. geoopt's ``ManifoldParameter`` on spheres get
                groups of their own, with the ``sphere`` that means the same.

        Raises:
            ValueError: If an option does not fit a parameter; the group is then not added.
        """
        # torch fills in the caller's own dict: a second optimizer would inherit move and radius.
        if not isinstance(param_group["params"], Tensor | list):
            param_group["params"] = list(param_group["params"])  # an iterator serves one only
        before = len(self.param_groups)
        try:
            for part in split_manifolds([param_group]):
                group = dict(part)
                super().add_param_group(group)
                self._complete(group, len(self.param_groups) - 1)
        except (TypeError, ValueError):
            del self.param_groups[before:]
            raise

    def _complete(self, group: Group, index: int) -> None:
        resolve(
            group,
            default_move=self.default_move,
            default_angle=self.default_angle,
            ordinary_lr=self.ordinary_lr,
            plain_lr=self.plain_lr,
        )
        check_group(group, index)
        if group["differentiable"] and not self.smooth:
            raise ValueError(
                f"differentiable=True has no meaning for {type(self).__name__}, whose "
                "direction has no useful derivative; use SphereSGD or SphereAdam"
            )

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
        numbers = self.sphere_numbers

        def restore(state: Group, saved: Group, p: Tensor, group: Group) -> None:
            if group["sphere"] is None and group["rounding"] == "nearest":
                return
            for key, value in saved.items():
                if isinstance(value, Tensor):
                    state[key] = value.to("cpu" if key == "step" else p.device, copy=True)

        load_checked(
            self,
            super().load_state_dict,
            state_dict,
            lambda loaded: check_checkpoint(loaded, self.param_groups, numbers),
            restore,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in _DEFAULTS.items():
                group.setdefault(key, value)
        for values in self.state.values():
            # torch counted steps in numbers once.
            if isinstance(values, dict) and isinstance(values.get("step"), int | float):
                values["step"] = clock(float(values["step"]))

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make one step.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            The loss that the closure returned, if there is one.

        Raises:
            SphereError: If a gradient on a sphere is sparse. Nothing has been changed then.
            ValueError: If a scheduler gave weight decay to a sphere of fixed radius; likewise.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            check_gradients(group, index)
            if group["sphere"] and group["radius"] == "fixed" and group["weight_decay"] != 0:
                check_group(group, index)  # a scheduler may have set it; this raises
        for index, group in enumerate(self.param_groups):
            with torch.set_grad_enabled(group["differentiable"]):
                self._step_group(group, index)
        return loss

    def report_per_parameter_metrics(
        self, param: Tensor, name: str, optimizer_metrics: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Add what the last step did to a parameter, as Composer's ``OptimizerMonitor`` asks.

        Args:
            param: A parameter of this optimizer.
            name: Its name, for the keys.
            optimizer_metrics: What was gathered so far.

        Returns:
            The same dict, with ``sphereopt/<probe>/<name>``: means over the parameter's spheres,
            still on their device, of the probes of :mod:`sphereopt.monitor.probes`. Nothing is
            added for parameters on no sphere. A joint sphere is reported under each member.

        Notes:
            The first call starts the listening, so it adds nothing yet.
        """
        from sphereopt.monitor.composer import LastStep

        if self._last_step is None:
            self._last_step = LastStep(self)
        optimizer_metrics.update(self._last_step.metrics(param, name))
        return optimizer_metrics

    # Under torch.compile the bookkeeping stays eager, and the arithmetic of a slab is compiled.
    @_disable_dynamo(recursive=False)
    def _step_group(self, group: Group, index: int) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        narrow = any(p.dtype in products.NARROW for p in params)
        if group["sphere"] is None and (group["rounding"] == "nearest" or not narrow):
            if params:
                _step_plainly(self, params, group)
            return
        work = blocks(self.state, group, index, self.state_keys)
        step = max([0, *(block.step for block in work)])
        # Reading what was lost waits for the device: at steps 1, 2, 4, 8, ... until it was told.
        watch = narrow and not self._told_of_rounding and step & (step - 1) == 0
        rounding = Rounding(group["rounding"], 1_000_003 * step + index, watch)
        copy = group["differentiable"]
        for bunches in arrange(work, stack=group["foreach"] is not False):
            slab = Slab(bunches, copy=copy)
            if slab.ordinary:
                step_ordinary(self, slab, group)
            else:
                trip, pull = step_spheres(self, slab, group, watched=bool(self.listeners))
                if pull is not None:
                    _tell(self, slab, trip, pull, group)
            slab.write_back(rounding)
        self._told_of_rounding |= rounding.warn()


@_disable_dynamo  # whoever listens is not to be compiled
def _tell(rule: SphereOptimizer, slab: Slab, trip: Travel, pull: Pull, group: Group) -> None:
    """Make the reading of a slab and hand it to those who listen."""
    free, blocks = group["radius"] == "free", [x for bunch in slab.bunches for x in bunch]
    if free and rule.decay(group)[1] != 1.0:
        trip, pull = with_decay(trip, pull, group["lr"], group["weight_decay"])
    reading = Reading(
        optimizer=type(rule),
        group=group,
        names=[x.name for x in blocks],
        counts=[len(x.weights[0]) for x in blocks],
        shapes=[tuple(x.weights[0].shape[1:]) for x in blocks],
        dims=[sum(w[0].numel() for w in x.weights) for x in blocks],
        travel=trip,
        pull=pull,
        lr=group["lr"],
        homogeneity=rule.homogeneity,
        free=free,
    )
    for listener in rule.listeners:
        listener(reading)


@_disable_dynamo
def _step_plainly(rule: SphereOptimizer, params: list[Tensor], group: Group) -> None:
    # torch keeps no state where there is nothing to remember: none is left behind empty.
    states = [rule.state.get(p, {}) for p in params]
    rule.plain_step(params, states, group)
    rule.state.update({p: state for p, state in zip(params, states, strict=True) if state})

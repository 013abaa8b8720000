r"""What the published optimizers share: the loop over parameters, options, views and state.

Each optimizer is one method, :meth:`LiteratureOptimizer.update`: one parameter, top to bottom as in
its paper. It is handed the weights and the gradient in float32 or wider, and changes the weights in
place; half precision is widened before it and rounded once after it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import zip_longest
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from sphereopt import spheres
from sphereopt.optim._checks import parameter_name
from sphereopt.optim._state import SphereError, load_checked
from sphereopt.optim._warn import warn_user
from sphereopt.optim.literature._views import norm, on_spheres

__all__ = ["Group", "LiteratureOptimizer", "State"]

Group = dict[str, Any]
State = dict[str, Any]

_AT_LEAST_ZERO = (
    "lr",
    "momentum",
    "weight_decay",
    "eps",
    "ns_eps",
    "delta",
    "wd_ratio",
    "rotational_eps",
    "omega",
    "grad_clip",
)
_BELOW_ONE = ("beta2", "update_norm_decay_factor")


class LiteratureOptimizer(Optimizer, ABC):
    """Base of the published optimizers: everything but the update of one parameter.

    Args:
        params: Parameters, named parameters, or groups, as for any ``torch.optim`` optimizer, such
            as those of :func:`sphereopt.param_groups`. A group's ``sphere`` says which of its
            weights share a norm; the optimizer's ``sphere`` stands in where a group names none,
            for parameters of two or more dimensions: biases and gains are then ordinary.
        defaults: Options of groups that do not set their own.

    Notes:
        ``step()`` never writes to ``p.grad``, updates in place and makes no host sync (but one,
        where norms are kept, to see at the first step whether any is zero). State is tensors only,
        float32 or wider. Groups are copied, so one list of them serves several optimizers.

    Example:
        >>> from sphereopt.optim.literature import AdamH
        >>> isinstance(AdamH([torch.ones(2, 2)]), LiteratureOptimizer)
        True
    """

    #: Whether ``sphere`` of a group matters at all.
    reads_spheres: ClassVar[bool] = True
    #: Whether norms of spheres are measured at the first step, into ``state["radius"]``.
    keeps_norm: ClassVar[bool] = False
    #: Whether ``weight_decay`` means something on spheres.
    decays_spheres: ClassVar[bool] = True

    def __init__(self, params: ParamsT, defaults: Group) -> None:
        super().__init__(params, defaults)

    @abstractmethod
    def update(self, w: Tensor, g: Tensor, state: State, group: Group, sphere: str | None) -> None:
        """Make one step of one parameter, in place.

        Args:
            w: Weights, float32 or wider; to be changed in place.
            g: Gradient of what is minimized, like ``w``. Not to be written to.
            state: State of the parameter.
            group: Options.
            sphere: Sphere spec, or None for an ordinary parameter.
        """

    def prepare(self, group: Group, index: int) -> None:
        """Check and complete a new group, where only one optimizer has reason to.

        Args:
            group: A group as torch stores it.
            index: Its number, for messages of groups without names.
        """

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters.

        Args:
            param_group: As for torch, plus ``sphere``.

        Raises:
            ValueError: If an option does not fit; the group is then not added.
            TypeError: If a parameter is not of real floating-point numbers, or is sharded.
        """
        group = dict(param_group)
        fixed = self.reads_spheres and not self.decays_spheres
        if fixed and group.get("sphere") is not None and group.get("weight_decay"):
            raise ValueError(
                f"weight_decay={group['weight_decay']!r} does nothing on a sphere of fixed norm "
                f"(sphere={group['sphere']!r}): leave it out of that group; the optimizer's own "
                "weight_decay is for ordinary parameters"
            )
        if self.reads_spheres:
            group.setdefault("sphere_is_default", "sphere" not in group)
        super().add_param_group(group)
        try:
            _check(group, len(self.param_groups) - 1, self)
            self.prepare(group, len(self.param_groups) - 1)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def sphere_of(self, p: Tensor, group: Group) -> str | None:
        """Return the spec of a parameter's spheres, or None if it is ordinary.

        Args:
            p: A parameter of the group.
            group: Its group.
        """
        if not self.reads_spheres or (group["sphere_is_default"] and p.ndim < 2):
            return None
        sphere: str | None = group["sphere"]
        return sphere

    def load_state_dict(self, state_dict: Group) -> None:
        """Load a checkpoint, after checking that it was made for these parameters.

        Args:
            state_dict: What ``state_dict()`` returned.

        Raises:
            ValueError: If groups, names or shapes differ. Nothing has been changed then.

        Notes:
            torch casts floating state to the dtype of the parameter. Here it keeps its own, but
            for half precision, which is widened.
        """

        def restore(state: State, saved: State, p: Tensor, group: Group) -> None:
            for key, value in saved.items():
                # torch counted steps in numbers once.
                value = torch.as_tensor(value)
                device = torch.device("cpu") if key == "step" else p.device
                dtype = torch.promote_types(value.dtype, torch.float32)
                state[key] = value.to(device, dtype, copy=True)

        load_checked(
            self,
            super().load_state_dict,
            state_dict,
            lambda loaded: _check_checkpoint(loaded, self),
            restore,
        )

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
            SphereError: If a gradient is sparse. Nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            _check_gradients(group, index)
        for index, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p.grad is None or p.numel() == 0:
                    continue
                sphere, state = self.sphere_of(p, group), self.state[p]
                dtype = torch.promote_types(p.dtype, torch.float32)
                w, g = p.detach().to(dtype), p.grad.to(dtype)
                if self.keeps_norm and sphere is not None and "radius" not in state:
                    state["radius"] = _measure(w, sphere, parameter_name(group, index, i))
                self.update(w, -g if group["maximize"] else g, state, group, sphere)
                if w.dtype != p.dtype:
                    p.copy_(w)
        return loss


def _measure(w: Tensor, sphere: str, name: str) -> Tensor:
    radius = torch.cat([norm(x).flatten() for (x,) in on_spheres(sphere, [w])])
    if bool((radius == 0).any()):
        warn_user(
            f"parameter {name!r} of shape {tuple(w.shape)} has {int((radius == 0).sum())} of "
            f"{radius.numel()} spheres of norm zero, and a norm that is kept at zero never moves: "
            "initialize them or use sphere=None for them"
        )
    return radius


def _check(group: Group, index: int, optimizer: LiteratureOptimizer) -> None:
    _check_options(group)
    if optimizer.reads_spheres and group.get("joint"):
        raise ValueError(
            f"joint=True ({parameter_name(group, index, 0)!r} and the rest of its group) is not "
            f"served by {type(optimizer).__name__}, whose spheres lie in one tensor each; leave "
            "the joint sphere out of the groups, or use SphereSGD or SphereAdam"
        )
    for i, p in enumerate(group["params"]):
        name = parameter_name(group, index, i)
        if not p.is_floating_point():
            raise TypeError(
                f"parameter {name!r} has dtype {p.dtype}, and {type(optimizer).__name__} is "
                "defined for real numbers; leave it to a torch optimizer"
            )
        if hasattr(p, "placements"):
            raise TypeError(
                f"parameter {name!r} is sharded (DTensor), and a norm needs all of it; leave it "
                "to a torch optimizer"
            )
        sphere = optimizer.sphere_of(p, group)
        if sphere is not None:
            try:
                spheres.check(sphere, p.shape)
            except ValueError as error:
                shape = tuple(p.shape)
                raise ValueError(f"parameter {name!r} has shape {shape}, but {error}") from None


def _check_options(group: Group) -> None:
    for key in (*_AT_LEAST_ZERO, *_BELOW_ONE):
        value = group.get(key)
        if isinstance(value, Tensor):
            if key != "lr" or value.numel() != 1:
                raise ValueError(f"{key} is a tensor of shape {tuple(value.shape)}; use one number")
        elif value is not None and not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{key}={value!r} is out of range; it must be 0 or more")
        elif value is not None and key in _BELOW_ONE and value >= 1:
            raise ValueError(f"{key}={value!r} is out of range; it must be in [0, 1)")
    for i, beta in enumerate(group.get("betas", ())):
        if not 0 <= beta < 1:
            raise ValueError(f"betas[{i}]={beta!r} is out of range; it must be in [0, 1)")
    still = group.get("momentum", 1) <= 0 or group.get("dampening", 0) != 0
    if group.get("nesterov") and still:
        raise ValueError("nesterov=True needs momentum > 0 and dampening = 0")


def _check_gradients(group: Group, index: int) -> None:
    for i, p in enumerate(group["params"]):
        if p.grad is not None and p.grad.layout is not torch.strided:
            raise SphereError(
                f"parameter {parameter_name(group, index, i)!r} of shape {tuple(p.shape)} has a "
                "sparse gradient, and norms need all of it; use sparse=False"
            )


def _check_checkpoint(state_dict: Group, optimizer: LiteratureOptimizer) -> None:
    saved_groups = state_dict["param_groups"]
    none: Group = {}
    pairs = zip_longest(optimizer.param_groups, saved_groups, fillvalue=none)
    for index, (group, saved) in enumerate(pairs):
        sizes = [len(x.get("params", ())) for x in (group, saved)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                "the checkpoint was made for other parameters: "
                f"group {index} has {sizes[0]} here and {sizes[1]} in the checkpoint"
            )
        if optimizer.reads_spheres and saved.get("sphere", group["sphere"]) != group["sphere"]:
            raise ValueError(
                f"parameter {parameter_name(group, index, 0)!r} has sphere={group['sphere']!r} in "
                f"this optimizer and sphere={saved['sphere']!r} in the checkpoint"
            )
        theirs = saved.get("param_names") or group.get("param_names", [])
        for i, (p, number) in enumerate(zip(group["params"], saved["params"], strict=True)):
            name = parameter_name(group, index, i)
            if group.get("param_names") and theirs[i] != name:
                raise ValueError(
                    f"the checkpoint was made for other parameters: it has {theirs[i]!r} where "
                    f"this optimizer has {name!r}"
                )
            state = state_dict["state"].get(number, {})
            _check_state(state, p, optimizer.sphere_of(p, group), name)


def _check_state(state: State, p: Tensor, sphere: str | None, name: str) -> None:
    allowed = {(), tuple(p.shape)}
    if sphere is not None:
        allowed.add((spheres.count(sphere, p.shape),))
    for key, value in state.items():
        if isinstance(value, Tensor) and tuple(value.shape) not in allowed:
            raise ValueError(
                f"parameter {name!r} of shape {tuple(p.shape)} has {key} of shape "
                f"{tuple(value.shape)} in the checkpoint; build the groups as they were when it "
                "was saved"
            )

"""What the columns of torch's optimizer matrix are made of: options, wrong options, parameters.

``Info`` is torch's own ``OptimizerInfo`` and knows how a column groups its parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch

from sphereopt import geometry
from sphereopt.optim.base import SphereOptimizer

# The import warns where hypothesis is missing, and forbids all who come later to set torch's flags
# (cudnn.enabled and the like); the context gives that permission back when it ends.
with warnings.catch_warnings(), torch.backends.__allow_nonbracketed_mutation():
    warnings.simplefilter("ignore", ImportWarning)
    from torch.testing._internal import common_device_type, common_optimizers, common_utils

ErrorOptimizerInput = common_optimizers.ErrorOptimizerInput
OptimizerErrorEnum = common_optimizers.OptimizerErrorEnum
OptimizerInput = common_optimizers.OptimizerInput
TensorTracker = common_optimizers.TensorTracker
TestCase = common_utils.TestCase
instantiate = common_device_type.instantiate_device_type_tests
parametrize = common_utils.parametrize

Options = dict[str, Any]
_OF_SPHERES = ("sphere", "joint", "move", "radius", "transport")


class Info(common_optimizers.OptimizerInfo):
    """A column.

    Args:
        name: What it is called.
        cls: The optimizer.
        inputs: Options to run it with, or torch's own function that lists them.
        kind: ``"ordinary"``, ``"fixed"``, ``"free"`` or ``"literature"``.
        budget: Most memory that a step may take beside parameters, gradients and state, in copies
            of the parameters: one by one, and with ``foreach`` (None where there is no such form).
        required: Options passed where the inputs have none of the name.
    """

    def __init__(
        self,
        name: str,
        cls: type[torch.optim.Optimizer],
        inputs: Sequence[Options] | Callable[..., list[Any]],
        kind: str,
        budget: tuple[float, float | None],
        required: Options | None = None,
        **more: Any,
    ) -> None:
        self._name, self.kind, self.budget, self.required = name, kind, budget, required or {}
        if issubclass(cls, SphereOptimizer):  # torch's tests are made for torch's default
            self.required = {"lr": cls.plain_lr, **self.required}
        if not callable(inputs):
            inputs = _as_torch_lists_them(inputs)
        super().__init__(
            cls, optim_inputs_func=inputs, optim_error_inputs_func=_errors(self), **more
        )

    @property
    def name(self) -> str:
        return self._name

    def make(self, params: Any, **options: Any) -> torch.optim.Optimizer:
        """Return the optimizer; on spheres, matrices are on them, and vectors are ordinary.

        torch's tests step a weight and a bias. A bias on a sphere of its own could not go to where
        the loss wants it, and rows of a vector are single numbers, which have no direction.
        SGDG and AdamG set norms to 1 at their first step: weights start there.
        """
        options, params = {**self.required, **options}, list(params)
        grouped = isinstance(params[0], dict)
        if self.kind == "ordinary" or (self.kind == "literature" and not grouped):
            optimizer = self.optim_cls(params, **options)
        else:
            on_all = {key: options.pop(key) for key in _OF_SPHERES if key in options}
            parts = [
                part
                for group in (params if grouped else [{"params": params}])
                for part in self._parted({**on_all, **group})
            ]
            optimizer = self.optim_cls(parts, **options)
        if self.name in ("SGDG", "AdamG"):
            _set_norms_to_one(optimizer)
        return optimizer

    def _parted(self, group: Options) -> list[Options]:
        """Return a group as one on spheres and an ordinary one; decay goes where it has meaning."""
        on_spheres, ordinary = dict(group), dict(group)
        for key in _OF_SPHERES:
            ordinary.pop(key, None)
        if "sphere" in group or self.kind != "literature":
            ordinary["sphere"] = None
        if self.kind != "literature":
            on_spheres = {"sphere": "row", "radius": self.kind, **on_spheres}
        if self.kind == "fixed" and on_spheres["sphere"] is not None:
            on_spheres["weight_decay"] = 0.0
        elif not getattr(self.optim_cls, "decays_spheres", True):
            on_spheres.pop("weight_decay", None)
        everything, joint = group["params"], group.get("joint")
        chosen = [x for x in everything if joint or _tensor_of(x).ndim > 1]
        rest = [x for x in everything if not (joint or _tensor_of(x).ndim > 1)]
        parts = [{**on_spheres, "params": chosen}, {**ordinary, "params": rest}]
        return [part for part in parts if part["params"]]


def _tensor_of(x: Any) -> torch.Tensor:
    """Return the tensor of a parameter that may come with its name."""
    tensor: torch.Tensor = x[1] if isinstance(x, tuple) else x
    return tensor


@torch.no_grad()
def _set_norms_to_one(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            sphere = optimizer.sphere_of(p, group)
            if sphere is not None and p.numel():
                r = geometry.norm(p, sphere).to(p.dtype)
                p.div_(r.view(-1, *[1] * (p.ndim - 1)))


def _as_torch_lists_them(inputs: Sequence[Options]) -> Callable[..., list[Any]]:
    def function(device: Any, dtype: Any = None) -> list[Any]:
        return [
            OptimizerInput(params=None, kwargs=deepcopy(kwargs), desc=str(kwargs))
            for kwargs in inputs
        ]

    return function


# One regular expression per option that must not pass, wherever an optimizer has that option.
_WRONG: list[tuple[Options, str]] = [
    ({"lr": -0.1}, "lr=-0.1 is out of range"),
    ({"lr": torch.tensor([0.001, 0.001])}, r"lr is a tensor of shape \(2,\); use one number"),
    ({"momentum": -0.5}, "momentum=-0.5 is out of range"),
    ({"betas": (1.0, 0.0)}, r"betas\[0\]=1.0 is out of range"),
    ({"eps": -1e-8}, "eps=-1e-08 is out of range"),
    ({"weight_decay": -1}, "weight_decay=-1 is out of range"),
    ({"sphere": "ball"}, "sphere='ball'"),
    ({"sphere": "block:3"}, "needs a dim 0 that 3 divides"),
    ({"radius": "loose"}, "radius='loose' is none of"),
    ({"move": "jump"}, "move='jump' is none of"),
    ({"rounding": "up"}, "rounding='up' is none of"),
]


def _errors(info: Info) -> Callable[..., list[Any]]:
    """Return the function that lists torch's errors and ours, for tests to provoke."""

    def function(device: Any, dtype: Any) -> list[Any]:
        general = common_optimizers.get_error_inputs_for_all_optims(device, dtype)
        found = [x for x in general if x.optimizer_error_input.params is not None]
        known = info.optim_cls([torch.ones(1, 1)], **info.required).defaults
        first = {"sphere": "row"} if info.kind in ("fixed", "free") else {}
        wrong = list(_WRONG)
        if info.kind == "ordinary":  # keys that only spheres read
            wrong = [x for x in wrong if not {"sphere", "radius", "move"} & x[0].keys()]
        if info.kind == "fixed":
            wrong.append(({"weight_decay": 0.1}, "does nothing on a sphere of fixed radius"))
        if info.kind == "free":
            first["radius"] = "free"
            wrong.append(({"move": "rotate"}, "takes lr in radians"))
        for kwargs, message in wrong:
            if kwargs.keys() <= known.keys():
                params = [torch.ones(2, 3, device=device, dtype=dtype)]
                found.append(
                    ErrorOptimizerInput(
                        OptimizerInput(params, {**first, **kwargs}, desc=message),
                        error_type=ValueError,
                        error_regex=message,
                    )
                )
        return found

    return function


def _tensor(lr: float) -> torch.Tensor:
    return torch.tensor(lr)


SGD_FIXED = [
    {"sphere": "row", "lr": 0.003},
    {"sphere": "tensor", "lr": _tensor(0.003), "momentum": 0.9},
    {"sphere": "row", "lr": 0.003, "momentum": 0.9, "nesterov": True, "move": "exp"},
    {"sphere": "row", "lr": 0.003, "momentum": 0.9, "dampening": 0.5, "transport": "parallel"},
    {"sphere": "tensor", "lr": 0.01, "weight_decay": 0.1, "maximize": True, "move": "rotate"},
]
SGD_FREE = [
    {"sphere": "row", "lr": 0.001},
    {"sphere": "tensor", "lr": _tensor(0.001), "momentum": 0.9, "weight_decay": 0.1},
    {"sphere": "row", "lr": 0.001, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"sphere": "tensor", "lr": 0.001, "momentum": 0.9, "dampening": 0.5},
    {"sphere": "row", "lr": 0.001, "weight_decay": 0.1, "maximize": True},
]
ADAM_FIXED = [
    {"sphere": "row", "lr": 0.01},
    {"sphere": "tensor", "lr": 0.01, "amsgrad": True},
    {"sphere": "row", "lr": 0.01, "betas": (0.8, 0.95), "move": "retract"},
    {"sphere": "row", "lr": 0.01, "weight_decay": 0.1, "transport": "parallel"},
    {"sphere": "tensor", "lr": 0.01, "weight_decay": 0.1, "maximize": True},
]
ADAM_FREE = [
    {"sphere": "row", "lr": 0.01},
    {"sphere": "tensor", "lr": 0.01, "weight_decay": 0.1, "amsgrad": True},
    {"sphere": "row", "lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": False},
    {"sphere": "row", "lr": 0.01, "weight_decay": 0.1, "maximize": True},
]
LION = [
    {"lr": 0.003},
    {"lr": _tensor(0.003), "weight_decay": 0.1},
    {"lr": 0.003, "betas": (0.8, 0.9)},
    {"lr": 0.003, "weight_decay": 0.1, "maximize": True},
]
MUON = [
    {"lr": 0.01},
    {"lr": _tensor(0.01), "weight_decay": 0.1},
    {"lr": 0.01, "momentum": 0.8, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"},
    {"lr": 0.01, "ns_steps": 6, "ns_coefficients": (3.4, -4.7, 2.0), "maximize": True},
]
HYPERBALL = [
    {"lr": 0.01},
    {"lr": _tensor(0.01), "weight_decay": 0.1},
    {"lr": 0.01, "sphere": "row"},
    {"lr": 0.01, "maximize": True},
]
ROTATIONAL = [
    {"lr": 0.01},
    {"lr": _tensor(0.01), "zero_mean": False},
    {"lr": 0.01, "sphere": "tensor", "update_norm_decay_factor": 0.0},
    {"lr": 0.01, "maximize": True},
]
SPHERICAL = [
    {"lr": 0.01},
    {"lr": _tensor(0.01), "weight_decay": 0.1},
    {"lr": 0.01, "sphere": "tensor"},
    {"lr": 0.01, "weight_decay": 0.1, "maximize": True},
]
GEODESIC = [
    {"lr": 0.01},
    {"lr": _tensor(0.01), "momentum": 0.9, "grad_clip": 1.0},
    {"lr": 0.01, "momentum": 0.5, "sphere": "tensor", "weight_decay": 0.1},
    {"lr": 0.01, "momentum": 0.5, "omega": 0.1, "maximize": True},
]
ADAMP = [
    {"lr": 0.01},
    {"lr": _tensor(0.01), "weight_decay": 0.1},
    {"lr": 0.01, "nesterov": True},
    {"lr": 0.01, "weight_decay": 0.1, "maximize": True},
]
SGDP = [
    {"lr": 0.001},
    {"lr": _tensor(0.001), "momentum": 0.9, "weight_decay": 0.1},
    {"lr": 0.001, "momentum": 0.9, "nesterov": True},
    {"lr": 0.001, "momentum": 0.9, "project_buffer": False, "maximize": True},
]


def on_spheres(inputs: Sequence[Options], **options: Any) -> list[Options]:
    """Return inputs on spheres, rows and whole tensors in turn."""
    return [{"sphere": ("row", "tensor")[i % 2], **options, **x} for i, x in enumerate(inputs)]


def all_inputs(info: Info, device: Any, dtype: Any, skip: tuple[str, ...] = ()) -> list[Any]:
    """Return the options of a column, with every flag (``foreach``, ...) that it has."""
    list_all = common_optimizers._get_optim_inputs_including_global_cliquey_kwargs
    found: list[Any] = list_all(device, dtype, info, skip=skip)
    return found

"""What a parameter group and a checkpoint must satisfy, with errors that say what to do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

from torch import Tensor

from sphereopt import spheres
from sphereopt.geometry import TRANSPORTS
from sphereopt.moves import MOVES, RADIANS
from sphereopt.optim._rounding import ROUNDINGS
from sphereopt.radius import POLICIES

__all__ = [
    "KINDS",
    "check_checkpoint",
    "check_group",
    "check_spheres",
    "parameter_name",
    "resolve",
    "units",
]

KINDS = ("proved", "constrained")
_CHOICES = {
    "move": tuple(MOVES),
    "radius": POLICIES,
    "transport": TRANSPORTS,
    "kind": KINDS,
}
_ANYWHERE = {
    "rounding": ROUNDINGS,
    "second_moment": ("entry", "sphere"),
    "adjust_lr_fn": (None, "original", "match_rms_adamw"),
}
_AT_LEAST_ZERO = ("lr", "momentum", "weight_decay", "eps", "adam_eps")
_NOT_SERVED = ("capturable",)

Group = dict[str, Any]


def parameter_name(group: Group, index: int, position: int, count: int = 1) -> str:
    """Return the name of a parameter, or of the members of a joint sphere joined by " + ".

    Groups without names give the place of the parameter instead.
    """
    names = group.get("param_names")
    if not names:
        return f"group {index}, parameter {position}"
    return names[position] if count == 1 else " + ".join(names[position : position + count])


def units(group: Group) -> list[tuple[int, list[Tensor]]]:
    """Return place and tensors of what has its own spheres: each parameter, or a joint group."""
    params = group["params"]
    return [(0, params)] if group.get("joint") else [(i, [p]) for i, p in enumerate(params)]


def resolve(
    group: Group, *, default_move: str, default_angle: float, ordinary_lr: float, plain_lr: float
) -> None:
    """Fill in the move and the learning rate that a group leaves open.

    Args:
        group: A group as torch stores it.
        default_move: Under ``radius="fixed"``, if there is an lr to go with it.
        default_angle: Learning rate on spheres, in radians per step, where the move takes those.
        ordinary_lr: For groups on no sphere.
        plain_lr: For copies of the plain optimizer, and moves whose lr is in its unit.
    """
    ordinary, free = group["sphere"] is None, group["radius"] == "free"
    open_lr = group["lr"] is None
    if group["move"] is None and not ordinary:
        # Without an lr there is no number in the plain optimizer's unit to follow.
        group["move"] = "renorm" if free else "rotate" if open_lr else default_move
    if open_lr and not ordinary and group["move"] in RADIANS:
        group["lr"] = default_angle
    elif open_lr:
        group["lr"] = ordinary_lr if ordinary and not free else plain_lr


def check_group(group: Group, index: int) -> None:
    """Raise if the options of a group, or one of its parameters, do not fit.

    Args:
        group: A group as torch stores it, resolved.
        index: Its number, for messages of groups without names.

    Raises:
        ValueError: If a value is out of range, or a sphere spec does not fit a shape.
        TypeError: If a parameter has a dtype without directions.
    """
    _check_numbers(group)
    ordinary = group["sphere"] is None
    if ordinary and group["joint"]:
        raise ValueError("joint=True needs a sphere; set sphere='tensor' or 'row'")
    for key, allowed in {**(_CHOICES if not ordinary else {}), **_ANYWHERE}.items():
        if key in group and group[key] not in allowed:
            raise ValueError(f"{key}={group[key]!r} is none of {', '.join(map(repr, allowed))}")
    for key in _NOT_SERVED:
        if group.get(key):
            raise ValueError(f"{key}=True is not supported; leave it out")
    if ordinary:
        _check_ordinary(group, index)
        return
    check_spheres(group, index)
    _check_radius(group, index)


def _check_ordinary(group: Group, index: int) -> None:
    if "amsgrad" in group and group["foreach"] and isinstance(group["lr"], Tensor):
        raise ValueError(
            "lr as a Tensor is not supported for capturable=False and foreach=True, in "
            "ordinary groups of Adam as in torch; leave foreach out"
        )
    for i, p in enumerate(group["params"] if group["rounding"] != "nearest" else ()):
        if hasattr(p, "placements"):
            raise TypeError(
                f"parameter {parameter_name(group, index, i)!r} is sharded (DTensor), and "
                f"rounding={group['rounding']!r} needs all of it; use rounding='nearest' there"
            )


def _check_numbers(group: Group) -> None:
    for key in _AT_LEAST_ZERO:
        value = group.get(key, 0.0)
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"{key} is a tensor of shape {tuple(value.shape)}; use one number")
        elif not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{key}={value!r} is out of range; it must be 0 or more")
    for i, beta in enumerate(group.get("betas", ())):
        if not 0 <= beta < 1:
            raise ValueError(f"betas[{i}]={beta!r} is out of range; it must be in [0, 1)")
    if (
        "dampening" in group
        and group["nesterov"]
        and not (group["momentum"] > 0 and group["dampening"] == 0)
    ):
        raise ValueError("nesterov=True needs momentum > 0 and dampening = 0")


def check_spheres(group: Group, index: int) -> None:
    """Raise if a parameter of a group does not have the spheres that the group asks for.

    Args:
        group: A group with ``params``, ``sphere`` and ``joint``.
        index: Its number, for messages of groups without names.

    Raises:
        ValueError: If the spec does not fit a shape.
        TypeError: If a parameter is sharded, or has a dtype without directions.
    """
    counts = set()
    for i, p in enumerate(group["params"]):
        name = parameter_name(group, index, i)
        if hasattr(p, "placements"):
            raise TypeError(
                f"parameter {name!r} is sharded (DTensor), and a sphere's norm needs all of it; "
                "leave it out of the spheres with sphere=None"
            )
        if not (p.is_floating_point() or p.is_complex()):
            raise TypeError(f"parameter {name!r} has dtype {p.dtype}; a sphere needs real numbers")
        try:
            spheres.check(group["sphere"], p.shape, joint=group["joint"])
        except ValueError as error:
            raise ValueError(
                f"parameter {name!r} has shape {tuple(p.shape)}, but {error}"
            ) from None
        counts.add(spheres.count(group["sphere"], p.shape))
    if group["joint"] and len(counts) > 1:
        names = ", ".join(parameter_name(group, index, i) for i in range(len(group["params"])))
        raise ValueError(
            f"joint=True with sphere={group['sphere']!r} needs as many spheres in each of {names}, "
            f"but they have {sorted(counts)}; make them separate groups"
        )


def _check_radius(group: Group, index: int) -> None:
    if group["radius"] == "free":
        if group["kind"] == "constrained":
            raise ValueError(
                f"parameter {parameter_name(group, index, 0)!r} is on a sphere by choice, and "
                "radius='free' is exact for scale-invariant weights only; use radius='fixed'"
            )
        if group["move"] in RADIANS:
            raise ValueError(
                f"move={group['move']!r} takes lr in radians, and radius='free' follows the norm "
                "of the plain optimizer, whose lr it needs; use move='renorm'"
            )
    elif group["weight_decay"] != 0:
        raise ValueError(
            f"weight_decay={group['weight_decay']!r} does nothing on a sphere of fixed radius "
            f"({parameter_name(group, index, 0)!r} and the rest of its group): set it to 0 there "
            "and take lr from sphereopt.theory.equilibrium, or use radius='free'"
        )


def _named(groups: list[Group]) -> Iterator[tuple[int, int, str | None]]:
    for i, group in enumerate(groups):
        names = group.get("param_names")
        for j in range(len(group["params"])):
            yield i, j, names[j] if names else None


def check_checkpoint(
    state_dict: dict[str, Any], groups: list[Group], numbers: Sequence[str]
) -> None:
    """Raise if a checkpoint was not made for these groups.

    Args:
        state_dict: What ``state_dict()`` of an optimizer returned.
        groups: The groups of the optimizer that is to load it.
        numbers: State keys of what there is one number of per sphere, beside the radius.

    Raises:
        ValueError: If they differ; the message names the first parameter that does.
    """
    saved_groups = state_dict["param_groups"]
    for ours, theirs in zip_longest(_named(groups), _named(saved_groups)):
        if ours is None or theirs is None or ours[:2] != theirs[:2] or _differ(ours[2], theirs[2]):
            raise ValueError(
                "the checkpoint was made for other parameters: "
                f"this optimizer has {_place(ours)}, the checkpoint has {_place(theirs)}; "
                "build the groups as they were when it was saved"
            )
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        for key in ("sphere", "joint", "kind"):
            if group["sphere"] is not None and saved.get(key, group[key]) != group[key]:
                raise ValueError(
                    f"parameter {parameter_name(group, index, 0)!r} has {key}={group[key]!r} in "
                    f"this optimizer and {key}={saved[key]!r} in the checkpoint"
                )
        for i, (p, number) in enumerate(zip(group["params"], saved["params"], strict=True)):
            name = parameter_name(group, index, i)
            per_sphere = ("radius", "virtual_radius", *numbers)
            _check_state(state_dict["state"].get(number, {}), p, group, name, per_sphere)


def _differ(ours: str | None, theirs: str | None) -> bool:
    return ours is not None and theirs is not None and ours != theirs


def _place(found: tuple[int, int, str | None] | None) -> str:
    if found is None:
        return "no further parameter"
    return (f"{found[2]!r} " if found[2] else "a parameter ") + f"at group {found[0]}[{found[1]}]"


def _check_state(
    state: Group, p: Tensor, group: Group, name: str, per_sphere: tuple[str, ...]
) -> None:
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            continue
        want = tuple(p.shape)
        if group["sphere"] is not None and key in per_sphere:
            want = (spheres.count(group["sphere"], p.shape),)
        if tuple(value.shape) != want:
            raise ValueError(
                f"parameter {name!r} of shape {tuple(p.shape)} needs {key} of shape {want}, "
                f"and the checkpoint has {tuple(value.shape)}"
            )

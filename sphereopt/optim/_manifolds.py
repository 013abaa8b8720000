"""Parameters that say themselves which sphere they are on: geoopt's ``ManifoldParameter``.

Nothing here imports geoopt; a parameter is asked for its ``manifold``. Those on spheres get groups
of their own with the ``sphere`` that means the same, and the optimizers know nothing else of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["split_manifolds"]

Group = dict[str, Any]


def split_manifolds(params: Any) -> Any:
    """Return parameters or groups with those on geoopt's spheres in groups of their own.

    Args:
        params: What a user gives an optimizer: parameters, named parameters, or groups.

    Returns:
        The same object if no parameter has a manifold other than geoopt's ``Euclidean`` (an
        iterator, which looking uses up, comes back as a list). Otherwise groups: each of the given
        ones without its parameters on spheres, followed by one group per spec of those, with the
        same keys and ``sphere``, ``joint=False`` and, if it has none, ``kind="constrained"``.

    Raises:
        ValueError: If a manifold is none of geoopt's ``Sphere``, ``SphereExact``, ``Euclidean`` and
            ours, its spheres have no spec, a parameter is not on it, or its group says otherwise.

    Notes:
        The manifold says where a parameter lives, the optimizer how it moves there: ``move`` is the
        group's, for ``SphereExact`` too. A norm is the one the parameter has.

    Example:
        >>> import geoopt
        >>> from sphereopt.optim._manifolds import split_manifolds
        >>> point = geoopt.ManifoldParameter(torch.eye(3), manifold=geoopt.Sphere())
        >>> groups = split_manifolds([torch.nn.Parameter(torch.ones(2)), point])
        >>> [(len(group["params"]), group.get("sphere")) for group in groups]
        [(1, None), (1, 'row')]
    """
    if isinstance(params, Tensor | Mapping | str) or not isinstance(params, Iterable):
        return params  # torch says what is wrong with these
    given = list(params) if isinstance(params, Iterator) else params
    items = list(given)
    grouped = bool(items) and isinstance(items[0], dict)
    groups = items if grouped else [{"params": items}]
    listed = [_listed(group) for group in groups]
    found = [_specs(group, i) for i, group in enumerate(listed)]
    if not any(found):
        looked_up = any(one is not two for one, two in zip(groups, listed, strict=True))
        return listed if grouped and looked_up else given
    return [
        part for group, specs in zip(listed, found, strict=True) for part in _split(group, specs)
    ]


def _listed(group: Group) -> Group:
    """Return the group itself, or a copy with a list where its parameters are an iterator."""
    if isinstance(group.get("params"), Iterator):
        return {**group, "params": list(group["params"])}
    return group


def _members(group: Group) -> list[Any]:
    members = group.get("params", ())
    return [members] if isinstance(members, Tensor) else list(members)


def _tensor(member: Any) -> Any:
    return member[1] if isinstance(member, tuple) and len(member) == 2 else member


def _specs(group: Group, index: int) -> dict[int, str]:
    """Return the spec of every member on a sphere, by its place in the group."""
    specs = {}
    for place, member in enumerate(_members(group)):
        p = _tensor(member)
        manifold = getattr(p, "manifold", None)
        if manifold is None or getattr(manifold, "name", None) == "Euclidean":
            continue
        names = group.get("param_names")
        named = isinstance(member, tuple)
        name = member[0] if named else names[place] if names else f"group {index}[{place}]"
        spec = _spec(p, manifold, f"parameter {name!r} of shape {tuple(p.shape)}")
        _check_group(group, spec, name)
        _check_point(p, manifold, name)
        specs[place] = spec
    return specs


def _spec(p: Tensor, manifold: Any, what: str) -> str:
    """Return the sphere spec of a manifold for this parameter."""
    kind = getattr(manifold, "name", type(manifold).__name__)
    if kind == "Spheres":
        return str(manifold.sphere)
    if kind != "Sphere":
        raise ValueError(
            f"{what} is on geoopt's manifold {manifold}; here it can be on Sphere, SphereExact, "
            "sphereopt.manifold.Spheres or Euclidean: leave it to an optimizer of geoopt"
        )
    if getattr(manifold, "projector", None) is not None:
        raise ValueError(
            f"{what} is on a sphere within a subspace, which has no spec; "
            "leave it to an optimizer of geoopt"
        )
    if p.ndim == 1:
        return "tensor"
    if all(n == 1 for n in p.shape[1:-1]):
        return "row"
    raise ValueError(
        f"{what} has spheres in its last axis, and a spec splits dim 0; store it with the leading "
        f"dimensions merged, as ({p.shape[:-1].numel()}, {p.shape[-1]})"
    )


def _check_group(group: Group, spec: str, name: str) -> None:
    if group.get("joint"):
        raise ValueError(
            f"parameter {name!r} is on a manifold of its own, and its group has joint=True; "
            "put it in another group"
        )
    if group.get("sphere", spec) not in (spec, None):
        raise ValueError(
            f"parameter {name!r} is on a manifold with sphere={spec!r}, and its group has "
            f"sphere={group['sphere']!r}; leave one of them out"
        )


def _check_point(p: Tensor, manifold: Any, name: str) -> None:
    if p.device.type == "meta":
        return
    # geoopt takes norms in the parameter's dtype.
    tolerance = max(1e-5, 4 * torch.finfo(p.dtype).eps)
    with torch.no_grad():
        ok, why = manifold.check_point_on_manifold(p, explain=True, atol=tolerance, rtol=tolerance)
    if not ok:
        raise ValueError(
            f"parameter {name!r} of shape {tuple(p.shape)} is not on its manifold ({why}); call "
            "its proj_() under torch.no_grad() first"
        )


def _split(group: Group, specs: dict[int, str]) -> Iterator[Group]:
    """Yield the ordinary part of a group, if there is any, and a part per spec."""
    members, names = _members(group), group.get("param_names")
    keys = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    for spec in (None, *dict.fromkeys(specs.values())):
        places = [i for i in range(len(members)) if specs.get(i) == spec]
        if not places:
            continue
        part = {**keys, "params": [members[i] for i in places]}
        if names:
            part["param_names"] = [names[i] for i in places]
        yield {"kind": "constrained", **part, "sphere": spec, "joint": False} if spec else part

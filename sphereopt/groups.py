"""Parameter groups: which weights go on which spheres, and how everything else is treated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from sphereopt import spheres as _spheres
from sphereopt.detect import SphereReport, find_spheres
from sphereopt.detect.copying import unwrap
from sphereopt.names import did_you_mean, plain

__all__ = ["param_groups"]

Group = dict[str, Any]
Name = str | tuple[str, ...]
Constrain = str | Iterable[str] | Mapping[str, str] | Callable[[str, Tensor], bool | str]

_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


def param_groups(
    model: nn.Module,
    spheres: SphereReport | Mapping[Any, str | None] | Tensor | Sequence[Tensor],
    *,
    constrain: Constrain = (),
    constrain_sphere: str = "tensor",
    groups: Iterable[Group] | None = None,
    decay_norms_and_biases: bool = False,
    norm_gains: bool = False,
) -> list[Group]:
    """Return ordinary optimizer groups that say which weights live on which spheres.

    Args:
        model: The module to train; DDP and compiled wrappers are looked through, and a
            parametrized weight is its ``parametrizations.<name>.original``.
        spheres: A report of ``find_spheres``; or names to specs, ``{"conv1.weight": "row"}``,
            where a tuple of names is one joint sphere, ``{("fc.weight", "fc.bias"): "tensor"}``,
            and a spec may have pieces, ``{"qkv.weight": "block:8@0:512,block:8@512:1024"}``; or
            example inputs, which ``find_spheres`` is then run on.
        constrain: Weights to put on spheres by choice, though their norm matters to the function:
            a name, a glob (``"blocks.*.mlp.*.weight"``), several of them, a mapping of them to
            specs, or a predicate of name and tensor that returns a bool or a spec. Globs and
            predicates leave alone what ``spheres`` has claimed.
        constrain_sphere: Spec of constrained weights without one of their own.
        groups: Your own groups, with your keys (``lr``, ...), covering every trainable parameter.
            Each is split, and its parts keep its keys. By default: all parameters.
        decay_norms_and_biases: False puts norm gains and biases (and everything of one dimension
            or none) in groups with ``weight_decay`` 0.
        norm_gains: True also takes the spheres of a report that consist of norm gains and biases
            only (members of one dimension or none). They are as invariant as any other, but few
            expect gains of fixed norm, or one angle per step for a whole vector of them.

    Returns:
        Groups with ``params`` as (name, tensor) pairs, in the order of the model. Groups on
        spheres have ``sphere``, ``joint`` and ``kind``: ``"proved"`` for what ``spheres`` says,
        ``"constrained"`` for what ``constrain`` adds. All others have ``sphere=None``: also the
        norm gains and biases of a report (see ``norm_gains``), and joint spheres of a report with
        a frozen member, which would have to move too. A mapping is taken as it is.

    Raises:
        ValueError: If a name is not in the model, a spec does not fit, a parameter is claimed
            twice, a joint sphere of a mapping has frozen and trainable members, or a trainable
            parameter is in none of your groups.

    Notes:
        Frozen parameters (``requires_grad=False``) are left out; tied ones appear once, and any of
        their names will do. The groups are plain values: any torch optimizer takes them, and
        ``track`` reads them there.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 4, bias=False), torch.nn.BatchNorm1d(4))
        >>> for group in param_groups(net, {"0.weight": "row"}):
        ...     print([name for name, _ in group["params"]], group["sphere"])
        ['0.weight'] row
        ['1.weight', '1.bias'] None
    """
    model = unwrap(model)
    if isinstance(spheres, Tensor | Sequence) and not isinstance(spheres, str):
        spheres = find_spheres(model, (spheres,) if isinstance(spheres, Tensor) else tuple(spheres))
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    chosen = _Chosen(model, names)
    if isinstance(spheres, SphereReport):
        chosen.add_report(spheres, norm_gains)
    else:
        chosen.add_proved(spheres)
    chosen.add_constrained(constrain, constrain_sphere)
    own_norm = {
        p for m in model.modules() if isinstance(m, _NORMS) for p in m.parameters(recurse=False)
    }
    no_decay = set() if decay_norms_and_biases else {p for p in names if p.ndim < 2} | own_norm
    result = []
    for group in _users_groups(names, groups):
        result += _split(group, names, chosen.spheres, no_decay)
    return result


class _Chosen:
    """Which sphere each parameter goes on: (spec, kind, members of the joint sphere)."""

    def __init__(self, model: nn.Module, names: dict[Tensor, str]) -> None:
        self.spheres: dict[Tensor, tuple[str, str, tuple[Tensor, ...]]] = {}
        self._names = names
        self._aliases = dict(model.named_parameters(remove_duplicate=False))

    def add_report(self, report: SphereReport, norm_gains: bool) -> None:
        for name, spec in report.spheres.items():
            members = self._members(name)
            movable = all(p.requires_grad for p in members)
            if movable and (norm_gains or any(p.ndim > 1 for p in members)):
                self._put(members, spec, "proved")

    def add_proved(self, specs: Mapping[Any, str | None]) -> None:
        for name, spec in specs.items():
            if spec is None:
                continue
            members = self._members(name)
            if all(p.requires_grad for p in members):
                self._put(members, spec, "proved")
            elif any(p.requires_grad for p in members):
                raise ValueError(
                    f"joint sphere {name!r} has frozen and trainable members; freeze all or none"
                )

    def add_constrained(self, wanted: Constrain, default: str) -> None:
        trainable = [(name, p) for p, name in self._names.items() if p.requires_grad]
        if callable(wanted):
            for name, p in trainable:
                answer = wanted(name, p)
                if answer and p not in self.spheres:
                    spec = answer if isinstance(answer, str) else default
                    self._put((p,), spec, "constrained")
            return
        patterns = [wanted] if isinstance(wanted, str) else list(wanted)
        for pattern in patterns:
            spec = wanted[pattern] if isinstance(wanted, Mapping) else default
            found = [p for name, p in trainable if fnmatchcase(name, pattern)]
            if len(found) > 1 or pattern not in self._aliases:
                free = [p for p in found if p not in self.spheres]
                found = free if found else [self._find(pattern)]
            for p in found:
                if p.requires_grad:
                    self._put((p,), spec, "constrained")

    def _members(self, name: Name) -> tuple[Tensor, ...]:
        return tuple(self._find(n) for n in ([name] if isinstance(name, str) else name))

    def _find(self, name: str) -> Tensor:
        """Return the parameter of this name, under any wrapper's or parametrization's spelling."""
        short = plain(name)
        module, _, leaf = short.rpartition(".")
        original = ".".join(filter(None, (module, "parametrizations", leaf, "original")))
        for candidate in (name, short, original):
            if candidate in self._aliases:
                return self._aliases[candidate]
        inside = [n for n in self._aliases if n.startswith(original)]
        hint = did_you_mean(short, self._aliases, inside)
        raise ValueError(f"the model has no parameter {name!r}{hint}")

    def _put(self, members: tuple[Tensor, ...], spec: str, kind: str) -> None:
        for p in members:
            name = self._names[p]
            if p in self.spheres:
                raise ValueError(
                    f"parameter {name!r} is given two spheres ({self.spheres[p][1]} "
                    f"{self.spheres[p][0]!r} and {kind} {spec!r}); name it once"
                )
            try:
                _spheres.check(spec, p.shape, joint=len(members) > 1)
            except ValueError as error:
                raise ValueError(
                    f"parameter {name!r} has shape {tuple(p.shape)}, but {error}"
                ) from None
            self.spheres[p] = (spec, kind, members if len(members) > 1 else ())


def _users_groups(names: dict[Tensor, str], groups: Iterable[Group] | None) -> list[Group]:
    """Return the groups to split, checked to hold every trainable parameter exactly once."""
    trainable = [p for p in names if p.requires_grad]
    if groups is None:
        return [{"params": trainable}]
    result, seen = [], set()
    for group in groups:
        given = group["params"]
        given = [given] if isinstance(given, Tensor) else list(given)
        params = [p[1] if isinstance(p, tuple) else p for p in given]
        for p in params:
            if p not in names:
                raise ValueError(
                    f"a group has a tensor of shape {tuple(p.shape)} that is no "
                    "parameter of the model; build the groups from this model"
                )
            if p in seen:
                raise ValueError(f"parameter {names[p]!r} is in two groups; leave it in one")
            seen.add(p)
        order = {p: i for i, p in enumerate(names)}
        kept = sorted((p for p in params if p.requires_grad), key=order.__getitem__)
        result.append({**{k: v for k, v in group.items() if k != "param_names"}, "params": kept})
    missing = [names[p] for p in trainable if p not in seen]
    if missing:
        raise ValueError(
            f"{len(missing)} trainable parameter(s) are in none of the groups: "
            f"{', '.join(missing)}; add them, or set requires_grad=False"
        )
    return result


def _split(
    group: Group,
    names: dict[Tensor, str],
    chosen: Mapping[Tensor, tuple[str, str, tuple[Tensor, ...]]],
    no_decay: set[Tensor],
) -> list[Group]:
    """Return the parts of one group: its spheres, then decayed, then undecayed parameters."""
    keys = {k: v for k, v in group.items() if k != "params"}
    on_spheres: dict[Any, list[Tensor]] = {}
    ordinary: dict[bool, list[Tensor]] = {True: [], False: []}
    inside = set(group["params"])
    for p in group["params"]:
        if p not in chosen:
            ordinary[p not in no_decay].append(p)
            continue
        outside = [names[q] for q in chosen[p][2] if q not in inside]
        if outside:
            raise ValueError(
                f"parameter {names[p]!r} is on a joint sphere with {', '.join(outside)}, which is "
                "in another group; put them in one, or leave that sphere out of a dict made from "
                "report.spheres"
            )
        on_spheres.setdefault(chosen[p], []).append(p)
    parts: list[Group] = []
    for (spec, kind, members), params in on_spheres.items():
        part = {"sphere": spec, "joint": bool(members), "kind": kind}
        parts.append({**keys, "params": _named(members or params, names), **part})
    for decayed, params in ordinary.items():
        if params:
            part = {"sphere": None, "joint": False} | ({} if decayed else {"weight_decay": 0.0})
            parts.append({**keys, "params": _named(params, names), **part})
    return parts


def _named(params: Iterable[Tensor], names: dict[Tensor, str]) -> list[tuple[str, Tensor]]:
    return [(names[p], p) for p in params]

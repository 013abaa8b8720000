"""What another optimizer did to its weights, from copies made before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from sphereopt import products, spheres
from sphereopt.moves import Gram, _root
from sphereopt.optim._checks import parameter_name, units
from sphereopt.optim._reading import Pull, Reading
from sphereopt.optim.constrain import Constraint
from sphereopt.radius import Travel

__all__ = ["Around", "around", "watched", "whole"]

#: Spheres are compared in runs of about so many weights: temporaries stay in cache.
_RUN = 1 << 19


@dataclass(frozen=True, slots=True)
class Around:
    """The weights of some spheres before a step, and where to find them after it.

    Attributes:
        optimizer: Class of the optimizer.
        name: Of the parameter, or of the members of a joint sphere.
        group: Their group.
        params: The parameters.
        copies: What they were.
        free: Their norm may change; False where ``constrain`` holds it.
    """

    optimizer: type[Optimizer]
    name: str
    group: dict[str, Any]
    params: list[Tensor]
    copies: list[Tensor]
    free: bool

    def readings(self) -> Iterator[Reading]:
        """Yield the readings of the step, from the weights around it."""
        if any(p.grad is None for p in self.params):
            return
        grads = [p.grad for p in self.params if p.grad is not None]
        members = [self._pieces(xs) for xs in (self.copies, self.params, grads)]
        for piece in zip(*members, strict=True):
            count = piece[0][0].shape[0]
            size = sum(x.numel() for x in piece[0])
            rows = max(1, _RUN * count // max(size, 1))
            for at in range(0, count, rows):
                yield self._reading(*([x[at : at + rows] for x in xs] for xs in piece))

    def _pieces(self, tensors: list[Tensor]) -> list[tuple[Tensor, ...]]:
        """Return for each piece of the spec the views of all members."""
        views = [spheres.split(whole(x.detach()), self.group["sphere"]) for x in tensors]
        return list(zip(*views, strict=True))

    def _reading(self, old: list[Tensor], new: list[Tensor], grads: list[Tensor]) -> Reading:
        # In the dtype of the weights: near each other, they have an exact difference.
        step = [_wide(x) - _wide(y) for x, y in zip(old, new, strict=True)]
        lr, sign = float(self.group["lr"]), -1 if self.group.get("maximize") else 1
        per_lr = 1 / lr if lr else 0.0
        ww, ws, ss = products.square(old), products.dot(old, step), products.square(step)
        wg, sg = (sign * products.dot(x, grads) for x in (old, step))
        one, norm = torch.ones_like(ww), _root((ww - 2 * ws + ss).clamp_min(0))
        gram = Gram(ww, per_lr * ws, per_lr**2 * ss)
        return Reading(
            optimizer=self.optimizer,
            group=self.group,
            names=[self.name],
            counts=[len(one)],
            shapes=[tuple(old[0].shape[1:])],
            dims=[sum(x[0].numel() for x in old)],
            travel=Travel(gram, one, -lr * one, one, norm),
            pull=Pull(wg, products.square(grads), per_lr * sg, ww),
            lr=lr,
            homogeneity=1 if issubclass(self.optimizer, torch.optim.SGD) else 0,
            free=self.free,
        )


def around(optimizer: Optimizer, keep: Callable[[str], bool]) -> list[Around]:
    """Copy the weights that an optimizer is about to change.

    Args:
        optimizer: Any optimizer whose groups have a ``sphere``.
        keep: Whether to log a parameter, by its name.

    Returns:
        One entry for each parameter, or joint sphere, on spheres.
    """
    held = _held(optimizer)
    return [
        Around(
            optimizer=type(optimizer),
            name=name,
            group=group,
            params=params,
            copies=[p.detach().clone() for p in params],
            free=name not in held,
        )
        for name, group, params in watched(optimizer, keep)
        if all(p.requires_grad for p in params)
    ]


def watched(
    optimizer: Optimizer, keep: Callable[[str], bool]
) -> Iterator[tuple[str, dict[str, Any], list[Tensor]]]:
    """Yield name, group and tensors of every parameter, or joint sphere, that is to be logged.

    Args:
        optimizer: Any optimizer.
        keep: Whether to log a parameter, by its name.
    """
    for index, group in enumerate(optimizer.param_groups):
        for start, params in units(group) if group.get("sphere") is not None else ():
            name = parameter_name(group, index, start, len(params))
            if keep(name):
                yield name, group, params


def _held(optimizer: Optimizer) -> set[str]:
    """Return the parameters that ``constrain`` holds on their spheres, by its hooks."""
    hooks = optimizer._optimizer_step_post_hooks.values()
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return {name for owner in owners if isinstance(owner, Constraint) for name in owner.radius}


def _wide(x: Tensor) -> Tensor:
    return x.to(products.accumulator(x.dtype))


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor's all shards, gathered here; any other, densely stored, as it is."""
    full = getattr(tensor, "full_tensor", None)  # DTensor: no need to import what may be missing
    tensor = full() if full is not None else tensor
    return tensor.to_dense() if tensor.layout != torch.strided else tensor

r"""From a live ``torch.optim`` optimizer to what ours should be given in its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sphereopt.theory.equilibrium import equilibrium
from sphereopt.theory.errors import OutOfRangeError
from sphereopt.theory.moments import Array
from sphereopt.theory.played import played
from sphereopt.theory.trajectory import trajectory

__all__ = ["SphereLr", "sphere_lr"]

#: Class names, the optimizer here, ours, and the options that both understand. AdamW before Adam,
#: from which it derives.
CLASSES = {
    "AdamW": ("adamw", "SphereAdam", ("betas", "eps")),
    "Adam": ("adam", "SphereAdam", ("betas", "eps")),
    "SGD": ("sgd", "SphereSGD", ("momentum", "dampening", "nesterov")),
    "Lion": ("lion", "SphereLion", ("betas",)),
    "Muon": ("muon", "SphereMuon", ("momentum", "nesterov")),
}
#: Parameters of a group that are followed step by step; their angles vary little.
_FOLLOWED = 16


@dataclass(frozen=True)
class SphereLr:
    """What one of our optimizers should be given in place of a group of another.

    Attributes:
        group: Index of the group.
        optimizer: Name of our class.
        lr: Radians per step: the largest of ``angles`` or, without them, the angle at equilibrium.
        hyper: What else to give it.
        angles: Radians per step at each of the steps asked for, (steps,), or ``None``.
        warnings: Reasons to doubt the numbers, in words.
    """

    group: int
    optimizer: str
    lr: float
    hyper: Mapping[str, Any]
    angles: Array | None = None
    warnings: tuple[str, ...] = ()

    def factor(self, step: int) -> float:
        """Return the angle of a step over ``lr``, as ``LambdaLR`` takes it.

        Args:
            step: From 0; after the last of ``angles`` the last counts.

        Returns:
            A factor of at most 1; 1 without ``angles``.
        """
        if self.angles is None:
            return 1.0
        return float(self.angles[min(step, len(self.angles) - 1)] / self.lr)

    def __str__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.hyper.items())
        lines = [f"group {self.group}: {self.optimizer}(lr={self.lr:.4g}{options})"]
        if self.angles is not None:
            first, last, count = self.angles[0], self.angles[-1], len(self.angles)
            lines.append(f"  {first:.3g} rad in the first of {count} steps, {last:.3g} in the last")
        return "\n".join([*lines, *(f"  warning: {text}" for text in self.warnings)])


@dataclass(frozen=True)
class _Block:
    """One parameter as the calculator sees it."""

    rms: float
    dim: int
    grad_norm: float | None
    shape: tuple[int, int]


def sphere_lr(
    optimizer: Any, scheduler: Any = None, *, steps: int | None = None
) -> tuple[SphereLr, ...]:
    r"""Return what our optimizers should be given in place of a live ``torch.optim`` one.

    Without ``steps``, the angle at which the present learning rate and weight decay settle. With
    ``steps``, the angle of every step to come, from the present norms of the weights and, where it
    matters, the present gradients.

    Args:
        optimizer: ``torch.optim`` ``SGD``, ``Adam``, ``AdamW`` or ``Muon``, or a ``Lion``.
        scheduler: Its learning rate scheduler, if it has one; played ahead on a copy.
        steps: How many steps are to come; needed with a scheduler.

    Returns:
        One entry for each group with matrices or filters. Other parameters (norm gains, biases)
        keep the options they have.

    Raises:
        OutOfRangeError: If the optimizer is unknown, an option is out of range, or something is
            missing: gradients where the angle depends on them, or a weight decay without steps.

    Notes:
        Nothing is changed. *Assumes* that the group's matrices and filters are scale-invariant, and
        what :func:`~sphereopt.theory.trajectory` assumes; buffers are taken to be empty. A group
        has one angle, the root mean square over its parameters. To follow the optimizer exactly,
        with no prediction in between, give its own options to ours with ``radius="free"``.

    References:
        Rotational Equilibrium: How Weight Decay Balances Learning Across Neural Networks, Kosson et
        al., 2024 (optimizers that turn weights by the angle of the original's equilibrium).

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(64, 64, bias=False)
        >>> options = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
        >>> optimizer = torch.optim.AdamW(layer.parameters(), **options)
        >>> print(sphere_lr(optimizer)[0])
        group 0: SphereAdam(lr=0.003229, betas=(0.9, 0.95), eps=1e-08)
    """
    source, ours, names = _identify(optimizer)
    if scheduler is not None and steps is None:
        raise OutOfRangeError("steps", None, "must be given with a scheduler: how many to foresee")
    ahead = played(scheduler, steps) if scheduler is not None and steps is not None else None
    found = []
    for index, group in enumerate(optimizer.param_groups):
        blocks = list(_blocks(group))
        if not blocks:
            continue
        made = "adamw" if group.get("decoupled_weight_decay") else source
        hyper = {name: group[name] for name in names}
        rates = None if ahead is None else ahead[index]
        angles, notes = _angles(made, group, hyper, blocks, rates, steps)
        lr = float(np.max(angles))
        given = hyper | ({"move": "rotate"} if ours == "SphereSGD" else {})
        notes = (*notes, *_approximations(group, rates))
        found.append(SphereLr(index, ours, lr, given, None if steps is None else angles, notes))
    if not found:
        raise OutOfRangeError("optimizer", source, "has no matrix or filter to put on a sphere")
    return tuple(found)


def _identify(optimizer: Any) -> tuple[str, str, tuple[str, ...]]:
    """Return the optimizer's name here, ours, and the options they share."""
    for kind in type(optimizer).__mro__:
        if kind.__name__ in CLASSES:
            return CLASSES[kind.__name__]
    name = type(optimizer).__name__
    raise OutOfRangeError("optimizer", name, f"must be one of {', '.join(sorted(CLASSES))}")


def _blocks(group: Mapping[str, Any]) -> Iterator[_Block]:
    """Yield what the calculator needs of a group's matrices and filters."""
    for p in group["params"]:
        if p.ndim < 2 or not p.requires_grad or p.numel() == 0:
            continue
        norm = float(p.detach().norm())
        if norm == 0:
            continue
        grad = None if p.grad is None else float(p.grad.norm()) * norm
        shape = (p.shape[0], p.numel() // p.shape[0])
        yield _Block(norm / p.numel() ** 0.5, p.numel(), grad or None, shape)


def _approximations(group: Mapping[str, Any], ahead: Mapping[str, Array] | None) -> Iterator[str]:
    """Yield what of a group the calculator does not follow."""
    if group.get("amsgrad"):
        yield "amsgrad: taken for Adam, whose second moment can fall"
    for name in ("momentum", "betas"):
        if ahead is not None and name in ahead and np.ptp(ahead[name], axis=0).any():
            yield f"{name} changes with the schedule; it is taken as it is now"


def _angles(
    source: str,
    group: Mapping[str, Any],
    hyper: Mapping[str, Any],
    blocks: list[_Block],
    ahead: Mapping[str, Array] | None,
    steps: int | None,
) -> tuple[Array, tuple[str, ...]]:
    """Return the root mean square angle over the blocks at every step, or one at equilibrium."""
    lr, decay = float(group["lr"]), float(group["weight_decay"])
    if steps is None and lr * decay == 0:
        raise OutOfRangeError(
            "steps",
            None,
            f"must be given: with lr={lr:g} and weight_decay={decay:g} nothing settles",
        )
    if steps is not None and source in ("sgd", "adam") and not all(b.grad_norm for b in blocks):
        raise OutOfRangeError(
            "optimizer", source, "has weights without gradients: call backward() once before"
        )
    ordered = sorted(blocks, key=lambda block: block.rms)
    shown = np.unique(np.linspace(0, len(ordered) - 1, _FOLLOWED).round().astype(int))
    squares, notes = [], {}
    for block in (ordered[i] for i in shown):
        options: dict[str, Any] = dict(hyper) | {"dim": block.dim, "grad_norm": block.grad_norm}
        if source == "muon":
            adjust = group.get("adjust_lr_fn") or "original"
            options |= {"shape": block.shape, "adjust_lr_fn": adjust}
        if steps is None:
            settled = equilibrium(source, lr=lr, weight_decay=decay, **options)
            notes.update(dict.fromkeys(settled.warnings))
            squares.append(np.array([settled.angle**2]))
        else:
            rates = {"lr": lr, "weight_decay": decay} if ahead is None else dict(ahead)
            run = trajectory(
                source,
                lr=rates["lr"],
                weight_decay=rates.get("weight_decay", decay),
                steps=steps,
                rms0=block.rms,
                **options,
            )
            squares.append(run.angle**2)
    return np.sqrt(np.mean(squares, axis=0)), tuple(notes)

"""What a torch scheduler will do, without doing it."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np

from sphereopt.theory.errors import OutOfRangeError, whole
from sphereopt.theory.moments import Array

__all__ = ["played"]

_FOLLOWED = ("lr", "weight_decay", "momentum", "betas")


def played(scheduler: Any, steps: int) -> list[dict[str, Array]]:
    """Return the hyperparameters of every group at each of the next steps of a scheduler.

    Args:
        scheduler: Any of ``torch.optim.lr_scheduler``, at any point of its run.
        steps: How many optimizer steps, one scheduler step after each.

    Returns:
        For each group ``lr`` and, where the group has them, ``weight_decay``, ``momentum`` and
        ``betas``: arrays of shape (steps,), betas of shape (steps, 2).

    Raises:
        OutOfRangeError: If the scheduler follows a metric and so cannot be foreseen.

    Notes:
        The scheduler is copied with its optimizer replaced by the bare groups, without parameters:
        neither model nor optimizer are copied or touched.
    """
    whole("steps", steps, low=1)
    optimizer = scheduler.optimizer
    if "metrics" in inspect.signature(scheduler.step).parameters:
        raise OutOfRangeError(
            "lr", type(scheduler).__name__, "follows a metric and cannot be played ahead"
        )
    bare = _Bare(optimizer)
    copied = copy.deepcopy(scheduler, {id(optimizer): bare})
    rows: list[list[dict[str, Any]]] = [[] for _ in bare.param_groups]
    for _ in range(steps):
        for row, group in zip(rows, bare.param_groups, strict=True):
            row.append({name: group[name] for name in _FOLLOWED if name in group})
        copied.step()
    return [{name: np.array([at[name] for at in row], float) for name in row[0]} for row in rows]


class _Bare:
    """An optimizer's groups without its parameters, for a scheduler to work on."""

    def __init__(self, optimizer: Any) -> None:
        self.param_groups = [
            {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        self.defaults = dict(optimizer.defaults)
        # What schedulers look at to see whether the optimizer stepped before them.
        self._opt_called = True
        self.step = optimizer.step

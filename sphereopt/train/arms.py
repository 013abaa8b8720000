"""The three arms: one network, one set of groups, three ways to step them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from sphereopt.optim import SphereSGD
from sphereopt.train.config import MOMENTUM, Config, learning_rate, predicted_angle

__all__ = ["ARMS", "Arm", "set_lr"]

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: Short name; its JSONL file is called so.
        letter: How texts refer to it.
        optimizer: The optimizer in words.
        build: From groups and options to the optimizer.
    """

    name: str
    letter: str
    optimizer: str
    build: Callable[[Groups, Config], Optimizer]


def _sgd(groups: Groups, config: Config) -> Optimizer:
    return torch.optim.SGD(
        groups, lr=config.lr, momentum=MOMENTUM, weight_decay=config.weight_decay
    )


def _free(groups: Groups, config: Config) -> Optimizer:
    return SphereSGD(
        groups,
        lr=config.lr,
        momentum=MOMENTUM,
        weight_decay=config.weight_decay,
        radius="free",
    )


def _fixed(groups: Groups, config: Config) -> Optimizer:
    # On a sphere of fixed radius weight decay has nothing to do; the rest of the model keeps its.
    on_spheres = {"radius": "fixed", "move": "rotate", "weight_decay": 0.0}
    groups = [group | (on_spheres if group["sphere"] is not None else {}) for group in groups]
    return SphereSGD(groups, lr=config.lr, momentum=MOMENTUM, weight_decay=config.weight_decay)


ARMS = (
    Arm("sgd", "a", "torch.optim.SGD", _sgd),
    Arm("free", "b", 'SphereSGD(radius="free")', _free),
    Arm("fixed", "c", 'SphereSGD(radius="fixed", move="rotate")', _fixed),
)


def set_lr(optimizer: Optimizer, step: int, config: Config) -> None:
    """Set the learning rates of a step.

    Args:
        optimizer: The optimizer of any arm.
        step: Steps made before, from 0.
        config: The run's options.

    Notes:
        Groups whose ``lr`` is an angle get the equilibrium angle of ``torch.optim.SGD`` at its
        learning rate of that step, so under a cosine they follow its root.
    """
    lr, angle = learning_rate(step, config), predicted_angle(step, config)
    for group in optimizer.param_groups:
        turns = group.get("sphere") is not None and group.get("move") == "rotate"
        group["lr"] = angle if turns else lr

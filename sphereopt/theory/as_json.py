"""Answers as JSON: plain objects with keys that stay."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from sphereopt.theory.answer import Answer, Run, Twice
from sphereopt.theory.moments import Array
from sphereopt.theory.settings import Settings

__all__ = ["POINTS", "as_json"]

#: Arrays are thinned to as many steps, evenly, first and last included.
POINTS = 200


def as_json(answer: Answer) -> dict[str, Any]:
    """Return an answer as nested dictionaries, lists, strings and finite numbers.

    Args:
        answer: What :func:`~sphereopt.theory.answer` returned.

    Returns:
        What ``sphereopt calc --json`` prints. All keys are always there; what is unknown or was
        not asked for is ``None`` or an empty list.

    Example:
        >>> from sphereopt.theory import answer
        >>> found = as_json(answer("adamw", lr=1e-3, weight_decay=0.1))
        >>> sorted(found)[:4], found["run"]
        (['batch_size', 'convert', 'doubled', 'equilibrium'], None)
    """
    found = answer.equilibrium
    return {
        "settings": _settings(answer.settings),
        "equilibrium": {
            name: getattr(found, name)
            for name in (
                "kappa",
                "memory",
                "K",
                "angle",
                "diffusive_angle",
                "norm",
                "rms",
                "grad_ratio",
                "relaxation",
            )
        }
        | {"settling": answer.settling},
        "sphere": _settings(answer.sphere),
        "doubled": {
            "weight_decay": _twice(answer.double_decay),
            "lr": _twice(answer.double_lr),
        },
        "schedule": None if answer.plan is None else dict(answer.plan),
        "memories": answer.memories if answer.run is None else answer.run.followed.memories,
        "run": None if answer.run is None else _run(answer.run),
        "convert": None if answer.converted is None else _settings(answer.converted),
        "batch_size": [_settings(choice) for choice in answer.batch],
        "steps": [_settings(choice) for choice in answer.longer],
        "missing": list(answer.missing),
        "warnings": list(answer.warnings),
    }


def _settings(settings: Settings) -> dict[str, Any]:
    return {
        "optimizer": settings.optimizer,
        "lr": settings.lr,
        "weight_decay": settings.weight_decay,
        "hyper": dict(settings.hyper),
        "note": settings.note,
        "call": str(settings),
    }


def _twice(factors: Twice) -> dict[str, float]:
    return {"angle": factors.angle, "norm": factors.size, "memory": factors.memory}


def _run(run: Run) -> dict[str, Any]:
    followed = run.followed
    steps = len(followed.lr)
    at = np.unique(np.linspace(0, steps - 1, min(steps, POINTS)).round().astype(int))

    def thin(values: Array | None) -> list[float | None] | None:
        if values is None:
            return None
        return [None if math.isinf(x) else x for x in values[at].tolist()]

    return {
        "relaxations": run.relaxations,
        "reached": None if run.reached is None else list(run.reached),
        "grad_rise": run.grad_rise,
        "points": {
            "step": at.tolist(),
            "lr": thin(followed.lr),
            "norm": thin(followed.norm),
            "rms": thin(followed.rms),
            "equilibrium": thin(followed.equilibrium),
            "angle": thin(followed.angle),
            "quasi_static": thin(run.quasi_static),
            "angle_double_weight_decay": thin(run.double_decay.angle),
            "angle_double_lr": thin(run.double_lr.angle),
        },
    }

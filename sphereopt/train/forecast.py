"""What the calculator says of the first arm, from its initial norms and gradient norms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sphereopt.theory import trajectory
from sphereopt.train.config import MOMENTUM, Config, learning_rate

__all__ = ["ForecastPoint", "forecast"]

#: Logged steps that are averaged for the size of the gradient: one batch's is a noisy sample.
_WINDOW = 9


@dataclass(frozen=True)
class ForecastPoint:
    """What the calculator says of a logged step.

    Attributes:
        step: Steps made.
        norm: Median norm of all spheres after it.
        angle: Mean angle over all spheres, in radians per step.
    """

    step: int
    norm: float
    angle: float


def forecast(
    config: Config, norms: Tensor, steps: Sequence[int], grad_norms: Tensor
) -> list[ForecastPoint]:
    """Return norm and angle of the first arm as :func:`sphereopt.theory.trajectory` has them.

    Args:
        config: The run's options.
        norms: Norm of every sphere before the first step, (spheres,).
        steps: The logged steps, from 1.
        grad_norms: Norm of the gradient times norm of the weights at these, (logged, spheres).

    Returns:
        A point for every logged step.

    Notes:
        The norms in between are not used: only where they started.
    """
    lr = np.array([learning_rate(step, config) for step in range(config.steps)])
    squares = grad_norms.to(torch.float64).square().numpy()
    wide = np.pad(squares, ((_WINDOW // 2, _WINDOW // 2), (0, 0)), mode="edge")
    # A filter that is silent for a while has no gradient; the recursion divides by none.
    wide = np.maximum(wide, 1e-60)
    smooth = np.lib.stride_tricks.sliding_window_view(wide, _WINDOW, axis=0).mean(axis=-1)
    every = np.arange(1, config.steps + 1)
    runs = [
        trajectory(
            "sgd",
            lr=lr,
            weight_decay=config.weight_decay,
            momentum=MOMENTUM,
            norm0=start,
            grad_norm=np.sqrt(np.interp(every, steps, smooth[:, i])),
        )
        for i, start in enumerate(norms.tolist())
    ]
    at = np.array(steps) - 1
    middle = np.median([run.norm[at] for run in runs if run.norm is not None], axis=0)
    mean = np.mean([run.angle[at] for run in runs], axis=0)
    return [
        ForecastPoint(step, float(norm), float(angle))
        for step, norm, angle in zip(steps, middle, mean, strict=True)
    ]

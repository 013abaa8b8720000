"""What a comparison run is told, checked before anything is computed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sphereopt.theory import equilibrium
from sphereopt.theory.errors import LARGEST

__all__ = ["DTYPES", "MOMENTUM", "Config", "OptionError", "learning_rate", "predicted_angle"]

DTYPES = ("float32", "float64")
MOMENTUM = 0.9
#: Label smoothing keeps gradients from vanishing on images the net has learned: the theory is about
#: gradients whose noise dominates.
SMOOTHING = 0.1
#: Where the cosine ends, as a share of ``lr``. The relaxation time grows as 1/lr, so below that the
#: norms could not follow the schedule any more.
FLOOR = 0.2


class OptionError(ValueError):
    """A value that cannot be used.

    Args:
        option: Name of the option, as a field of :class:`Config`.
        value: The value given.
        remedy: What is wrong with it and what to do, one sentence.

    Example:
        >>> print(OptionError("steps", 0, "must be 1 or more"))
        steps='0': must be 1 or more
    """

    def __init__(self, option: str, value: object, remedy: str) -> None:
        super().__init__(f"{option}={str(value)!r}: {remedy}")
        self.option = option
        self.value = str(value)
        self.remedy = remedy


@dataclass(frozen=True)
class Config:
    r"""Options of :func:`sphereopt.train.train`.

    Attributes:
        data: ``"digits"``, a folder of MNIST-like idx files, or an ``.npz`` file.
        steps: Training steps of each arm.
        seed: Seed of the initial weights and of the order of the batches.
        batch_size: Images per step.
        lr: Peak learning rate of ``torch.optim.SGD``; a cosine takes it to a fifth of that.
        weight_decay: Weight decay :math:`\lambda` of ``torch.optim.SGD``.
        dtype: ``"float64"`` or ``"float32"``.
        norm_eps: The eps inside the BatchNorm layers. The weights are scale-invariant only as far
            as it is small against the variance of what the layer sees.
        threads: Threads that torch may use; more do not help at this size, and the sums of another
            number of threads round differently.

    Raises:
        OptionError: If a value is out of range.

    Example:
        >>> Config(steps=0)
        Traceback (most recent call last):
        ...
        sphereopt.train.config.OptionError: steps='0': must be 1 or more
    """

    data: str = "digits"
    steps: int = 2000
    seed: int = 0
    batch_size: int = 32
    lr: float = 0.1
    weight_decay: float = 0.01
    dtype: str = "float64"
    norm_eps: float = 1e-12
    threads: int = 1

    def __post_init__(self) -> None:
        for option, least in (("steps", 1), ("batch_size", 2), ("threads", 1), ("seed", 0)):
            value = getattr(self, option)
            if value < least:
                raise OptionError(option, value, f"must be {least} or more")
        if self.seed >= 2**63:
            raise OptionError("seed", self.seed, "must be below 2**63")
        for option in ("lr", "weight_decay"):
            value = getattr(self, option)
            if not 0 < value < LARGEST:
                raise OptionError(
                    option,
                    value,
                    f"must be positive and below {LARGEST:g}: without it there is no equilibrium "
                    "to compare",
                )
        if not (0 < self.norm_eps < math.inf):
            raise OptionError("norm_eps", self.norm_eps, "must be positive; use a small one")
        if self.dtype not in DTYPES:
            raise OptionError("dtype", self.dtype, f"use {' or '.join(DTYPES)}")
        if self.lr * self.weight_decay >= 1 - MOMENTUM:
            raise OptionError(
                "weight_decay",
                self.weight_decay,
                f"times lr={self.lr:g} it must stay below 1-momentum={1 - MOMENTUM:.1g}, or the "
                "weights shrink faster than the momentum forgets; use less",
            )


def learning_rate(step: int, config: Config) -> float:
    r"""Return the learning rate of ``torch.optim.SGD`` at a step: a cosine from lr to lr/5.

    Args:
        step: Steps made before, from 0.
        config: The run's options.

    Returns:
        The learning rate.

    Example:
        >>> [round(learning_rate(n, Config(lr=1.0, steps=100)), 3) for n in (0, 50, 100)]
        [1.0, 0.6, 0.2]
    """
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return config.lr * (FLOOR + (1 - FLOOR) * cosine)


def predicted_angle(step: int, config: Config) -> float:
    r"""Return the equilibrium angle at a step, :math:`\arccos(1 - lr_t\lambda/(1+\mu))`.

    Args:
        step: Steps made before, from 0.
        config: The run's options.

    Returns:
        Radians per step, for the learning rate of that step.

    Example:
        >>> round(predicted_angle(0, Config(lr=0.1, weight_decay=0.01)), 4)
        0.0324
    """
    lr = learning_rate(step, config)
    return equilibrium("sgd", lr=lr, weight_decay=config.weight_decay, momentum=MOMENTUM).angle

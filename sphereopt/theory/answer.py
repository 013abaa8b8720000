r"""All answers to one question: what will these settings do to a scale-invariant block?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np

from sphereopt.theory.convert import for_batch_size, for_steps, translate
from sphereopt.theory.equilibrium import Equilibrium, equilibrium
from sphereopt.theory.errors import OutOfRangeError, number
from sphereopt.theory.moments import Array
from sphereopt.theory.rules import Hyperparameters, Rule, rule
from sphereopt.theory.schedules import schedule
from sphereopt.theory.settings import Settings
from sphereopt.theory.trajectory import Trajectory, trajectory

__all__ = ["MOST_STEPS", "Answer", "Run", "Twice", "answer"]

#: A million steps take about a second, and three runs are made.
MOST_STEPS = 10_000_000
_FOLLOWED = 200_000
#: Which of ours keeps the momentum of which optimizer.
_SPHERE = {"sgd": "sgd", "sgdw": "sgd", "adam": "adam", "adamw": "adam", "muon": "muon"}


@dataclass(frozen=True)
class Run:
    """What a run with a schedule does.

    Attributes:
        followed: Norm and angle of every step.
        quasi_static: Angle at which the rate of each step would settle, (steps,).
        relaxations: How many relaxation times of the norm the run lasts.
        reached: First and last step of the longest time that the norm is within 5 % of its
            equilibrium, if that is a relaxation time or the whole run; else ``None``.
        grad_rise: Largest norm over last norm: by how much the gradient's norm rises to the end
            because the weights shrink.
        double_decay: The same run with twice the weight decay.
        double_lr: The same run with twice the learning rate.
    """

    followed: Trajectory
    quasi_static: Array
    relaxations: float
    reached: tuple[int, int] | None
    grad_rise: float
    double_decay: Trajectory
    double_lr: Trajectory


@dataclass(frozen=True)
class Twice:
    """Equilibrium with a doubled setting over that without: factors.

    Attributes:
        angle: Of the angle per step.
        size: Of the norm and the root mean square.
        memory: Of the memory.
    """

    angle: float
    size: float
    memory: float


@dataclass(frozen=True)
class Answer:
    """What settings do to a scale-invariant block.

    Attributes:
        settings: What was asked about.
        equilibrium: Where decay and growth balance.
        settling: Steps at constant rate until the norm is within 5 % of equilibrium; ``None`` if
            the norm at the start or at equilibrium is unknown.
        sphere: Ours with the same momentum and the angle of equilibrium.
        double_decay: What twice the weight decay does to the equilibrium.
        double_lr: What twice the learning rate does.
        plan: The schedule of the run, if there is one: ``kind``, ``steps``, and its options.
        memories: How many memories of the direction a run at equilibrium lasts.
        run: What the run does, if enough is known.
        converted: The optimizer to change to, if one was asked for.
        batch: Equivalent choices for another batch size, if asked for.
        longer: Equivalent choices for another number of steps, if asked for.
        missing: What would have to be given to follow the run, in words.
    """

    settings: Settings
    equilibrium: Equilibrium
    settling: float | None
    sphere: Settings
    double_decay: Twice
    double_lr: Twice
    plan: Mapping[str, Any] | None
    memories: float | None
    run: Run | None
    converted: Settings | None
    batch: tuple[Settings, ...]
    longer: tuple[Settings, ...]
    missing: tuple[str, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """Reasons to doubt the numbers."""
        return self.equilibrium.warnings


def answer(
    optimizer: str,
    *,
    lr: float,
    weight_decay: float,
    plan: Mapping[str, Any] | None = None,
    dim: int | None = None,
    grad_norm: float | None = None,
    norm0: float | None = None,
    rms0: float | None = None,
    dtype: str = "float32",
    convert: str | None = None,
    target_hyper: Mapping[str, Any] | None = None,
    batch_factor: float | None = None,
    steps_factor: float | None = None,
    **hyper: Unpack[Hyperparameters],
) -> Answer:
    """Return all that follows from the settings of an optimizer.

    Args:
        optimizer: As in :func:`equilibrium`.
        lr: Learning rate; of a run the largest.
        weight_decay: Weight decay.
        plan: Of a run: ``kind``, ``steps`` and further arguments of :func:`schedule`.
        dim: As in :func:`trajectory`.
        grad_norm: As in :func:`trajectory`; a constant.
        norm0: As in :func:`trajectory`.
        rms0: As in :func:`trajectory`.
        dtype: As in :func:`equilibrium`.
        convert: ``target`` of :func:`translate`.
        target_hyper: Hyperparameters of the target.
        batch_factor: New batch size over old.
        steps_factor: New number of steps over old.
        **hyper: See :class:`~sphereopt.theory.Hyperparameters`.

    Returns:
        The answers.

    Raises:
        OutOfRangeError: If a value is out of range, or needed and not given.

    Example:
        >>> found = answer("adamw", lr=3e-4, weight_decay=0.1, rms0=0.02, betas=(0.9, 0.95))
        >>> print(found.sphere, round(found.settling))
        SphereAdam(lr=0.001769, betas=(0.9, 0.95)) 33503
    """
    start = _start(norm0, rms0)
    known: dict[str, Any] = {"dim": dim, "grad_norm": grad_norm}
    fixed: dict[str, Any] = {**known, "dtype": dtype, **hyper}
    found = equilibrium(optimizer, lr=lr, weight_decay=weight_decay, **fixed)
    made = rule(optimizer, hyper)
    try:
        more = equilibrium(optimizer, lr=lr, weight_decay=2 * weight_decay, **fixed)
        faster = equilibrium(optimizer, lr=2 * lr, weight_decay=weight_decay, **fixed)
    except OutOfRangeError:
        raise OutOfRangeError(
            "weight_decay", weight_decay, f"times lr={lr!r} must be well below 0.5; use less"
        ) from None
    rates: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    rate = None if plan is None else _scheduled(lr, plan)
    missing = _missing(made, plan, grad_norm, norm0, rms0)
    converted = None
    if convert is not None:
        converted = translate(
            optimizer, convert, **rates, **known, target_hyper=target_hyper, **hyper
        )
    return Answer(
        settings=Settings(optimizer, lr, weight_decay, made.hyper),
        equilibrium=found,
        settling=_settling(made, found, rates, start, {**known, **made.hyper}),
        sphere=_on_sphere(made, rates, known),
        double_decay=_twice(found, more),
        double_lr=_twice(found, faster),
        plan=plan,
        memories=None if rate is None else found.kappa * _square_sum(_slowed(made, rate, lr)),
        run=None if rate is None or missing else _run(made, found, rate, rates, known | start),
        converted=converted,
        batch=_choices(for_batch_size, made, batch_factor, rates),
        longer=_choices(for_steps, made, steps_factor, rates),
        missing=missing,
    )


def _start(norm0: float | None, rms0: float | None) -> dict[str, float | None]:
    if norm0 is not None and rms0 is not None:
        raise OutOfRangeError("norm0", norm0, f"or rms0={rms0!r} must be given, not both")
    for name, value in (("norm0", norm0), ("rms0", rms0)):
        if value is not None:
            number(name, value, above=0)
    return {"norm0": norm0, "rms0": rms0}


def _choices(
    function: Callable[..., tuple[Settings, ...]],
    made: Rule,
    factor: float | None,
    rates: Mapping[str, float],
) -> tuple[Settings, ...]:
    return () if factor is None else function(made.name, factor, **rates, **made.hyper)


def _missing(
    made: Rule,
    plan: Mapping[str, Any] | None,
    grad_norm: float | None,
    norm0: float | None,
    rms0: float | None,
) -> tuple[str, ...]:
    """Return what a run would need."""
    if plan is None:
        return ()
    result = []
    if norm0 is None and rms0 is None:
        result.append("rms0 or norm0: the size of the weights before the first step")
    if grad_norm is None and made.needs_grad_norm:
        result.append(
            "grad_norm: norm of the block's gradient times norm of the block, measured once"
        )
    return tuple(result)


def _on_sphere(made: Rule, rates: Mapping[str, Any], known: Mapping[str, Any]) -> Settings:
    """Return ours with the same momentum."""
    hyper: dict[str, Any] = dict(made.hyper)
    target = "sphere-" + _SPHERE.get(made.name, "lion")
    same = None
    if made.name in ("sign", "signum"):
        same = {"betas": (made.filter.decay,) * 2}
    return translate(made.name, target, **rates, **known, target_hyper=same, **hyper)


def _twice(found: Equilibrium, other: Equilibrium) -> Twice:
    # The gradient's ratio says the norm where the norm itself is unknown: SGD without grad_norm.
    if found.rms is not None and other.rms is not None:
        size = other.rms / found.rms
    elif found.norm is not None and other.norm is not None:
        size = other.norm / found.norm
    else:
        assert found.grad_ratio is not None
        assert other.grad_ratio is not None
        size = math.sqrt(found.grad_ratio / other.grad_ratio)
    return Twice(other.angle / found.angle, size, other.memory / found.memory)


def _settling(
    made: Rule,
    found: Equilibrium,
    rates: Mapping[str, float],
    given: Mapping[str, float | None],
    fixed: Mapping[str, Any],
) -> float | None:
    r"""Return steps at constant rate until the norm stays within 5 %.

    :math:`|w|^p` decays exponentially to its equilibrium, p = 2 or 4; under Adam with L2, where
    p = 3, it nearly does. Short runs are followed step by step, which counts the lag of momentum
    and second moment.
    """
    if given["rms0"] is not None and found.rms is not None:
        ratio = given["rms0"] / found.rms
    elif given["norm0"] is not None and found.norm is not None:
        ratio = given["norm0"] / found.norm
    else:
        return None
    p, closed = sum(made.symmetry), 0.0
    if abs(ratio - 1) > 0.05:
        goal = 1.05 if ratio > 1 else 0.95
        closed = found.relaxation * math.log((ratio**p - 1) / (goal**p - 1))
    count = int(2 * closed) + 10_000
    if count > _FOLLOWED:
        return closed
    options: dict[str, Any] = {**rates, **given, **fixed}
    run = trajectory(made.name, steps=count, **options)
    if run.settled.all():
        return 0.0
    after = count - int(np.argmax(~run.settled[::-1]))
    return closed if after == count else float(after)


def _scheduled(lr: float, plan: Mapping[str, Any]) -> Array:
    """Return the learning rate of every step."""
    options: dict[str, Any] = dict(plan)
    if number("steps", options["steps"]) > MOST_STEPS:
        raise OutOfRangeError("steps", options["steps"], f"must be at most {MOST_STEPS}")
    return schedule(options.pop("kind"), lr, options.pop("steps"), **options)


def _square_sum(x: Array) -> float:
    return float(np.sum(x**2))


def _slowed(made: Rule, rate: Array, peak: float) -> Array:
    """Return the angle at which each rate would settle, over that at the peak."""
    i, j = made.symmetry
    return (rate / peak) ** (j / (i + j))


def _run(
    made: Rule,
    found: Equilibrium,
    rate: Array,
    rates: Mapping[str, float],
    given: Mapping[str, Any],
) -> Run:
    """Follow a run, and those with a doubled setting."""
    peak, decay = rates["lr"], rates["weight_decay"]
    rest: dict[str, Any] = {**given, **made.hyper}
    run = trajectory(made.name, lr=rate, weight_decay=decay, **rest)
    size = run.norm if run.norm is not None else run.rms
    assert size is not None
    relaxations = run.memories * sum(made.symmetry)
    return Run(
        followed=run,
        quasi_static=found.angle * _slowed(made, rate, peak),
        relaxations=relaxations,
        reached=_reached(run.settled, relaxations * rate / rate.sum()),
        grad_rise=float(size.max() / size[-1]),
        double_decay=trajectory(made.name, lr=rate, weight_decay=2 * decay, **rest),
        double_lr=trajectory(made.name, lr=2 * rate, weight_decay=decay, **rest),
    )


def _reached(settled: Any, relaxations: Array) -> tuple[int, int] | None:
    """Return the longest time at equilibrium, unless the norm only crosses it."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], settled, [False]]).astype(int)))
    clock = np.concatenate([[0.0], np.cumsum(relaxations)])
    times = [(clock[b] - clock[a], int(a), int(b) - 1) for a, b in edges.reshape(-1, 2)]
    longest = max(times, default=(0.0, 0, 0))
    if longest[0] >= min(1.0, clock[-1] * (1 - 1e-9)) and longest[0] > 0:
        return longest[1:]
    return None

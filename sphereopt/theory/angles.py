"""Schedules of angles: what an optimizer's run amounts to on spheres, and the way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import numpy as np

from sphereopt.theory.convert import alignment
from sphereopt.theory.errors import OutOfRangeError
from sphereopt.theory.moments import Array
from sphereopt.theory.rules import Hyperparameters
from sphereopt.theory.settings import SPHERE_OPTIMIZERS, base_of, inherited
from sphereopt.theory.trajectory import Schedule, trajectory

__all__ = ["angle_schedule", "lr_for_angles"]


def angle_schedule(
    source: str,
    target: str = "sphere-adam",
    *,
    lr: Schedule,
    weight_decay: Schedule,
    steps: int | None = None,
    dim: int | None = None,
    norm0: float | None = None,
    rms0: float | None = None,
    grad_norm: Schedule | None = None,
    target_hyper: Mapping[str, Any] | None = None,
    **hyper: Unpack[Hyperparameters],
) -> Array:
    r"""Return the angle of every step with which an optimizer on spheres follows a run.

    .. math:: \theta^{target}_t = \theta^{source}_t\sqrt{K_{source}/K_{target}}

    Args:
        source: As in :func:`trajectory`.
        target: ``"sphere-sgd"``, ``"sphere-adam"``, ``"sphere-lion"`` or ``"sphere-muon"``.
        lr: As in :func:`trajectory`.
        weight_decay: As in :func:`trajectory`.
        steps: As in :func:`trajectory`.
        dim: As in :func:`trajectory`.
        norm0: As in :func:`trajectory`.
        rms0: As in :func:`trajectory`.
        grad_norm: As in :func:`trajectory`.
        target_hyper: Hyperparameters of the target; if it takes the same ones as the source, those
            of the source unless given here.
        **hyper: Of the source; see :class:`~sphereopt.theory.Hyperparameters`.

    Returns:
        Radians per step, (steps,): ``lr`` of a sphere optimizer with ``move="rotate"``.

    Raises:
        OutOfRangeError: If a value is out of range, or needed and not given.

    Notes:
        *Assumes* a random walk, and that K does not change along the run. Blocks of one shape and
        initial rms share a schedule; blocks of other initial rms differ until they settle.

    References:
        Rotational Equilibrium: How Weight Decay Balances Learning Across Neural Networks, Kosson
        et al., 2024 (rotational optimizer variants: the angle of equilibrium).

    Example:
        >>> from sphereopt.theory import schedule
        >>> rate = schedule("cosine", 3e-4, 100_000, warmup=2000)
        >>> angles = angle_schedule("adamw", lr=rate, weight_decay=0.1, rms0=0.02)
        >>> angles[[2000, 50_000]].round(5)
        array([0.00322, 0.00109])
    """
    if target not in SPHERE_OPTIMIZERS:
        names = ", ".join(SPHERE_OPTIMIZERS)
        raise OutOfRangeError("target", target, f"must be one of {names}")
    run = trajectory(
        source,
        lr=lr,
        weight_decay=weight_decay,
        steps=steps,
        dim=dim,
        norm0=norm0,
        rms0=rms0,
        grad_norm=grad_norm,
        **hyper,
    )
    base = base_of("target", target)
    other: Any = inherited(source, hyper, base, target_hyper)
    share = alignment(source, **hyper) / alignment(base, **other)
    return np.asarray(run.angle * np.sqrt(share), float)


def lr_for_angles(
    optimizer: str,
    angles: Sequence[float] | Array,
    *,
    weight_decay: Schedule,
    dim: int | None = None,
    norm0: float | None = None,
    rms0: float | None = None,
    grad_norm: Schedule | None = None,
    **hyper: Unpack[Hyperparameters],
) -> Array:
    r"""Return the learning rates with which an optimizer turns a block by given angles.

    The inverse of :func:`trajectory`: :math:`lr_t` such that ``trajectory(...).angle`` is the one
    given. To leading order it is :math:`\theta_t\,r_t/|u_t|`, and the norm :math:`r_t` follows.

    Args:
        optimizer: As in :func:`trajectory`.
        angles: Angle of every step, in radians; (steps,).
        weight_decay: As in :func:`trajectory`.
        dim: As in :func:`trajectory`.
        norm0: As in :func:`trajectory`.
        rms0: As in :func:`trajectory`.
        grad_norm: As in :func:`trajectory`.
        **hyper: See :class:`~sphereopt.theory.Hyperparameters`.

    Returns:
        Learning rates, (steps,).

    Raises:
        OutOfRangeError: If a value is out of range, or needed and not given, or no learning rates
            give these angles with this decay.

    Notes:
        *Assumes* a random walk, as :func:`trajectory` does.

    References:
        Rotational Equilibrium: How Weight Decay Balances Learning Across Neural Networks, Kosson
        et al., 2024.

    Example:
        >>> rate = lr_for_angles("adamw", [1e-3] * 1000, weight_decay=0.1, rms0=0.02)
        >>> run = trajectory("adamw", lr=rate, weight_decay=0.1, rms0=0.02)
        >>> bool(np.allclose(run.angle, 1e-3))
        True
    """
    wanted = np.asarray(angles, float)
    if wanted.ndim != 1 or not np.all((wanted >= 0) & (wanted < np.pi / 2)):
        raise OutOfRangeError("angles", angles, "must be one per step, from 0 to below pi/2")
    known: dict[str, Any] = {"weight_decay": weight_decay, "dim": dim, "norm0": norm0}
    known |= {"rms0": rms0, "grad_norm": grad_norm, **hyper}
    rate = np.where(wanted > 0, 1e-9, 0.0)
    for _ in range(500):
        try:
            found = trajectory(optimizer, lr=rate, **known).angle
        except OutOfRangeError as error:
            if error.name != "lr":
                raise
            break
        ratio = np.divide(wanted, found, out=np.ones_like(wanted), where=wanted > 0)
        rate = rate * ratio
        if np.max(np.abs(ratio - 1)) < 1e-12:
            return np.asarray(rate, float)
    raise OutOfRangeError("angles", angles, "cannot be had with this decay; ask for smaller ones")

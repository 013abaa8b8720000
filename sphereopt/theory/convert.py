r"""Conversions at equilibrium: other optimizers, other batch sizes, other lengths of a run.

A scale-invariant block under decay has two numbers that other optimizers can be given as well: how
fast its direction is forgotten, and the norm at which it settles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Unpack

from sphereopt.theory.equilibrium import Equilibrium, equilibrium
from sphereopt.theory.errors import OutOfRangeError, number
from sphereopt.theory.rules import Hyperparameters, Rule, rule
from sphereopt.theory.settings import SPHERE_OPTIMIZERS, Settings, base_of, inherited

__all__ = ["alignment", "for_batch_size", "for_steps", "init_std", "translate"]


def alignment(optimizer: str, **hyper: Unpack[Hyperparameters]) -> float:
    r"""Return how much an optimizer's momentum aligns its updates: K, for little decay.

    .. math:: K = \lim_{lr\,\lambda\to0}\theta_{diff}^2/\theta^2 = 1 + 2\sum_{k>0}\rho_k

    with the correlation :math:`\rho_k` of updates k steps apart.

    Args:
        optimizer: As in :func:`equilibrium`, or a sphere optimizer: ``"sphere-sgd"``,
            ``"sphere-adam"``, ``"sphere-lion"``, ``"sphere-muon"``.
        **hyper: See :class:`~sphereopt.theory.Hyperparameters`.

    Returns:
        K.

    Raises:
        OutOfRangeError: If a value is out of range.

    References:
        Rotational Equilibrium: How Weight Decay Balances Learning Across Neural Networks, Kosson
        et al., 2024 (K of Adam and Lion, the latter linearized).

    Example:
        >>> round(alignment("sgd", momentum=0.9), 6), round(alignment("sign"), 6)
        (19.0, 1.0)
    """
    base = base_of("optimizer", optimizer)
    made = rule(base, hyper)
    tiny: dict[str, Any] = {"lr": 1e-8, "weight_decay": 1e-8}
    if made.coupled and made.scale is not None:
        # With L2 kappa depends on size and gradient too, but K does not.
        tiny |= {"dim": 1, "grad_norm": 1.0}
        hyper = {**hyper, "eps": 0.0}
    return equilibrium(base, **tiny, **hyper).K


def translate(
    source: str,
    target: str,
    *,
    lr: float,
    weight_decay: float,
    dim: int | None = None,
    grad_norm: float | None = None,
    target_hyper: Mapping[str, Any] | None = None,
    **hyper: Unpack[Hyperparameters],
) -> Settings:
    r"""Return settings with which another optimizer forgets as fast and settles at the same norm.

    .. math:: \kappa_{target} = \kappa_{source}, \qquad |w|_{target} = |w|_{source}

    and for sphere optimizers, whose norm is given, the angle per step

    .. math:: \theta_{target} = \theta_{diff}/\sqrt{K_{target}}

    Args:
        source: As in :func:`equilibrium`.
        target: The same, or ``"sphere-sgd"``, ``"sphere-adam"``, ``"sphere-lion"``,
            ``"sphere-muon"``.
        lr: Learning rate of the source.
        weight_decay: Weight decay of the source.
        dim: Number of weights; needed for Adam with L2, and between optimizers whose norm depends
            on the gradient (SGD, SGDW, Adam) and those whose norm does not.
        grad_norm: As in :func:`equilibrium`; needed where ``dim`` is.
        target_hyper: Hyperparameters of the target. Where it takes the same ones as the source
            they are those of the source unless given here; else its defaults.
        **hyper: Of the source; see :class:`~sphereopt.theory.Hyperparameters`.

    Returns:
        Settings of the target.

    Raises:
        OutOfRangeError: If a value is out of range, or needed and not given, or the target cannot
            forget that fast.

    Notes:
        *Assumes* a random walk at equilibrium. The two optimizers then move alike over many steps;
        what they make of the loss on the way is theirs.
        *Valid when* both memories are long against those of the momenta.

    References:
        Rotational Equilibrium: How Weight Decay Balances Learning Across Neural Networks, Kosson
        et al., 2024.

    Example:
        >>> print(translate("adamw", "lion", lr=3e-4, weight_decay=0.1))
        SphereLion(lr=4.43e-05, weight_decay=0.6771, betas=(0.9, 0.99))
        >>> print(translate("adamw", "sphere-adam", lr=3e-4, weight_decay=0.1, betas=(0.9, 0.95)))
        SphereAdam(lr=0.001769, betas=(0.9, 0.95))
    """
    own = rule(source, hyper)
    base = base_of("target", target)
    other = rule(base, inherited(source, hyper, base, target_hyper))
    dim = next((d for d in (own.dim, other.dim, dim) if d is not None), None)
    if target in SPHERE_OPTIMIZERS:
        found = equilibrium(
            source, lr=lr, weight_decay=weight_decay, dim=dim, grad_norm=grad_norm, **hyper
        )
        angle = found.angle * math.sqrt(alignment(source, **hyper) / _alignment(other))
        return Settings(target, angle, 0.0, other.hyper)
    if own.needs_grad_norm != other.needs_grad_norm:
        _need_size(source, target, dim, grad_norm)
    elif own.needs_grad_norm and own.scale is None and other.scale is None:
        # Both norms go with the root of the gradient's: any value does.
        grad_norm = grad_norm or 1.0
    known: dict[str, Any] = {"dim": dim, "grad_norm": grad_norm}
    found = equilibrium(source, lr=lr, weight_decay=weight_decay, **known, **hyper)
    return _matched(found, other, lr, weight_decay, known)


def _alignment(made: Rule) -> float:
    return alignment(made.name, **made.hyper)


def _need_size(source: str, target: str, dim: int | None, grad_norm: float | None) -> None:
    for name, value in (("dim", dim), ("grad_norm", grad_norm)):
        if value is None:
            raise OutOfRangeError(
                name,
                None,
                f"must be given: of {source} and {target} only one has a norm that depends on the "
                "gradient's",
            )


def _matched(
    wanted: Equilibrium, made: Rule, lr: float, weight_decay: float, known: dict[str, Any]
) -> Settings:
    """Return the settings with the forgetting and the norm of an equilibrium."""
    i, j = made.symmetry
    for _ in range(200):
        try:
            found = equilibrium(made.name, lr=lr, weight_decay=weight_decay, **known, **made.hyper)
        except OutOfRangeError as error:
            if error.name != "lr":
                raise
            break
        # Both times s forgets s^2 times as fast, or s times under Adam with L2 and a large eps;
        # c is the rescaling symmetry.
        s = math.sqrt(wanted.kappa / found.kappa)
        c = _size(wanted) / _size(found)
        lr, weight_decay = lr * s * c**i, weight_decay * s * c**-j
        if abs(s - 1) + abs(c - 1) < 1e-14:
            return Settings(made.name, lr, weight_decay, made.hyper)
    raise OutOfRangeError(
        "weight_decay",
        weight_decay,
        f"or lr of {wanted.optimizer} make it forget too fast for "
        f"{made.name}: 1/{wanted.memory:.3g} per step; lower them, or the target's momentum",
    )


def _size(found: Equilibrium) -> float:
    size = found.norm if found.norm is not None else found.rms
    assert size is not None
    return size


def for_batch_size(
    optimizer: str,
    factor: float,
    *,
    lr: float,
    weight_decay: float,
    **hyper: Unpack[Hyperparameters],
) -> tuple[Settings, ...]:
    r"""Return the equivalent choices for a batch k times as large.

    The angle per *sample* stays: :math:`\theta_{diff}^2`, the square of the angle that a step
    contributes in the long run, becomes k times as large, with k times fewer steps.

    .. math::
        \text{decoupled:}\quad & k\,lr\,\lambda, \qquad \text{SGD:}\quad k\,lr\,\lambda, \qquad
        \text{Adam with L2:}\quad k\,lr^2\lambda

    Args:
        optimizer: As in :func:`equilibrium`.
        factor: New batch size over old, :math:`k`.
        lr: Learning rate.
        weight_decay: Weight decay.
        **hyper: See :class:`~sphereopt.theory.Hyperparameters`; they are kept.

    Returns:
        Three settings of one equilibrium angle: by lr alone, by decay alone, by both alike. The
        note says which of them keeps the norm and so has no transient.

    Raises:
        OutOfRangeError: If a value is out of range.

    Notes:
        *Assumes* that noise dominates the gradient: its norm falls as :math:`1/\sqrt k`. Signal
        and noise then both turn the weights per sample as before.
        *Valid when* k steps turn the weights little, and they are remembered much longer than the
        momentum. Momentum keeps its memory in samples if :math:`1-\beta` becomes
        :math:`k(1-\beta)`; under torch's SGD lr then goes with :math:`1-\mu`.

    References:
        On the SDEs and Scaling Rules for Adaptive Gradient Algorithms, Malladi et al., 2022.
        How to set AdamW's weight decay as you scale model and dataset size, Wang and Aitchison,
        2024.

    Example:
        >>> for choice in for_batch_size("adamw", 4, lr=3e-4, weight_decay=0.1):
        ...     print(choice.lr, choice.weight_decay, choice.note)
        0.0012 0.1 steps / 4
        0.0003 0.4 steps / 4
        0.0006 0.2 steps / 4; keeps the norm
    """
    k = number("factor", factor, above=0)
    made = rule(optimizer, hyper)
    # Of Adam with L2 the decay is divided by the size of the gradient, which falls as k^-1/2.
    share = 2 / 3 if made.coupled and made.scale is not None else 1.0
    keeps = 0 if made.coupled or made.scale is None else 2
    return _choices(made, k**share, lr, weight_decay, f"steps / {k:.4g}", keeps)


def for_steps(
    optimizer: str,
    factor: float,
    *,
    lr: float,
    weight_decay: float,
    **hyper: Unpack[Hyperparameters],
) -> tuple[Settings, ...]:
    r"""Return the equivalent choices for a run k times as long at the same batch size.

    The share of the run that the weights remember stays: :math:`\kappa\,T` is kept, and with it
    :math:`lr\,\lambda\,T` (under Adam with L2 :math:`lr^2\lambda\,T^{3/2}`).

    Args:
        optimizer: As in :func:`equilibrium`.
        factor: New number of steps over old, :math:`k`.
        lr: Learning rate.
        weight_decay: Weight decay.
        **hyper: See :class:`~sphereopt.theory.Hyperparameters`; they are kept.

    Returns:
        Three settings: by lr alone, by decay alone, by both alike, which keeps the norm.

    Raises:
        OutOfRangeError: If a value is out of range.

    Notes:
        A place to start from. The best memory grows more slowly than the data in large models
        (Bergsma et al., 2025).

    References:
        How to set AdamW's weight decay as you scale model and dataset size, Wang and Aitchison,
        2024.
        Power Lines: Scaling Laws for Weight Decay and Batch Size in LLM Pre-training, Bergsma et
        al., 2025.

    Example:
        >>> [round(choice.weight_decay, 6) for choice in for_steps("lion", 4, lr=1e-4,
        ...                                                        weight_decay=1.0)]
        [1.0, 0.25, 0.5]
    """
    k = number("factor", factor, above=0)
    return _choices(rule(optimizer, hyper), 1 / k, lr, weight_decay, f"steps x {k:.4g}", 2)


def _choices(
    made: Rule, speed: float, lr: float, weight_decay: float, note: str, keeps: int
) -> tuple[Settings, ...]:
    """Return what forgets ``speed`` times as fast: by lr, by decay, by both."""
    lr, weight_decay = number("lr", lr, above=0), number("weight_decay", weight_decay, above=0)
    i, j = made.symmetry
    # kappa is a power of lr^j decay^i, and both times s forgets s^2 times as fast.
    by_lr, by_decay = speed ** ((i + j) / (2 * j)), speed ** ((i + j) / (2 * i))
    both = math.sqrt(speed)
    pairs = ((by_lr, 1.0), (1.0, by_decay), (both, both))
    return tuple(
        Settings(
            made.name,
            lr * x,
            weight_decay * y,
            made.hyper,
            note + ("; keeps the norm" if at == keeps else ""),
        )
        for at, (x, y) in enumerate(pairs)
    )


def init_std(
    optimizer: str,
    *,
    lr: float,
    weight_decay: float,
    dim: int | None = None,
    grad_norm: float | None = None,
    **hyper: Unpack[Hyperparameters],
) -> float:
    r"""Return the standard deviation of initial weights from which the norm has nowhere to go.

    .. math:: \sigma = |w|_{equilibrium}/\sqrt d

    which is :math:`\sqrt{lr/(2\lambda)}` for AdamW, whatever the shape.

    Args:
        optimizer: As in :func:`equilibrium`.
        lr: Learning rate.
        weight_decay: Weight decay.
        dim: Number of weights; needed for SGD, SGDW and Adam.
        grad_norm: As in :func:`equilibrium`; needed for SGD, SGDW and Adam: measured once, at any
            weights.
        **hyper: See :class:`~sphereopt.theory.Hyperparameters`.

    Returns:
        The standard deviation.

    Raises:
        OutOfRangeError: If a value is out of range, or needed and not given.

    Notes:
        *Valid when* the gradient's noise at initialization is what it is later. A warm-up moves
        the equilibrium with it; then this is where the norm goes, not where it is.

    References:
        Rotational Equilibrium: How Weight Decay Balances Learning Across Neural Networks, Kosson
        et al., 2024.

    Example:
        >>> round(init_std("adamw", lr=3e-4, weight_decay=0.1), 4)
        0.0387
    """
    made = rule(optimizer, hyper)
    if made.needs_grad_norm:
        for name, value in (("dim", dim), ("grad_norm", grad_norm)):
            if value is None:
                raise OutOfRangeError(
                    name, None, f"must be given: the norm under {optimizer} depends on it"
                )
    found = equilibrium(
        optimizer, lr=lr, weight_decay=weight_decay, dim=dim, grad_norm=grad_norm, **hyper
    )
    assert found.rms is not None
    return found.rms

r"""Norm and angle of a scale-invariant block at every step, for any schedule.

Closed forms hold while the learning rate stands still. Runs warm up, anneal, and rarely last long
enough to be at equilibrium; so the norm is followed step by step (:mod:`sphereopt.theory.moments`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from sphereopt.theory.equilibrium import sized
from sphereopt.theory.errors import OutOfRangeError, number
from sphereopt.theory.moments import Array, Steps, stationary, walk
from sphereopt.theory.moments import steps as per_step
from sphereopt.theory.played import played
from sphereopt.theory.rules import Hyperparameters, Rule, rule
from sphereopt.theory.series import Numbers, series
from sphereopt.theory.words import Section

__all__ = ["Schedule", "Trajectory", "trajectory"]

#: A constant, one number per step, or a torch scheduler (for the learning rate only).
Schedule = Numbers | Any


@dataclass(frozen=True)
class Trajectory:
    r"""Norm and angle of a scale-invariant block at every step; arrays of shape (steps,).

    Attributes:
        optimizer: Name of the optimizer.
        lr: Learning rate of step ``t``, from 0.
        weight_decay: Weight decay of step ``t``.
        norm: Norm of the weights *after* step ``t``; ``None`` if ``dim`` or ``norm0`` is missing.
        rms: Root mean square of the weights after step ``t``; ``None`` if ``dim`` is missing.
        angle: Root mean square angle by which step ``t`` turns the weights, in radians.
        equilibrium: The norm or, without one, the rms at which a run at the rate, decay and size of
            the gradient of step ``t`` would settle; ``inf`` where there is none.
        memories: How many memories of the direction the run lasts, :math:`\sum_t\kappa_t`: the
            cosine between first and last direction is about :math:`e^{-memories}`.
    """

    optimizer: str
    lr: Array
    weight_decay: Array
    norm: Array | None
    rms: Array | None
    angle: Array
    equilibrium: Array
    memories: float

    @property
    def settled(self) -> NDArray[np.bool_]:
        """Whether the norm is within 5 % of its equilibrium after step ``t``; (steps,)."""
        return np.abs(self._size / self.equilibrium - 1) <= 0.05

    @property
    def _size(self) -> Array:
        size = self.norm if self.norm is not None else self.rms
        assert size is not None
        return size

    def __repr__(self) -> str:
        return f"<Trajectory of {self.optimizer}, {len(self.lr)} steps>"

    def __str__(self) -> str:
        last = len(self.lr) - 1
        shown = sorted({0, last // 4, last // 2, 3 * last // 4, last})
        name = "norm" if self.norm is not None else "rms"
        columns = (self.lr, self._size, self.angle)
        rows = tuple((str(t), *(f"{column[t]:.3g}" for column in columns)) for t in shown)
        title = f"{self.optimizer}, {len(self.lr)} steps, {self.memories:.3g} memories"
        return str(Section(title, rows, ("step", "lr", name, "angle")))


def trajectory(
    optimizer: str,
    *,
    lr: Schedule,
    weight_decay: Schedule,
    steps: int | None = None,
    dim: int | None = None,
    norm0: float | None = None,
    rms0: float | None = None,
    grad_norm: Schedule | None = None,
    **hyper: Unpack[Hyperparameters],
) -> Trajectory:
    r"""Return norm and angle of a scale-invariant block at every step of a run.

    .. math::
        \begin{pmatrix} w_{t+1} \\ m_{t+1} \end{pmatrix} =
            F_t \begin{pmatrix} w_t \\ m_t \end{pmatrix} + h_t\,g_t, \qquad
        S_{t+1} = F_t S_t F_t^\top + h_t h_t^\top\,\hat g_t^2/|w_t|^2

    with the second moments :math:`S` of weights and buffer; the angle is that between :math:`w_t`
    and :math:`w_{t+1}`.

    Args:
        optimizer: As in :func:`equilibrium`.
        lr: Learning rate: a constant, one number for each step, or a torch scheduler (that of its
            first group; played on a copy and left as it was). See :func:`schedule`.
        weight_decay: Weight decay: a constant or one number for each step.
        steps: Number of steps; needed unless ``lr`` or ``weight_decay`` has one number for each.
        dim: Number of weights in the block.
        norm0: Norm of the weights before the first step.
        rms0: Their root mean square instead: the standard deviation they were initialized with.
        grad_norm: :math:`\hat g`, as in :func:`equilibrium`: a constant or one number for each
            step. Needed for ``sgd``, ``sgdw`` and ``adam``.
        **hyper: See :class:`~sphereopt.theory.Hyperparameters`.

    Returns:
        Arrays of shape (steps,).

    Raises:
        OutOfRangeError: If a value is out of range, or needed and not given.

    Notes:
        *Assumes* a random walk, as :func:`equilibrium` does, and empty buffers at the start. Does
        not assume that anything changes slowly: momentum, bias correction and the lag of the second
        moment are followed.
        *Valid when* gradients are mostly noise. A million steps take about a second
        (``benchmarks/theory_time.py``).

    References:
        * Spherical Motion Dynamics: Learning Dynamics of Normalized Neural Network using SGD and
          Weight Decay, Wan et al., 2021 (moments of weights and momentum).
        * How to set AdamW's weight decay as you scale model and dataset size, Wang and Aitchison,
          2024 (memory of the weights).

    Example:
        >>> from sphereopt.theory import schedule
        >>> rate = schedule("cosine", 3e-4, 100_000, warmup=2000, final=0.1)
        >>> run = trajectory("adamw", lr=rate, weight_decay=0.1, rms0=0.02, betas=(0.9, 0.95))
        >>> print(run)
        adamw, 100000 steps, 1.65 memories
           step        lr     rms     angle
              0   1.5e-07    0.02   7.5e-06
          24999  0.000265  0.0337   0.00177
          49999  0.000169  0.0329   0.00116
          74999  7.11e-05  0.0293  0.000547
          99999     3e-05  0.0271   0.00025
    """
    made, dim = sized(rule(optimizer, hyper), dim, _typical(grad_norm))
    rate, decay, squares = _arrays(made, lr, weight_decay, grad_norm, steps)
    start = _start(made, dim, norm0, rms0)
    need = per_step(made, rate, decay, dim or 1, np.arange(1.0, len(rate) + 1))
    lost = need.shrink + made.filter.fresh * rate * need.added
    if np.any(lost >= 1):
        t = int(np.argmax(lost))
        raise OutOfRangeError(
            "lr", float(rate[t]), f"times weight_decay={decay[t]:g} must be below 1"
        )
    settling = _equilibria(made, rate, decay, dim, squares)
    # torch's first gradient enters the buffer undampened.
    squares[0] /= (1 - made.dampening) ** 2
    need.added[0] /= 1 - made.dampening
    found = walk(made, need, squares, start)
    size = np.sqrt(found.squares)
    whole_block = made.needs_grad_norm or dim is not None
    per_weight = size / math.sqrt(dim) if dim is not None else None
    return Trajectory(
        optimizer=optimizer,
        lr=rate,
        weight_decay=decay,
        norm=size if whole_block else None,
        rms=per_weight if whole_block else size,
        angle=found.angle,
        equilibrium=settling,
        memories=_memories(made, need, squares, size),
    )


def _typical(grad_norm: Schedule | None) -> float | None:
    """Return the median gradient norm, if gradient norms are given."""
    return None if grad_norm is None else float(np.median(np.asarray(grad_norm, float)))


def _arrays(
    made: Rule, lr: Schedule, weight_decay: Schedule, grad_norm: Schedule | None, steps: int | None
) -> tuple[Array, Array, Array]:
    """Return learning rate, decay and squared gradient norm of every step."""
    if grad_norm is None and made.needs_grad_norm:
        raise OutOfRangeError(
            "grad_norm",
            None,
            f"must be given: the norm under {made.name} depends on it; measure it once, as norm of "
            "the block's gradient times norm of the block",
        )
    if hasattr(lr, "get_last_lr"):
        if steps is None:
            raise OutOfRangeError("steps", None, "must be given with a scheduler")
        lr = played(lr, steps)[0]["lr"]
    given = series(
        steps, lr=lr, weight_decay=weight_decay, grad_norm=1.0 if grad_norm is None else grad_norm
    )
    rate, decay, norm = given.values()
    if not np.all(norm):
        raise OutOfRangeError("grad_norm", 0.0, "must be positive at every step")
    return rate, decay, norm**2


def _start(made: Rule, dim: int | None, norm0: float | None, rms0: float | None) -> float:
    """Return the squared size before the first step, in the units of the recursion."""
    if (norm0 is None) == (rms0 is None):
        raise OutOfRangeError("norm0", norm0, f"or rms0={rms0!r} must be given, not both")
    if norm0 is not None:
        if dim is None and not made.needs_grad_norm:
            raise OutOfRangeError("dim", None, "must be given with norm0; or give rms0")
        return number("norm0", norm0, above=0) ** 2
    if dim is None and made.needs_grad_norm:
        raise OutOfRangeError("dim", None, "must be given with rms0; or give norm0")
    return number("rms0", rms0, above=0) ** 2 * (dim or 1)


_GRID, _CUT = 33, 30.0


def _equilibria(made: Rule, rate: Array, decay: Array, dim: int | None, squares: Array) -> Array:
    r"""Return the size at which rate, decay and size of the gradient of each step would settle.

    By the rescaling symmetry :math:`(c^i lr, c^{-j}\lambda, c\,w)` it is
    :math:`(lr/\lambda)^{1/(i+j)}F(lr^j\lambda^i)`, and :math:`F` hardly varies: a few values do.
    """
    i, j = made.symmetry
    result = np.full(len(rate), math.inf)
    alive = (rate > 0) & (decay > 0)
    if not np.any(alive):
        return result
    lr, wd, gradient = rate[alive], decay[alive], np.sqrt(squares[alive])
    usual = float(np.median(gradient))
    # A loss s times as large is the same loss with another rate and decay.
    if made.needs_grad_norm:
        wd = wd * usual / gradient
    if made.scale is None:
        lr = lr * gradient / usual
    place = j * np.log(lr) + i * np.log(wd)
    unit = np.log(lr / wd) / (i + j)
    # Below the cut F no longer varies at all.
    lowest = max(place.min(), place.max() - _CUT)
    grid = np.linspace(lowest, place.max(), _GRID if place.max() - lowest > 1e-12 else 1)
    # On the grid the ratio of rate and decay is the median one: with eps it matters a little.
    ratio = float(np.median(unit)) * (i + j)
    logs = []
    for x in grid:
        log_decay = (x - j * ratio) / (i + j)
        at = np.exp(np.array([log_decay + ratio])), np.exp(np.array([log_decay]))
        need = per_step(made, at[0], at[1], dim or 1, np.full(1, math.inf))
        found = stationary(made, need, usual**2)
        logs.append(0.5 * math.log(found.square) - ratio / (i + j))
    result[alive] = np.exp(np.interp(place, grid, logs) + unit)
    return result


def _memories(made: Rule, need: Steps, squares: Array, size: Array) -> float:
    """Return the sum of kappa to leading order: decay times what the filter makes of a constant."""
    if not made.coupled:
        return float(-np.sum(np.log1p(-need.shrink)))
    f = made.filter
    pull = need.added * need.scale * (f.fresh + f.carry * f.gain / (1 - f.decay))
    if made.scale is not None:
        pull = pull / (np.sqrt(squares) / size)
    return float(np.sum(pull))

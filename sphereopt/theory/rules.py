r"""The optimizers as linear filters of noise: what a calculator needs to know of each.

Every optimizer here keeps one buffer ``m`` of the gradients and steps along an ``update``:

.. math::
    c_t = p\,m_{t-1} + q\,g_t, \qquad m_t = \beta\,m_{t-1} + \gamma\,g_t, \qquad
    w_{t+1} = a_t\,w_t - lr_t\,\phi(c_t)

They differ in the four numbers of the filter, in what they make of its output (:math:`\phi`:
nothing, division by the root of the second moment, sign, orthogonalization), and in whether weight
decay is added to the gradient ("coupled": :math:`g + \lambda w`, :math:`a = 1`) or shrinks the
weights ("decoupled": :math:`a = 1 - lr\,\lambda`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

from sphereopt.names import did_you_mean
from sphereopt.theory.errors import OutOfRangeError, number, whole
from sphereopt.theory.shapes import Shape, newton_schulz, sign

__all__ = ["OPTIMIZERS", "Filter", "Hyperparameters", "Rule", "SecondMoment", "rule"]

#: Of momenta whose correlations are summed lag by lag.
_LONGEST = 0.99999


class Hyperparameters(TypedDict, total=False):
    """What an optimizer takes beside learning rate and weight decay, named as in ``torch.optim``.

    Attributes:
        momentum: Of ``sgd`` and ``sgdw`` (0), ``signum`` (0.9) and ``muon`` (0.95).
        dampening: Of ``sgd`` and ``sgdw`` (0).
        nesterov: Of ``sgd`` and ``sgdw`` (False) and ``muon`` (True).
        betas: Of ``adam`` and ``adamw`` (0.9, 0.999), and ``lion`` (0.9, 0.99).
        eps: Of ``adam`` and ``adamw`` (1e-8); counts where ``dim`` and ``grad_norm`` are known.
        shape: The matrix that ``muon`` orthogonalizes, (rows, columns).
        adjust_lr_fn: Of ``muon``: ``"original"`` or ``"match_rms_adamw"``.
    """

    momentum: float
    dampening: float
    nesterov: bool
    betas: tuple[float, float]
    eps: float
    shape: tuple[int, int]
    adjust_lr_fn: str


@dataclass(frozen=True)
class Filter:
    """How updates are made of gradients: ``c = carry*m + fresh*g``, ``m = decay*m + gain*g``."""

    decay: float
    gain: float
    carry: float
    fresh: float


@dataclass(frozen=True)
class SecondMoment:
    """Division by the root of a bias-corrected moving average of squared gradients, plus eps."""

    beta: float
    eps: float


@dataclass(frozen=True)
class Rule:
    """What the calculator knows of an optimizer with its hyperparameters.

    Attributes:
        name: As given to :func:`sphereopt.theory.equilibrium`.
        filter: The linear filter from gradients to updates.
        coupled: Whether weight decay is added to the gradient.
        scale: What is done with the filter's output; ``None``: nothing.
        dim: Number of weights, where the optimizer's own options say it.
        hyper: All hyperparameters, defaults filled in.
    """

    name: str
    filter: Filter
    coupled: bool
    scale: SecondMoment | Shape | None = None
    dim: int | None = None
    hyper: Mapping[str, Any] = field(default_factory=dict)

    @property
    def symmetry(self) -> tuple[int, int]:
        r"""Powers :math:`(i, j)`: :math:`(c^i lr, c^{-j}\lambda, c\,w)` leaves directions alone."""
        if self.scale is None:
            return 2, 2
        return (1, 2) if self.coupled else (1, 1)

    @property
    def dampening(self) -> float:
        """By how much all gradients but the first are dampened."""
        return float(self.hyper.get("dampening", 0.0)) if self.filter.decay else 0.0

    @property
    def needs_grad_norm(self) -> bool:
        """Whether the equilibrium norm depends on the size of the gradient."""
        return self.scale is None or self.coupled


def rule(optimizer: str, hyper: Mapping[str, Any]) -> Rule:
    """Return what the calculator knows of an optimizer.

    Args:
        optimizer: One of ``OPTIMIZERS``.
        hyper: Hyperparameters given; see :class:`Hyperparameters`.

    Returns:
        The rule.

    Raises:
        OutOfRangeError: If the optimizer is unknown, or a hyperparameter is not its own or out of
            range.

    Example:
        >>> rule("lion", {}).filter
        Filter(decay=0.99, gain=0.010000000000000009, carry=0.9, fresh=0.09999999999999998)
    """
    if optimizer not in OPTIMIZERS:
        hint = did_you_mean(str(optimizer), OPTIMIZERS)
        raise OutOfRangeError(
            "optimizer", optimizer, f"must be one of {', '.join(OPTIMIZERS)}{hint}"
        )
    defaults, build = OPTIMIZERS[optimizer]
    for name in hyper:
        if name not in defaults:
            own = ", ".join(defaults) or "none"
            raise OutOfRangeError(name, hyper[name], f"is no option of {optimizer} (it has: {own})")
    return build(optimizer, {**defaults, **hyper})


def _sgd(name: str, hyper: dict[str, Any]) -> Rule:
    mu = number("momentum", hyper["momentum"], low=0, below=1)
    damp = number("dampening", hyper["dampening"], low=0, below=1)
    if hyper["nesterov"] and (mu == 0 or damp != 0):
        raise OutOfRangeError("nesterov", True, "needs a momentum and no dampening, as in torch")
    if mu == 0:
        filter = Filter(0.0, 1.0, 0.0, 1.0)
    elif hyper["nesterov"]:
        filter = Filter(mu, 1.0, mu * mu, 1 + mu)
    else:
        filter = Filter(mu, 1 - damp, mu, 1 - damp)
    return Rule(name, filter, coupled=name == "sgd", hyper=hyper)


def _adam(name: str, hyper: dict[str, Any]) -> Rule:
    b1, b2 = _betas(hyper)
    eps = number("eps", hyper["eps"], low=0)
    filter = Filter(b1, 1 - b1, b1, 1 - b1)
    return Rule(name, filter, name == "adam", SecondMoment(b2, eps), hyper=hyper)


def _sign(name: str, hyper: dict[str, Any]) -> Rule:
    mu = number("momentum", hyper.get("momentum", 0.0), low=0, below=_LONGEST)
    filter = Filter(mu, 1 - mu, mu, 1 - mu)
    return Rule(name, filter, False, sign(), hyper=hyper)


def _lion(name: str, hyper: dict[str, Any]) -> Rule:
    b1, b2 = _betas(hyper, below=_LONGEST)
    return Rule(name, Filter(b2, 1 - b2, b1, 1 - b1), False, sign(), hyper=hyper)


def _muon(name: str, hyper: dict[str, Any]) -> Rule:
    mu = number("momentum", hyper["momentum"], low=0, below=_LONGEST)
    adjust, shape = hyper["adjust_lr_fn"], hyper["shape"]
    if adjust not in ("original", "match_rms_adamw"):
        raise OutOfRangeError("adjust_lr_fn", adjust, "must be original or match_rms_adamw")
    if shape is None or len(shape) != 2:
        raise OutOfRangeError(
            "shape", shape, "must be the (rows, columns) of the matrix: muon's step depends on them"
        )
    rows, columns = (whole("shape", size, low=1) for size in shape)
    ratio = math.sqrt(max(1.0, rows / columns))
    if adjust == "match_rms_adamw":
        ratio = 0.2 * math.sqrt(max(rows, columns))
    carry = (mu * mu, 1 - mu * mu) if hyper["nesterov"] else (mu, 1 - mu)
    made = newton_schulz(rows, columns, ratio)
    return Rule(name, Filter(mu, 1 - mu, *carry), False, made, dim=rows * columns, hyper=hyper)


def _betas(hyper: Mapping[str, Any], below: float = 1) -> tuple[float, float]:
    try:
        b1, b2 = hyper["betas"]
    except (TypeError, ValueError):
        raise OutOfRangeError("betas", hyper["betas"], "must be two numbers in [0, 1)") from None
    return number("betas", b1, low=0, below=below), number("betas", b2, low=0, below=below)


_SGD = {"momentum": 0.0, "dampening": 0.0, "nesterov": False}
_ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}
_MUON = {"momentum": 0.95, "nesterov": True, "shape": None, "adjust_lr_fn": "original"}

#: Every optimizer with the defaults of its hyperparameters, and the function that models it.
OPTIMIZERS: Mapping[str, tuple[Mapping[str, Any], Callable[[str, dict[str, Any]], Rule]]] = {
    "sgd": (_SGD, _sgd),
    "sgdw": (_SGD, _sgd),
    "adam": (_ADAM, _adam),
    "adamw": (_ADAM, _adam),
    "sign": ({}, _sign),
    "signum": ({"momentum": 0.9}, _sign),
    "lion": ({"betas": (0.9, 0.99)}, _lion),
    "muon": (_MUON, _muon),
}

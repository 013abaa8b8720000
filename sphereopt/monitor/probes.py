r"""Probes: from the numbers of a step to one value per sphere.

Each probe is a function of a :class:`~sphereopt.optim.Reading`; its docstring says the unit and
what to expect of a scale-invariant weight. :math:`\rho` is the norm the optimizer believes: the
stored one, or the virtual radius under ``radius="free"``. The direction :math:`u` is all that a
step adds to the weights over -lr, weight decay included; :math:`t` is its tangent part, :math:`g`
the gradient of the loss. A probe returns None where it means nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from sphereopt.monitor.laws import Law, law
from sphereopt.moves import RADIANS, _divide, _root, step_angle
from sphereopt.optim._reading import Reading

__all__ = [
    "PROBES",
    "K_measured",
    "Probe",
    "angle",
    "effective_lr",
    "equilibrium_angle",
    "equilibrium_norm",
    "grad_radial_share",
    "growth",
    "growth_law",
    "momentum_alignment",
    "norm",
    "radial_share",
    "relative_update",
    "scaled_grad_norm",
]

Probe = Callable[[Reading], Tensor | None]


def norm(reading: Reading) -> Tensor:
    r"""Return the believed norm :math:`\rho'` after the step, in units of the weights.

    Expected: constant under ``"fixed"``; otherwise growth against decay, settling at
    :func:`equilibrium_norm`.
    """
    return reading.travel.norm


def angle(reading: Reading) -> Tensor:
    r"""Return the angle the weights turned, in radians per step.

    Expected: ``lr`` under ``"rotate"``; otherwise :func:`equilibrium_angle` once norms settle,
    :math:`\sqrt{2\,lr\,\lambda/(1+\mu)}` for SGD with momentum and weight decay.
    """
    return step_angle(reading.travel.gram, reading.travel.a, reading.travel.b)


def effective_lr(reading: Reading) -> Tensor:
    r"""Return the step on the unit sphere per unit of its direction.

    :math:`lr/\rho^2` for SGD (its direction scales like the gradient), :math:`lr/\rho` for Adam
    (whose direction has no scale), and lr itself where a move takes radians; in units of
    radians per unit of direction. The norm is that before the step.

    Expected: alike in layers that learn alike; falls while norms grow.
    """
    lr = reading.lr * torch.ones_like(reading.travel.norm)
    if _in_radians(reading):
        return lr
    return _divide(lr, _root(reading.travel.gram.ww) ** (1 + reading.homogeneity))


def relative_update(reading: Reading) -> Tensor:
    r"""Return the length of the proposed step over the norm, :math:`lr\,|u|/\rho` (no unit).

    Expected: close to the angle while it is small; ``lr`` for moves in radians.
    """
    lr = reading.lr * torch.ones_like(reading.travel.norm)
    if _in_radians(reading):
        return lr
    gram = reading.travel.gram
    return lr * _divide(_root(gram.uu), _root(gram.ww))


def radial_share(reading: Reading) -> Tensor:
    r"""Return the cosine :math:`\langle w,u\rangle/(|w||u|)` of weights and direction (no unit).

    Expected: zero for a tangent direction; positive where the step shrinks the weights (weight
    decay), negative where momentum or Adam's division lets them grow.
    """
    gram = reading.travel.gram
    return _divide(gram.wu, _root(gram.ww * gram.uu))


def grad_radial_share(reading: Reading) -> Tensor:
    r"""Return the cosine :math:`\langle g,w\rangle/(|g||w|)` of gradient and weights (no unit).

    Expected: zero for scale-invariant weights, to the rounding of the gradient and the norm eps;
    one over the root of the number of weights for gradients that have nothing to do with them. It
    is the evidence, in training, that a weight belongs on a sphere.
    """
    pull = reading.pull
    return _divide(pull.wg, _root(pull.ww * pull.gg))


def scaled_grad_norm(reading: Reading) -> Tensor:
    r"""Return :math:`\hat g = |g|\,|w|`, in units of the loss.

    Expected: does not change when weights are rescaled, so it compares runs and layers whose norms
    differ; it is the ``grad_norm`` that :func:`sphereopt.theory.equilibrium` takes.
    """
    return _root(reading.pull.gg * reading.pull.ww)


def growth(reading: Reading) -> Tensor:
    r"""Return by how much the norm grew, :math:`(\rho'-\rho)/\rho` per step (no unit).

    Expected: :func:`growth_law` on average; zero on spheres of fixed radius.
    """
    if not reading.free:
        return torch.zeros_like(reading.travel.norm)
    before = _root(reading.travel.gram.ww)
    return _divide(reading.travel.norm - before, before)


def growth_law(reading: Reading) -> Tensor | None:
    r"""Return by how much the norm should grow, (no unit) per step.

    .. math:: \frac{\rho'}{\rho}-1 = \sqrt{(1-\kappa)^2 + K\,(lr\,|t|/\rho)^2} - 1

    with :math:`\kappa` what weight decay takes per step, and :math:`K` how much longer the way
    outwards becomes because momentum goes on in a direction that was tangent where it began
    (:func:`sphereopt.theory.alignment`). Exact for SGD without momentum on scale-invariant weights;
    with momentum an average, for gradients that are noise. None on spheres of fixed radius, and
    where the calculator does not know the optimizer.

    References:
        Spherical Motion Dynamics: Learning Dynamics of Normalized Neural Network using SGD and
        Weight Decay, Wan et al., 2021 (growth by steps against weight decay).
    """
    laws = _laws(reading)
    if not reading.free or any(x is None or x.kappa is None for x in laws):
        return None
    known = [x for x in laws if x is not None and x.kappa is not None]
    kappa = _spread(reading, [x.kappa or 0.0 for x in known])
    alignment = _spread(reading, [x.K for x in known])
    gram = reading.travel.gram
    step = reading.lr * _divide(_root(gram.tangent_square()), _root(gram.ww))
    return torch.expm1(0.5 * torch.log1p(alignment * step**2 - kappa * (2 - kappa)))


def momentum_alignment(reading: Reading) -> Tensor:
    r"""Return the cosine :math:`\langle u,g\rangle/(|u||g|)` of direction and gradient (no unit).

    Expected: 1 without momentum; :math:`\sqrt{1-\mu^2}` for SGD whose gradients are noise. More:
    successive gradients agree; less: they undo each other (the learning rate may be too large).
    """
    gram, pull = reading.travel.gram, reading.pull
    return _divide(pull.ug, _root(gram.uu * pull.gg))


def K_measured(reading: Reading) -> Tensor | None:  # noqa: N802
    r"""Return the alignment of updates that would keep the norm where it is (no unit).

    .. math:: K = 2\kappa/\theta^2

    Expected: :func:`sphereopt.theory.alignment` of the optimizer at equilibrium, 19 for SGD with
    momentum 0.9; more while the norm is above its equilibrium, less while it is below. None without
    weight decay.

    References:
        Rotational Equilibrium: How Weight Decay Balances Learning Across Neural Networks, Kosson et
        al., 2024 (the balance of decay and updates).
    """
    laws = _laws(reading)
    kappas = [x.kappa if x is not None and x.angle is not None else None for x in laws]
    if not all(kappas):
        return None
    return _divide(2 * _spread(reading, [x or 0.0 for x in kappas]), angle(reading) ** 2)


def equilibrium_angle(reading: Reading) -> Tensor | None:
    r"""Return the angle at which the present lr and weight decay settle, in radians per step.

    Expected: the measured root mean square angle, once norms had time to settle. ``lr`` for moves
    in radians. None where nothing settles: no weight decay, or an optimizer that
    :func:`sphereopt.theory.equilibrium` does not know or whose angle needs more than is at hand
    (Adam with L2).
    """
    if _in_radians(reading):
        return reading.lr * torch.ones_like(reading.travel.norm)
    angles = [None if x is None else x.angle for x in _laws(reading)]
    return _spread(reading, [x for x in angles if x is not None]) if all(angles) else None


def equilibrium_norm(reading: Reading) -> Tensor | None:
    r"""Return the norm at which the present lr, weight decay and gradients settle, in their units.

    Expected: the measured norm, once it had time to settle. For SGD it follows the root of this
    batch's :func:`scaled_grad_norm`, so average it over steps. None as for
    :func:`equilibrium_angle`.
    """
    laws = [x for x in _laws(reading) if x is not None and x.norm is not None]
    if len(laws) < len(reading.names) or not laws:
        return None
    if laws[0].by_gradient:
        return _spread(reading, [x.norm or 0.0 for x in laws]) * scaled_grad_norm(reading).sqrt()
    roots = [(x.norm or 0.0) * dim**0.5 for x, dim in zip(laws, reading.dims, strict=True)]
    return _spread(reading, roots)


def _in_radians(reading: Reading) -> bool:
    return reading.group.get("move") in RADIANS


def _laws(reading: Reading) -> list[Law | None]:
    """Return what the calculator says of each parameter."""
    known = {
        shape: law(reading.optimizer, reading.group, shape, free=reading.free)
        for shape in set(reading.shapes)
    }
    return [known[shape] for shape in reading.shapes]


def _spread(reading: Reading, values: list[float]) -> Tensor:
    """Return one value per sphere from one per parameter."""
    like = reading.travel.norm
    if len(set(values)) == 1:
        return like.new_full(like.shape, values[0])
    pairs = zip(values, reading.counts, strict=True)
    return torch.cat([like.new_full((count,), value) for value, count in pairs])


PROBES: Mapping[str, Probe] = MappingProxyType(
    {
        "norm": norm,
        "angle": angle,
        "effective_lr": effective_lr,
        "relative_update": relative_update,
        "radial_share": radial_share,
        "grad_radial_share": grad_radial_share,
        "scaled_grad_norm": scaled_grad_norm,
        "growth": growth,
        "growth_law": growth_law,
        "momentum_alignment": momentum_alignment,
        "K_measured": K_measured,
        "equilibrium_norm": equilibrium_norm,
        "equilibrium_angle": equilibrium_angle,
    }
)

r"""Normalized weights: every output channel's weights lie on a sphere before they are used.

All of them are one formula, with two choices, for the weights :math:`v_i` of output channel i:

.. math:: w_i = g_i\,\frac{A v_i}{\|A v_i\|_p + \epsilon}

``A`` is the identity, or it subtracts the mean. The gain :math:`g_i` is

* trainable, one per channel: weight normalization, centred weight normalization, scaled weight
  standardization;
* trainable but bounded, :math:`G_0\,g_i/\|g\|_2`: channels compete for a norm the layer keeps;
* one fixed number :math:`\rho` for the layer: bounded weight normalization.

They are ordinary parametrizations (:mod:`torch.nn.utils.parametrize`): ``v`` and ``g`` are
parameters, ``module.weight`` is computed when it is read, and
``remove_parametrizations(module, "weight")`` leaves the weight as it is. ``find_spheres`` puts each
row of ``v`` on a sphere of its own, whatever follows the layer.
"""

from __future__ import annotations

import math
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ._rows import BoundedGains, FixedGain, NormalizedRows, TrainableGains, normalized_rows
from .rectifiers import RELU_GAIN

__all__ = [
    "bounded_weight_norm",
    "centered_weight_norm",
    "normalized_rows",
    "scaled_weight_standardization",
    "weight_norm",
]

M = TypeVar("M", bound=nn.Module)


def _weight_of(module: nn.Module, name: str, p: float, dim: int) -> Tensor:
    """Return the weight to normalize, or say why it can't be."""
    where = f"{name!r} of {type(module).__name__}"
    w = getattr(module, name, None)
    if not isinstance(w, Tensor):
        names = ", ".join(n for n, _ in module.named_parameters(recurse=False)) or "none"
        raise ValueError(f"{where} is not a parameter; its parameters are: {names}")
    if parametrize.is_parametrized(module, name):
        raise ValueError(
            f"{where} is parametrized already; take that off first with "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    if not w.is_floating_point() or w.dim() < 2 or not -w.dim() <= dim < w.dim():
        raise ValueError(
            f"{where} has shape {tuple(w.shape)} and {w.dtype}; channels along dim={dim} need a "
            "real floating-point weight of two dims or more"
        )
    if not p >= 1:
        raise ValueError(f"p={p} makes no norm; use 1, 2, math.inf or any number from 1 on")
    return w.detach()


def _register(module: M, name: str, rows: NormalizedRows) -> M:
    """Put a parametrization on a weight that has a direction in every channel."""
    w = getattr(module, name).detach()
    lengths = rows.lengths(w)
    zero = [] if w.is_meta else (lengths == 0).flatten().nonzero().flatten().tolist()
    if zero:
        raise ValueError(
            f"{name!r} of {type(module).__name__}, shape {tuple(w.shape)}, has no direction in "
            f"channels {zero[:8]} (all zeros or, centred, all equal): initialize it first"
        )
    parametrize.register_parametrization(module, name, rows)
    return module


def bounded_weight_norm(
    module: M,
    name: str = "weight",
    *,
    p: float = 2.0,
    gains: str = "fixed",
    rho: float | None = None,
    dim: int = 0,
    eps: float = 1e-12,
) -> M:
    r"""Bounded weight normalization: only directions are learned, the layer's norm is not.

    .. math:: w_i = \rho\,\frac{v_i}{\|v_i\|_p}\ (\texttt{fixed}),\qquad
              w_i = G_0\frac{g_i}{\|g\|_2}\,\frac{v_i}{\|v_i\|_p}\ (\texttt{bounded})

    Args:
        module: the layer; its weight becomes a parametrization, in place.
        name: of the weight.
        p: order of the norm: 1, 2, ``math.inf`` or any number from 1 on.
        gains: "fixed", one number for the layer that is not trained; or "bounded", one trainable
            number per channel, of which only the ratios count: the layer keeps its norm.
        rho: the fixed number, or the norm :math:`G_0` of all gains. ``None``: what the weight has
            now, so that the layer's Frobenius norm ("bounded": the weight itself) stays.
        dim: which dim counts output channels: 0, or 1 for transposed convolutions.
        eps: added to norms, against 0/0.

    Returns:
        nn.Module: the same module.

    Raises:
        ValueError: the weight is missing, has one dim, is parametrized already, or has a channel
            of zeros, which has no direction.

    Notes:
        With p=2 and ``rho=None`` the fixed number is :math:`\|V\|_F/\sqrt N` for N channels.
        Weight normalization leaves g free, so its norms still drift. The authors published three
        programs: trainable gains of bounded norm ("bounded"), a fixed number ("fixed"; they take
        the mean of the channels' norms where the paper has the root mean square, as here), and a
        fixed number with v put back on its sphere at every forward; the last is an optimizer on
        spheres, which is what :class:`sphereopt.SphereSGD` does without a parametrization.

    References:
        Norm matters: efficient and accurate normalization schemes in deep networks, Hoffer,
        Banner, Golan and Soudry, 2018.

    Example:
        >>> layer = bounded_weight_norm(nn.Linear(4, 3))
        >>> layer.weight.norm(dim=1).round(decimals=4).unique().numel()  # one norm for all rows
        1
        >>> parametrize.remove_parametrizations(layer, "weight")
        Linear(in_features=4, out_features=3, bias=True)
    """
    kinds = {"fixed": FixedGain, "bounded": BoundedGains}
    if gains not in kinds:
        raise ValueError(f"gains={gains!r} is not one of {', '.join(map(repr, kinds))}")
    if rho is not None and not rho > 0:
        raise ValueError(f"rho={rho} must be positive: it is the norm of the weights")
    w = _weight_of(module, name, p, dim)
    return _register(module, name, kinds[gains](p, dim, eps, w, rho))


def weight_norm(
    module: M,
    name: str = "weight",
    *,
    gain: float | None = 1.0,
    dim: int = 0,
    eps: float = 1e-5,
) -> M:
    r"""Weight normalization: a direction and a trainable gain for every channel.

    .. math:: w_i = g_i\,\frac{v_i}{\|v_i\|_2 + \epsilon}

    Args:
        module: the layer; its weight becomes a parametrization, in place.
        name: of the weight.
        gain: what every gain starts from; ``None``: what keeps the weight as it is.
        dim: which dim counts output channels: 0, or 1 for transposed convolutions.
        eps: added to norms.

    Returns:
        nn.Module: the same module.

    Raises:
        ValueError: as :func:`bounded_weight_norm`.

    Notes:
        This is the one of Beyond BatchNorm: gains start from 1, so the layer's function changes,
        and a :class:`ScaledReLU` follows it. ``torch.nn.utils.parametrizations.weight_norm`` has no
        eps and starts from the weight as it is, as ``gain=None`` here.

    References:
        Weight normalization, Salimans and Kingma, 2016, equation 2; Beyond BatchNorm: towards a
        unified understanding of normalization in deep learning, Lubana, Dick and Tanaka, 2021
        (authors' code).

    Example:
        >>> weight_norm(nn.Linear(4, 3)).weight.norm(dim=1)
        tensor([1.0000, 1.0000, 1.0000], grad_fn=<...>)
    """
    _weight_of(module, name, 2.0, dim)
    return _register(module, name, TrainableGains(2.0, False, dim, eps, 1.0, gain))


def centered_weight_norm(
    module: M,
    name: str = "weight",
    *,
    gain: float | None = None,
    dim: int = 0,
    eps: float = 1e-12,
) -> M:
    r"""Centred weight normalization: directions of zero mean, and a trainable gain per channel.

    .. math:: w_i = g_i\,\frac{A v_i}{\|A v_i\|_2},\qquad A = I - \tfrac1n e e^\top

    Args:
        module: the layer; its weight becomes a parametrization, in place.
        name: of the weight.
        gain: what every gain starts from; ``None``: the norm of the centred weights, so that the
            layer changes by their mean only.
        dim: which dim counts output channels: 0, or 1 for transposed convolutions.
        eps: added to norms, against 0/0.

    Returns:
        nn.Module: the same module.

    Raises:
        ValueError: as :func:`bounded_weight_norm`; also for a channel of equal weights.

    Notes:
        Neither the scale of :math:`v_i` nor a number added to all its entries changes anything: it
        lives on the sphere :math:`S^{n-2}` of zero-mean directions, like the output of a
        standardization (:func:`sphereopt.nn.standardize`).

    References:
        Centered weight normalization in accelerating training of deep neural networks, Huang, Liu,
        Liu, Lang and Tao, 2017; New interpretations of normalization methods in deep
        learning, Sun et al., 2020 (where it is one of the maps onto a sphere).

    Example:
        >>> w = centered_weight_norm(nn.Linear(4, 3), gain=2.0).weight.detach()
        >>> bool(w.mean(dim=1).abs().max() < 1e-6), w.norm(dim=1).round(decimals=4)
        (True, tensor([2., 2., 2.]))
    """
    _weight_of(module, name, 2.0, dim)
    return _register(module, name, TrainableGains(2.0, True, dim, eps, 1.0, gain))


def scaled_weight_standardization(
    module: M,
    name: str = "weight",
    *,
    gain: float | None = 1.0,
    dim: int = 0,
    eps: float = 1e-5,
) -> M:
    r"""Scaled weight standardization: centred directions, scaled for a ReLU network.

    .. math:: w_i = \sqrt{\tfrac{2\pi}{\pi-1}}\; g_i\,
              \frac{v_i - \mu_i}{(\sigma_i + \epsilon)\sqrt{n}}

    with mean and (biased) standard deviation over the n weights of channel i.

    Args:
        module: the layer; its weight becomes a parametrization, in place.
        name: of the weight.
        gain: what every gain starts from; ``None``: what keeps the weights up to their mean.
        dim: which dim counts output channels: 0, or 1 for transposed convolutions.
        eps: added to standard deviations.

    Returns:
        nn.Module: the same module.

    Raises:
        ValueError: as :func:`centered_weight_norm`.

    Notes:
        It is centred weight normalization times 1.7139, since :math:`\sigma_i\sqrt n` is the norm
        of the centred weights: the same gains with another constant and eps.

    References:
        Characterizing signal propagation to close the performance gap in unnormalized ResNets,
        Brock, De and Smith, 2021; Beyond BatchNorm, Lubana, Dick and
        Tanaka, 2021 (authors' code: eps beside the standard deviation, which is biased).

    Example:
        >>> layer = scaled_weight_standardization(nn.Conv2d(2, 3, 3))
        >>> layer.weight.detach().flatten(1).norm(dim=1).round(decimals=2)
        tensor([1.7100, 1.7100, 1.7100])
    """
    w = _weight_of(module, name, 2.0, dim)
    fan_in = w.numel() // w.shape[dim]
    rows = TrainableGains(2.0, True, dim, eps * math.sqrt(fan_in), RELU_GAIN, gain)
    return _register(module, name, rows)

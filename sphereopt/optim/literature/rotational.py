r"""RotationalAdamW, RotationalSGD and RotationalLion: the angles of weight decay, from step one.

Under weight decay, noise grows a scale-invariant block until growth and decay balance; from then on
it turns by an angle :math:`\eta_r` per step that lr and decay determine. These optimizers keep the
norm and turn by that angle at once:

.. math::
    u &\leftarrow P_w(u-\bar u), \qquad
    q \leftarrow \gamma q+(1-\gamma)|u|^2, \\
    w &\leftarrow R\,\frac{y}{|y|}, \qquad
    y = w-\eta_r R\,\frac{u}{\sqrt{q/(1-\gamma^t)}+\epsilon_r}

with u the update of the plain optimizer without its decay, :math:`\bar u` its mean over the sphere
(``zero_mean``) and R the norm at the first step.
"""

from __future__ import annotations

import math
from abc import ABC
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from sphereopt.optim._checks import parameter_name
from sphereopt.optim.literature._common import Group, LiteratureOptimizer, State
from sphereopt.optim.literature._views import (
    buffers,
    divide,
    dot,
    norm,
    numbers,
    off_spheres,
    on_spheres,
    rate,
    retract_,
    tick,
)

__all__ = ["RotationalAdamW", "RotationalLion", "RotationalSGD"]


class _Rotational(LiteratureOptimizer, ABC):
    keeps_norm: ClassVar[bool] = True

    @override
    def prepare(self, group: Group, index: int) -> None:
        if group["weight_decay"] == 0 and group["sphere_is_default"]:
            group["sphere"] = None
        elif group["weight_decay"] == 0 and group["sphere"] is not None:
            raise ValueError(
                f"weight_decay=0 turns {parameter_name(group, index, 0)!r} and the rest of its "
                "group by an angle of 0: give the decay of the optimizer that this one stands in "
                "for, or sphere=None"
            )
        if group["zero_mean"]:
            for p in group["params"]:
                _center_(p, self.sphere_of(p, group))


class RotationalAdamW(_Rotational):
    r"""AdamW that keeps norms and turns by AdamW's equilibrium angle.

    .. math:: u=\frac{\hat m}{\sqrt{\hat v}+\epsilon},\qquad
              \eta_r=\sqrt{2\,lr\,\lambda\,\frac{1-\beta_1}{1+\beta_1}}

    in the step that opens this module. Ordinary parameters are stepped as AdamW steps them.

    Args:
        params: Parameters, named parameters or groups; see :class:`LiteratureOptimizer`.
        lr: AdamW's learning rate.
        betas: Decay of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: AdamW's decay :math:`\lambda`. Spheres do not decay: it sets the angle. Where
            it is 0, parameters are ordinary, unless their group names a sphere.
        update_norm_decay_factor: Decay :math:`\gamma` of the mean square of updates; 0 makes every
            step the same angle.
        zero_mean: Take the mean out of the weights of every sphere, now, and out of updates.
        rotational_eps: Added to the root mean square of updates.
        sphere: Sphere of groups that name none; ``"tensor"`` is the authors'
            ``per_neuron=False``.
        maximize: Ascend.

    Raises:
        ValueError: If a value is out of range, a sphere does not fit, or a group that names one
            has a decay of 0.

    Notes:
        ``zero_mean=True``, the authors' default, **changes the weights when the optimizer is
        built** (their norms are kept): spheres of n random weights by about
        :math:`1/\sqrt{n}` of their norm. In the authors' code a sphere of one weight, or of equal
        weights, becomes NaN there; here it stays as it is. R is the norm at the first step; the
        authors' is that of the centered weights, which is another where weights are loaded
        later, and the first step then jumps to it. They decide by ``weight_decay`` alone what
        turns, and an assertion stops a rotational group without it. Blocks with vanishing
        gradients turn about as fast as others: the update is normalized.

    References:
        Rotational Equilibrium: How Weight Decay Balances Learning Across Neural Networks, Kosson,
        Messmer and Jaggi, 2024, algorithm 1; code: epfml/REQ, ``rotational_adamw.py``.

    Example:
        >>> layer = torch.nn.Linear(8, 2, bias=False)
        >>> optimizer = RotationalAdamW(layer.parameters(), lr=0.01, weight_decay=0.1)
        >>> before = layer.weight.detach().clone()
        >>> layer(torch.ones(1, 8)).sum().backward()
        >>> optimizer.step()
        >>> torch.allclose(layer.weight.norm(dim=1), before.norm(dim=1))
        True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        update_norm_decay_factor: float = 0.9,
        zero_mean: bool = True,
        rotational_eps: float = 1e-8,
        sphere: str | None = "row",
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "update_norm_decay_factor": update_norm_decay_factor,
            "zero_mean": zero_mean,
            "rotational_eps": rotational_eps,
            "sphere": sphere,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    @override
    def update(self, w: Tensor, g: Tensor, state: State, group: Group, sphere: str | None) -> None:
        lr, decay, (beta1, beta2) = rate(group), group["weight_decay"], group["betas"]
        t = tick(state)
        m, v = buffers(state, w, "exp_avg", "exp_avg_sq")
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        root = (v.sqrt() / math.sqrt(1 - beta2**t)).add_(group["eps"])
        u = m / root / (1 - beta1**t)
        for x, y in off_spheres(sphere, [w, u]):
            x.mul_(1 - lr * decay).sub_(lr * y)
        angle = (2 * lr * decay * (1 - beta1) / (1 + beta1)) ** 0.5
        _rotate_(w, u, angle, t, state, group, sphere)


class RotationalSGD(_Rotational):
    r"""SGD with momentum that keeps norms and turns by its equilibrium angle.

    .. math:: m\leftarrow\mu m+g,\qquad u=m\;\text{ or }\;g+\mu m\text{ (Nesterov)},\qquad
              \eta_r=\sqrt{\frac{2\,lr\,\lambda}{1+\mu}}

    in the step that opens this module. Ordinary parameters are stepped as ``torch.optim.SGD``
    steps them.

    Args:
        params: Parameters, named parameters or groups; see :class:`LiteratureOptimizer`.
        lr: SGD's learning rate.
        momentum: Momentum factor :math:`\mu`.
        weight_decay: SGD's L2 coefficient :math:`\lambda`. Spheres do not decay: it sets the
            angle. Where it is 0, parameters are ordinary, unless their group names a sphere.
        nesterov: Use Nesterov momentum.
        update_norm_decay_factor: As in :class:`RotationalAdamW`.
        zero_mean: As in :class:`RotationalAdamW`; it **changes the weights** here and now.
        rotational_eps: As in :class:`RotationalAdamW`.
        sphere: Sphere of groups that name none.
        maximize: Ascend.

    Raises:
        ValueError: As in :class:`RotationalAdamW`.

    Notes:
        See :class:`RotationalAdamW`. The angle is heavy ball's, also with Nesterov momentum, for
        which SGD itself turns 16 % faster at momentum 0.9.

    References:
        Rotational Equilibrium: How Weight Decay Balances Learning Across Neural Networks, Kosson,
        Messmer and Jaggi, 2024, algorithm 1; code: epfml/REQ, ``rotational_sgd.py``.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([[1.0, 0.0]]))
        >>> optimizer = RotationalSGD([w], lr=0.5, weight_decay=0.01, zero_mean=False)
        >>> w.grad = torch.tensor([[0.0, 1e-3]])
        >>> optimizer.step()
        >>> torch.atan2(w.data[0, 1], w.data[0, 0])  # atan(0.1): a tenth, whatever the gradient
        tensor(-0.0997)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0.0,
        *,
        weight_decay: float,
        nesterov: bool = False,
        update_norm_decay_factor: float = 0.9,
        zero_mean: bool = True,
        rotational_eps: float = 1e-8,
        sphere: str | None = "row",
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "update_norm_decay_factor": update_norm_decay_factor,
            "zero_mean": zero_mean,
            "rotational_eps": rotational_eps,
            "sphere": sphere,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    @override
    def update(self, w: Tensor, g: Tensor, state: State, group: Group, sphere: str | None) -> None:
        lr, momentum, decay = rate(group), group["momentum"], group["weight_decay"]
        t = tick(state)
        (m,) = buffers(state, w, "momentum_buffer")
        g = g.clone()
        for x, h in off_spheres(sphere, [w, g]):
            h.add_(x, alpha=decay)  # L2, which spheres do without
        m.mul_(momentum).add_(g)
        u = g + momentum * m if group["nesterov"] else m
        for x, y in off_spheres(sphere, [w, u]):
            x.sub_(lr * y)
        angle = (2 * lr * decay / (1 + momentum)) ** 0.5
        _rotate_(w, u, angle, t, state, group, sphere)


class RotationalLion(_Rotational):
    r"""Lion that keeps norms and turns by its equilibrium angle.

    .. math::
        u &= \operatorname{sign}(\beta_1 m+(1-\beta_1)g),\qquad
        m \leftarrow \beta_2 m+(1-\beta_2)g \\
        \eta_r &= \sqrt{\pi\,lr\,\lambda\,S},\qquad
        S=(1-\beta_1)^2+\beta_1^2\frac{1-\beta_2}{1+\beta_2}

    in the step that opens this module. Ordinary parameters are stepped as Lion steps them.

    Args:
        params: Parameters, named parameters or groups; see :class:`LiteratureOptimizer`.
        lr: Lion's learning rate.
        betas: Weight of the buffer in the sign, and its decay.
        weight_decay: Lion's decay :math:`\lambda`. Spheres do not decay: it sets the angle. Where
            it is 0, parameters are ordinary, unless their group names a sphere.
        update_norm_decay_factor: As in :class:`RotationalAdamW`.
        zero_mean: As in :class:`RotationalAdamW`; it **changes the weights** here and now.
        rotational_eps: As in :class:`RotationalAdamW`.
        sphere: Sphere of groups that name none.
        maximize: Ascend.

    Raises:
        ValueError: As in :class:`RotationalAdamW`.

    Notes:
        See :class:`RotationalAdamW`. The authors' default for the decay is 0, with which nothing
        turns; here it has to be given.

    References:
        Rotational Equilibrium: How Weight Decay Balances Learning Across Neural Networks, Kosson,
        Messmer and Jaggi, 2024, algorithm 1; code: epfml/REQ, ``rotational_lion.py``.
        Symbolic Discovery of Optimization Algorithms, Chen et al., 2023.

    Example:
        >>> w = torch.nn.Parameter(torch.randn(4, 8))
        >>> RotationalLion([w], weight_decay=1.0).param_groups[0]["sphere"]
        'row'
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        *,
        weight_decay: float,
        update_norm_decay_factor: float = 0.9,
        zero_mean: bool = True,
        rotational_eps: float = 1e-8,
        sphere: str | None = "row",
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "update_norm_decay_factor": update_norm_decay_factor,
            "zero_mean": zero_mean,
            "rotational_eps": rotational_eps,
            "sphere": sphere,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    @override
    def update(self, w: Tensor, g: Tensor, state: State, group: Group, sphere: str | None) -> None:
        lr, decay, (beta1, beta2) = rate(group), group["weight_decay"], group["betas"]
        t = tick(state)
        (m,) = buffers(state, w, "exp_avg")
        u = (beta1 * m + (1 - beta1) * g).sign_()
        m.mul_(beta2).add_(g, alpha=1 - beta2)
        for x, y in off_spheres(sphere, [w, u]):
            x.mul_(1 - lr * decay).sub_(lr * y)
        variance = (1 - beta1) ** 2 + beta1**2 * (1 - beta2) / (1 + beta2)
        angle = (math.pi * lr * decay * variance) ** 0.5
        _rotate_(w, u, angle, t, state, group, sphere)


def _rotate_(
    w: Tensor,
    u: Tensor,
    angle: float | Tensor,
    t: float,
    state: State,
    group: Group,
    sphere: str | None,
) -> None:
    """Turn spheres by an angle, on average over steps, against the update u."""
    if sphere is None:
        return
    decay = group["update_norm_decay_factor"]
    squares = numbers(state, w, sphere, "update_norm_sq")
    for x, y, r, q in on_spheres(sphere, [w, u], [state["radius"], squares]):
        if group["zero_mean"]:
            y = y - _mean(y)
        y = y - x * divide(dot(x, y), r.square())
        q.mul_(decay).add_((1 - decay) * dot(y, y))
        size = (q / (1 - decay**t)).sqrt() + group["rotational_eps"]
        retract_(x, divide(angle * r * y, size), r)


def _mean(x: Tensor) -> Tensor:
    return x.mean(dim=tuple(range(1, x.ndim)), keepdim=True)


@torch.no_grad()
def _center_(p: Tensor, sphere: str | None) -> None:
    """Take the mean out of every sphere and restore the norms."""
    if sphere is None or p.numel() == 0:
        return
    w = p.detach().to(torch.promote_types(p.dtype, torch.float32))
    for (x,) in on_spheres(sphere, [w]):
        centered = x - _mean(x)
        # Equal weights less their mean are rounding: without direction, they stay.
        size = norm(centered)
        kept = size > 16 * torch.finfo(w.dtype).eps * norm(x)
        x.copy_(torch.where(kept, centered * divide(norm(x), size), x))
    p.copy_(w)

r"""SGDG and AdamG: geodesic steps on unit spheres, with momentum in parallel transport.

With y the weights, normalized, and h the tangent part of the gradient, clipped, both move along the
geodesic with a tangent vector d, and carry their momentum along it:

.. math:: w \leftarrow y\cos|d|+\hat d\sin|d|
"""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

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
    tangent,
    tick,
)

__all__ = ["SGDG", "AdamG"]


class SGDG(LiteratureOptimizer):
    r"""SGD with momentum on unit spheres, along geodesics.

    .. math::
        h &= \operatorname{clip}_\nu P_y\big(g+2\omega(YY^TY-Y)\big),\qquad
        d \leftarrow \mu d-lr\,h \\
        w &\leftarrow y\cos|d|+\hat d\sin|d|,\qquad
        d \leftarrow |d|(\hat d\cos|d|-y\sin|d|)

    where Y holds the spheres of a parameter as rows. Ordinary parameters are stepped as
    ``torch.optim.SGD`` steps them.

    Args:
        params: Parameters, named parameters or groups; see :class:`LiteratureOptimizer`.
        lr: Step per gradient at norm 1: a step turns a sphere by lr \|h\| radians. The authors use
            0.2 on spheres, and 0.01 in ordinary groups.
        momentum: Momentum factor :math:`\mu`.
        dampening: SGD's, for ordinary parameters.
        weight_decay: SGD's L2 coefficient, for ordinary parameters; spheres have none.
        nesterov: Nesterov momentum, for ordinary parameters.
        omega: Weight :math:`\omega` of :math:`\frac12|YY^T-I|^2`, that rows be orthogonal; the
            authors use 0.1.
        grad_clip: Largest norm :math:`\nu` of h per sphere, or None; the authors use 0.1.
        sphere: Sphere of groups that name none: filters.
        maximize: Ascend.

    Raises:
        ValueError: If a value is out of range, a sphere does not fit a parameter's shape, or a
            group on spheres asks for weight decay.

    Notes:
        **Norms become 1 at the first step**, as in the authors' code; for scale-invariant weights
        that changes nothing else. The buffer holds steps, not gradients: lr is in it. The authors'
        constructor overwrites ``omega`` by 0, so that only groups can set it, and adds 1e-8 to
        norms when it divides by them, which halves a step of 1e-8 radians; here it counts, and
        nothing is added.

    References:
        Riemannian approach to batch normalization, Cho and Lee, 2017 (SGD-G); code:
        MinhyungCho/riemannian-batch-normalization-pytorch.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([[2.0, 0.0]]))
        >>> w.grad = torch.tensor([[0.0, -torch.pi / 3]])
        >>> SGDG([w], lr=1.0).step()
        >>> w.data
        tensor([[0.5000, 0.8660]])
    """

    decays_spheres: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        omega: float = 0.0,
        grad_clip: float | None = None,
        sphere: str | None = "row",
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "omega": omega,
            "grad_clip": grad_clip,
            "sphere": sphere,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    @override
    def update(self, w: Tensor, g: Tensor, state: State, group: Group, sphere: str | None) -> None:
        lr, t = rate(group), tick(state)
        (m,) = buffers(state, w, "momentum_buffer")
        for x, h, d in off_spheres(sphere, [w, g, m]):
            _sgd_(x, h, d, t, group)
        for x, h, d in on_spheres(sphere, [w, g, m]):
            y = divide(x, norm(x))
            d.mul_(group["momentum"]).sub_(lr * _gradient(y, h, group))
            angle = norm(d)
            along = divide(d, angle)
            x.copy_(y * angle.cos() + along * angle.sin())
            d.copy_(angle * (along * angle.cos() - y * angle.sin()))


class AdamG(LiteratureOptimizer):
    r"""Adam on unit spheres, along geodesics, with one second moment per sphere.

    .. math::
        m &\leftarrow \beta_1 m+(1-\beta_1)h,\qquad v \leftarrow \beta_2 v+(1-\beta_2)|h|^2,\qquad
        d = -lr\,\frac{\sqrt{1-\beta_2^t}}{1-\beta_1^t}\,\frac{m}{\sqrt{v+\epsilon}} \\
        w &\leftarrow y\cos|d|+\hat d\sin|d|,\qquad
        m \leftarrow m-\langle\hat d,m\rangle\big(y\sin|d|+\hat d(1-\cos|d|)\big)

    with h as in :class:`SGDG` and :math:`\beta_1` the ``momentum``. Ordinary parameters are stepped
    as ``torch.optim.SGD`` steps them.

    Args:
        params: Parameters, named parameters or groups; see :class:`LiteratureOptimizer`.
        lr: Radians per step, about: what a sphere turns under a steady gradient. The authors use
            0.05 on spheres, and 0.01 in ordinary groups.
        momentum: :math:`\beta_1` of spheres, and SGD's momentum of ordinary parameters.
        dampening: SGD's, for ordinary parameters.
        weight_decay: SGD's L2 coefficient, for ordinary parameters; spheres have none.
        nesterov: Nesterov momentum, for ordinary parameters.
        beta2: Decay :math:`\beta_2` of the second moment.
        eps: Added to the second moment, under the root.
        omega: As in :class:`SGDG`.
        grad_clip: As in :class:`SGDG`.
        sphere: Sphere of groups that name none: filters.
        maximize: Ascend.

    Raises:
        ValueError: As in :class:`SGDG`.

    Notes:
        As in :class:`SGDG`, norms become 1 at the first step, and two slips of the authors' code
        are not repeated. Another ``AdamG``, a baseline in the code of AdamSRT (ymontmarin/adamsrt),
        is this one with normalization in place of the geodesic and without projecting gradients;
        its flag is inverted: ``channel_wise=True`` runs Adam entry by entry.

    References:
        Riemannian approach to batch normalization, Cho and Lee, 2017 (Adam-G); code:
        MinhyungCho/riemannian-batch-normalization-pytorch.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([[2.0, 0.0]]))
        >>> w.grad = torch.tensor([[0.0, -9.0]])
        >>> AdamG([w], lr=0.1, momentum=0.9).step()
        >>> torch.atan2(w.data[0, 1], w.data[0, 0])
        tensor(0.1000)
    """

    decays_spheres: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        beta2: float = 0.99,
        eps: float = 1e-8,
        omega: float = 0.0,
        grad_clip: float | None = None,
        sphere: str | None = "row",
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "beta2": beta2,
            "eps": eps,
            "omega": omega,
            "grad_clip": grad_clip,
            "sphere": sphere,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    @override
    def prepare(self, group: Group, index: int) -> None:
        if group["momentum"] >= 1:
            raise ValueError(f"momentum={group['momentum']!r} is out of range; it must be below 1")

    @override
    def update(self, w: Tensor, g: Tensor, state: State, group: Group, sphere: str | None) -> None:
        lr, beta1, beta2, t = rate(group), group["momentum"], group["beta2"], tick(state)
        (m,) = buffers(state, w, "momentum_buffer")
        for x, h, n in off_spheres(sphere, [w, g, m]):
            _sgd_(x, h, n, t, group)
        squares = numbers(state, w, sphere, "exp_avg_sq")
        for x, h, n, v in on_spheres(sphere, [w, g, m], [squares]):
            y = divide(x, norm(x))
            h = _gradient(y, h, group)
            n.mul_(beta1).add_(h, alpha=1 - beta1)
            v.mul_(beta2).add_((1 - beta2) * dot(h, h))
            d = -lr * math.sqrt(1 - beta2**t) / (1 - beta1**t) * n / (v + group["eps"]).sqrt()
            angle = norm(d)
            along = divide(d, angle)
            x.copy_(y * angle.cos() + along * angle.sin())
            n.sub_(dot(along, n) * (y * angle.sin() + along * (1 - angle.cos())))


def _gradient(y: Tensor, g: Tensor, group: Group) -> Tensor:
    """Return the gradient with the pull towards orthogonal rows: tangent, and clipped."""
    if group["omega"] != 0:
        rows = y.flatten(1)
        g = g + 2 * group["omega"] * (rows @ rows.mT @ rows - rows).view(y.shape)
    h = tangent(y, g)
    if group["grad_clip"] is None:
        return h
    return h * divide(norm(h).clamp_max(group["grad_clip"]), norm(h))


def _sgd_(w: Tensor, g: Tensor, m: Tensor, t: float, group: Group) -> None:
    momentum = group["momentum"]
    g = g.add(w, alpha=group["weight_decay"])
    if momentum != 0:
        m.mul_(momentum).add_(g, alpha=1.0 if t == 1 else 1 - group["dampening"])
        g = g + momentum * m if group["nesterov"] else m
    w.sub_(rate(group) * g)

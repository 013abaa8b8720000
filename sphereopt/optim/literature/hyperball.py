r"""AdamH and MuonH: steps of a given length relative to the weights, whose norms are kept.

.. math:: w \leftarrow R\,\frac{y}{|y|},\qquad y = w - lr\,R\,\frac{u}{|u|}

with u the update of Adam or Muon and R the norm at the first step: *Hyperball*.
"""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from sphereopt.optim._checks import parameter_name
from sphereopt.optim.literature._common import Group, LiteratureOptimizer, State
from sphereopt.optim.literature._views import (
    buffers,
    divide,
    norm,
    off_spheres,
    on_spheres,
    rate,
    retract_,
    tick,
)

__all__ = ["AdamH", "MuonH"]


class AdamH(LiteratureOptimizer):
    r"""Adam whose step has length lr relative to the weights, then brought back to their norm.

    .. math::
        m &\leftarrow \beta_1 m+(1-\beta_1)g, \qquad v \leftarrow \beta_2 v+(1-\beta_2)g^2 \\
        u &= \hat m/(\sqrt{\hat v}+\epsilon), \qquad
        w \leftarrow R\,\frac{y}{|y|},\quad y = w - lr\,R\,u/|u|

    Ordinary parameters take Adam's step, :math:`w \leftarrow (1-lr\,\lambda)w-lr\,u`.

    Args:
        params: Parameters, named parameters or groups; see :class:`LiteratureOptimizer`.
        lr: Radians per step, nearly: the angle is lr to second order where u is tangent. In
            ordinary groups Adam's unit, so give those their own lr.
        betas: Decay of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay of ordinary parameters; spheres have none.
        sphere: Sphere of groups that name none.
        maximize: Ascend.

    Raises:
        ValueError: If a value is out of range, a sphere does not fit a parameter's shape, or a
            group on spheres asks for weight decay.

    Notes:
        The update is not projected and the moments are not transported. R is the norm at the first
        step, kept in state, as in the paper; the authors' code reads it from the weights at every
        step, and drifts where those are rounded to bfloat16. Both divide by
        :math:`\max(|u|, 10^{-10})`; a matrix of zeros is NaN there and stays zero here.

        The authors' code takes a tensor of three or more dimensions for a stack of matrices, one
        norm per index of dim 0 (``sphere="row"`` here). It clips the global norm of gradients to 1
        first, which is left to ``torch.nn.utils.clip_grad_norm_``. Its rule of thumb for lr, the
        root of Adam's lr times decay, turns 3.1 times as fast as AdamW does with
        ``betas=(0.9, ...)``; ``sphereopt.theory.equilibrium`` gives AdamW's angle.

    References:
        Fantastic Pretraining Optimizers and Where to Find Them II: Hyperball Optimization, Wen,
        Dang, Lyu, Ma and Liang, 2026; code: marin-community/marin, levanter's ``adamh``.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> w.grad = torch.tensor([[1.0, 0.0]])
        >>> AdamH([w], lr=0.1).step()
        >>> w.data, w.data.norm()
        (tensor([[2.6500, 4.2400]]), tensor(5.))
    """

    keeps_norm: ClassVar[bool] = True
    decays_spheres: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        sphere: str | None = "tensor",
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "sphere": sphere,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    @override
    def update(self, w: Tensor, g: Tensor, state: State, group: Group, sphere: str | None) -> None:
        lr, u = rate(group), _adam_direction(w, g, state, group)
        for x, y in off_spheres(sphere, [w, u]):
            x.mul_(1 - lr * group["weight_decay"]).sub_(lr * y)
        _hyperball_(w, u, lr, state, sphere)


class MuonH(LiteratureOptimizer):
    r"""Muon whose step has length lr relative to the weights, then brought back to their norm.

    .. math::
        m &\leftarrow \mu m+g, \qquad h=g+\mu m\text{ (Nesterov) or }m,\qquad u=NS_k(h) \\
        w &\leftarrow R\,\frac{y}{|y|},\qquad y = w - lr\,R\,u/|u|

    where :math:`NS_k` makes the singular values of a matrix about equal, by k steps of
    :math:`X\leftarrow aX+(bA+cA^2)X,\ A=XX^T`, from :math:`X=h/(|h|+\epsilon)`. Tensors of three or
    more dimensions are matrices of their rows (conv filters). Ordinary parameters take Adam's
    step, as in :class:`AdamH`.

    Args:
        params: Parameters, named parameters or groups; see :class:`LiteratureOptimizer`.
        lr: Radians per step, nearly. In ordinary groups Adam's unit: give those their own lr.
        momentum: Momentum factor :math:`\mu`.
        nesterov: Use Nesterov momentum.
        ns_coefficients: a, b, c of the iteration.
        ns_steps: Number k of its steps.
        ns_eps: Added to the norm that it starts with.
        betas: Adam's, for ordinary parameters.
        eps: Adam's, for ordinary parameters.
        weight_decay: Decoupled decay of ordinary parameters; spheres have none.
        sphere: Sphere of groups that name none. It says which norms are kept; the whole matrix is
            orthogonalized in any case.
        maximize: Ascend.

    Raises:
        ValueError: If a value is out of range, a sphere does not fit a parameter's shape or
            covers a part of it only, a group on spheres has vectors or asks for weight decay.

    Notes:
        R is kept in state, see :class:`AdamH`. Emerging-Optimizers' ``MuonHyperball`` takes one R
        for all matrices and demands that they have it. No factor for the shape of a matrix
        matters, since u is normalized, nor does ``torch.optim.Muon``'s (1-momentum) in front of the
        gradient. The iteration runs in float32, or float64 for float64 weights; torch's runs in
        bfloat16. The authors' code steps the output layer with AdamH: give it to one.

    References:
        Fantastic Pretraining Optimizers and Where to Find Them II: Hyperball Optimization, Wen,
        Dang, Lyu, Ma and Liang, 2026; code: marin-community/marin, levanter's ``muonh``.
        Muon: An optimizer for hidden layers in neural networks, Jordan et al., 2024.

    Example:
        >>> w = torch.nn.Parameter(torch.eye(2))
        >>> w.grad = torch.tensor([[0.0, 1.0], [-9.0, 0.0]])
        >>> MuonH([w], lr=0.1).step()
        >>> w.data.norm()
        tensor(1.4142)
    """

    keeps_norm: ClassVar[bool] = True
    decays_spheres: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        *,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        ns_steps: int = 5,
        ns_eps: float = 1e-8,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        sphere: str | None = "tensor",
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "ns_steps": ns_steps,
            "ns_eps": ns_eps,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "sphere": sphere,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    @override
    def prepare(self, group: Group, index: int) -> None:
        for i, p in enumerate(group["params"]):
            sphere = self.sphere_of(p, group)
            if sphere is not None and (p.ndim < 2 or list(off_spheres(sphere, [p]))):
                raise ValueError(
                    f"parameter {parameter_name(group, index, i)!r} has shape {tuple(p.shape)} and "
                    f"sphere={sphere!r}, but MuonH orthogonalizes whole matrices; use AdamH, or "
                    "sphere=None for it"
                )

    @override
    def update(self, w: Tensor, g: Tensor, state: State, group: Group, sphere: str | None) -> None:
        lr, momentum = rate(group), group["momentum"]
        if sphere is None:
            w.mul_(1 - lr * group["weight_decay"]).sub_(lr * _adam_direction(w, g, state, group))
            return
        (m,) = buffers(state, w, "momentum_buffer")
        m.mul_(momentum).add_(g)
        h = g + momentum * m if group["nesterov"] else m
        u = _newton_schulz(h.flatten(1), group).view(w.shape)
        _hyperball_(w, u, lr, state, sphere)


def _adam_direction(w: Tensor, g: Tensor, state: State, group: Group) -> Tensor:
    (beta1, beta2), t = group["betas"], tick(state)
    m, v = buffers(state, w, "exp_avg", "exp_avg_sq")
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    root = (v.sqrt() / math.sqrt(1 - beta2**t)).add_(group["eps"])
    direction: Tensor = m / (1 - beta1**t) / root
    return direction


def _hyperball_(w: Tensor, u: Tensor, lr: float | Tensor, state: State, sphere: str | None) -> None:
    if sphere is None:
        return
    for x, y, r in on_spheres(sphere, [w, u], [state["radius"]]):
        retract_(x, lr * r * y / norm(y).clamp_min(1e-10), r)


def _newton_schulz(h: Tensor, group: Group) -> Tensor:
    a, b, c = group["ns_coefficients"]
    tall = h.shape[0] > h.shape[1]
    x = divide(h.mT if tall else h, h.norm() + group["ns_eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT.contiguous() if tall else x

"""AdamP and SGDP: steps without the part along weights that look scale-invariant."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from sphereopt.optim.literature._common import Group, LiteratureOptimizer, State
from sphereopt.optim.literature._views import buffers, rate, tick

__all__ = ["SGDP", "AdamP"]


class AdamP(LiteratureOptimizer):
    r"""Adam with decoupled decay, whose steps lose their radial part where it has no function.

    .. math::
        u &= \hat m/(\sqrt{\hat v}+\epsilon) \\
        u &\leftarrow u-\langle\hat w,u\rangle\hat w,\quad \lambda\leftarrow\rho\,\lambda
            \qquad\text{where } \max_i|\cos(w_i,g_i)| < \delta/\sqrt{n} \\
        w &\leftarrow (1-lr\,\lambda)\,w-lr\,u

    The condition is asked of rows :math:`w_i` of n entries first, then of the whole tensor; if
    neither holds, the step is Adam's.

    Args:
        params: Parameters, named parameters or groups. ``sphere`` of a group does not matter: the
            condition is tested at every step, on parameters of two or more dimensions.
        lr: Learning rate, in Adam's unit.
        betas: Decay of the first and second moment.
        eps: Added to the root of the second moment, and to norms.
        weight_decay: Decoupled decay.
        delta: Threshold :math:`\delta` of the condition.
        wd_ratio: Factor :math:`\rho` on the decay of weights that meet it.
        nesterov: Use :math:`\beta_1 m+(1-\beta_1)g` instead of m.
        maximize: Ascend.

    Raises:
        ValueError: If a value is out of range.

    Notes:
        There is no retraction: norms still grow, by the length of the step squared. The condition
        also holds by chance, on some 8 % of the steps of a tensor that is not scale-invariant, and
        always for a gradient of zero.

        The authors' code decides by a Python ``if``, which waits for the device once or twice per
        tensor, and its ``.view`` raises on channels_last weights. Here the decision stays on the
        device and any layout will do; the numbers are the same. The paper prints the condition
        without the absolute value that the code takes.

    References:
        AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights, Heo et
        al., 2021, algorithm 2; code: clovaai/AdamP 0.3.0.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> w.grad = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> AdamP([w], lr=0.1).step()
        >>> w.data
        tensor([[ 1.0000, -0.1000], [-0.1000,  1.0000]])
    """

    reads_spheres: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    @override
    def update(self, w: Tensor, g: Tensor, state: State, group: Group, sphere: str | None) -> None:
        lr, (beta1, beta2), t = rate(group), group["betas"], tick(state)
        m, v = buffers(state, w, "exp_avg", "exp_avg_sq")
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        root = (v.sqrt() / math.sqrt(1 - beta2**t)).add_(group["eps"])
        u = (beta1 * m + (1 - beta1) * g if group["nesterov"] else m) / root
        radial, ratio = _radial_part(w, g, u, group)
        w.mul_(1 - lr * group["weight_decay"] * ratio)
        w.sub_(lr / (1 - beta1**t) * (u - radial))


class SGDP(LiteratureOptimizer):
    r"""SGD with momentum, whose steps lose their radial part where it has no function.

    .. math::
        m &\leftarrow \mu m+(1-\tau)g,\qquad u=m\;\text{ or }\;g+\mu m\text{ (Nesterov)} \\
        u &\leftarrow u-\langle\hat w,u\rangle\hat w,\quad \lambda\leftarrow\rho\,\lambda
            \qquad\text{where } \max_i|\cos(w_i,g_i)| < \delta/\sqrt{n} \\
        w &\leftarrow (1-lr\,\lambda/(1-\mu))\,w-lr\,u

    Args:
        params: Parameters, named parameters or groups; ``sphere`` does not matter, as in
            :class:`AdamP`.
        lr: Learning rate, in SGD's unit.
        momentum: Momentum factor :math:`\mu`, below 1.
        dampening: Dampening :math:`\tau`, at every step (in torch not at the first).
        weight_decay: Decoupled decay; in this unit L2 of ``torch.optim.SGD`` is the same number.
        nesterov: Use Nesterov momentum.
        eps: Added to norms.
        delta: Threshold :math:`\delta` of the condition.
        wd_ratio: Factor :math:`\rho` on the decay of weights that meet it.
        project_buffer: Without Nesterov, take the radial part out of the momentum buffer too, as
            the authors' code does; False keeps the buffer as it is, as the paper has it.
        maximize: Ascend.

    Raises:
        ValueError: If a value is out of range, or momentum is 1.

    Notes:
        Without Nesterov, the authors' u *is* the buffer, so that their in-place projection also
        changes what later steps start from; with Nesterov it is not. Copies of it in other
        packages clone first, which is ``project_buffer=False``. As for :class:`AdamP`, the
        decision stays on the device and any memory layout will do.

    References:
        AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights, Heo et
        al., 2021, algorithm 1; code: clovaai/AdamP 0.3.0.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([[1.0, 0.0]]))
        >>> optimizer = SGDP([w], lr=0.1, momentum=0.9)
        >>> for _ in range(2):  # a gradient that is tangent where it is taken
        ...     w.grad = torch.stack([w.data[:, 1], -w.data[:, 0]], 1)
        ...     optimizer.step()
        >>> w.data
        tensor([[0.9811, 0.2891]])
    """

    reads_spheres: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        *,
        project_buffer: bool = True,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "eps": eps,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "project_buffer": project_buffer,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    @override
    def prepare(self, group: Group, index: int) -> None:
        if group["momentum"] >= 1:
            raise ValueError(f"momentum={group['momentum']!r} is out of range; it must be below 1")

    @override
    def update(self, w: Tensor, g: Tensor, state: State, group: Group, sphere: str | None) -> None:
        lr, momentum, nesterov = rate(group), group["momentum"], group["nesterov"]
        (m,) = buffers(state, w, "momentum_buffer")
        m.mul_(momentum).add_(g, alpha=1 - group["dampening"])
        u = g + momentum * m if nesterov else m
        radial, ratio = _radial_part(w, g, u, group)
        u = m.sub_(radial) if group["project_buffer"] and not nesterov else u - radial
        w.mul_(1 - lr * group["weight_decay"] * ratio / (1 - momentum))
        w.sub_(lr * u)


def _radial_part(
    w: Tensor, g: Tensor, u: Tensor, group: Group
) -> tuple[Tensor | float, Tensor | float]:
    """Return what to take out of u, and the factor on the decay; nothing and 1 for vectors."""
    if w.ndim < 2:
        return 0.0, 1.0
    radial, found = torch.zeros_like(u), torch.zeros((), dtype=torch.bool, device=w.device)
    for shape in ((len(w), -1), (1, -1)):  # rows, then the whole tensor
        x, h, y = (z.reshape(shape) for z in (w, g, u))
        cosine = cosine_similarity(h, x, dim=1, eps=group["eps"]).abs().max()
        here = (cosine < group["delta"] / math.sqrt(x.shape[1])) & ~found
        unit = x / x.norm(dim=1, keepdim=True).add_(group["eps"])
        along = (unit * (unit * y).sum(dim=1, keepdim=True)).reshape(w.shape)
        radial, found = torch.where(here, along, radial), found | here
    return radial, w.new_ones(()).masked_fill(found, group["wd_ratio"])

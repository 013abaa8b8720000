"""AdamS and AdamSRT: Adam with one second moment per sphere, and moments that follow the norm."""

from __future__ import annotations

import math
from abc import ABC
from typing import ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from sphereopt.optim.literature._common import Group, LiteratureOptimizer, State
from sphereopt.optim.literature._views import buffers, dot, off_spheres, on_spheres, rate, tick

__all__ = ["AdamS", "AdamSRT"]


class _SphericalAdam(LiteratureOptimizer, ABC):
    #: Whether moments are carried to the new point and rescaled with the norm.
    carries: ClassVar[bool]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        sphere: str | None = "row",
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
        lr, eps, (beta1, beta2), t = rate(group), group["eps"], group["betas"], tick(state)
        m, v = buffers(state, w, "exp_avg", "exp_avg_sq")
        g = g.add(w, alpha=group["weight_decay"])
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        for h, q in off_spheres(sphere, [g, v]):
            q.mul_(beta2).addcmul_(h, h, value=1 - beta2)
        for h, q in on_spheres(sphere, [g, v]):
            q.mul_(beta2).add_((1 - beta2) * dot(h, h))
        u = m / (1 - beta1**t) / (v.sqrt() / math.sqrt(1 - beta2**t)).add_(eps)
        for x, y in off_spheres(sphere, [w, u]):
            x.sub_(lr * y)
        for x, y, n, q in on_spheres(sphere, [w, u, m, v]):
            old, entries = x.clone(), x[0].numel()
            x.sub_(lr * math.sqrt(entries) * y)
            if self.carries and entries > 1:
                square = dot(x, x) + eps
                q.mul_(dot(old, old) / square)
                n.copy_((dot(old, x) * n - dot(n, x) * old) / square)


class AdamS(_SphericalAdam):
    r"""Adam with one second moment per sphere, that of its norm.

    .. math::
        m &\leftarrow \beta_1 m+(1-\beta_1)g, \qquad
        v \leftarrow \beta_2 v+(1-\beta_2)|g|^2 \\
        w &\leftarrow w - lr\,\sqrt{n}\,\frac{\hat m}{\sqrt{\hat v}+\epsilon}

    for spheres of n entries; g includes L2. Ordinary parameters are stepped as Adam steps them.

    Args:
        params: Parameters, named parameters or groups; see :class:`LiteratureOptimizer`.
        lr: Adam's learning rate: where all entries of a gradient are of one size, the steps are
            Adam's.
        betas: Decay of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: L2 coefficient, for spheres too.
        sphere: Sphere of groups that name none: filters. The authors' ``channel_dims=[0]`` is
            ``"row"``, ``[1]`` is ``"col"``, ``[]`` is ``"tensor"``.
        maximize: Ascend.

    Raises:
        ValueError: If a value is out of range, or a sphere does not fit a parameter's shape.

    Notes:
        Norms are not kept. As in the authors' code, v has the size of the weights, though all its
        entries in a sphere are equal; that code adds L2 to ``p.grad`` itself, and keeps a list and
        a shape in the state. Its default is Adam unless a group says ``channel_wise``; here the
        default is the method, on parameters of two or more dimensions.

    References:
        Spherical Perspective on Learning with Normalization Layers, Roburin et al., 2022;
        code: ymontmarin/adamsrt.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(1, 4))
        >>> w.grad = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
        >>> AdamS([w], lr=0.1).step()
        >>> w.data  # Adam would step by 0.1, and be as long if all four entries moved
        tensor([[-0.1414, -0.1414,  0.0000,  0.0000]])
    """

    carries: ClassVar[bool] = False


class AdamSRT(_SphericalAdam):
    r"""AdamS whose moments are rescaled with the norm, and the first carried along.

    After each step of :class:`AdamS` from :math:`w_1` to :math:`w_2`,

    .. math::
        m \leftarrow \frac{\langle w_1,w_2\rangle\,m-\langle m,w_2\rangle\,w_1}{|w_2|^2+\epsilon},
        \qquad v \leftarrow v\,\frac{|w_1|^2}{|w_2|^2+\epsilon}

    since gradients at the new norm are shorter by :math:`|w_1|/|w_2|`; the result is tangent at
    :math:`w_2`. Spheres of one entry, and ordinary parameters, take the step only.

    Args:
        params: Parameters, named parameters or groups; see :class:`LiteratureOptimizer`.
        lr: As in :class:`AdamS`.
        betas: Decay of the first and second moment.
        eps: Added to the root of the second moment, and to squared norms.
        weight_decay: L2 coefficient, for spheres too.
        sphere: Sphere of groups that name none: filters.
        maximize: Ascend.

    Raises:
        ValueError: If a value is out of range, or a sphere does not fit a parameter's shape.

    Notes:
        As in :class:`AdamS`. The gradient is not projected, and norms are not kept: they grow with
        every step. The first moment is the rotation in the plane of :math:`w_1` and :math:`w_2`
        for vectors along the path, and shorter by the cosine of the step for vectors across it.

    References:
        Spherical Perspective on Learning with Normalization Layers, Roburin et al., 2022;
        code: ymontmarin/adamsrt.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([[1.0, 0.0]]))
        >>> optimizer = AdamSRT([w], lr=0.1)
        >>> w.grad = torch.tensor([[0.0, 1.0]])
        >>> optimizer.step()
        >>> w.data, (optimizer.state[w]["exp_avg"] * w.data).sum().abs() < 1e-8
        (tensor([[ 1.0000, -0.1414]]), tensor(True))
    """

    carries: ClassVar[bool] = True

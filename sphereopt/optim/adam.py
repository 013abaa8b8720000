"""SphereAdam: Adam on spheres, AdamW on everything else."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from sphereopt.optim._plain import adam_step
from sphereopt.optim.base import Group, SphereOptimizer

__all__ = ["SphereAdam"]


class SphereAdam(SphereOptimizer):
    r"""Adam on spheres, AdamW on everything else.

    .. math::
        m &\leftarrow \beta_1 T(m) + (1-\beta_1) h, \qquad h = P_w g \\
        v &\leftarrow \beta_2 v + (1-\beta_2) h^2 \\
        u &= \frac{m/(1-\beta_1^t)}{\sqrt{v/(1-\beta_2^t)}+\epsilon}, \qquad
        t = P_w u \\
        w &\leftarrow w\cos(lr) - r\,\frac{t}{|t|}\sin(lr)

    Groups with ``sphere=None`` are stepped by ``torch.optim.AdamW``'s own code, bit for bit.

    Args:
        params: Parameters, named parameters or groups; see :func:`sphereopt.param_groups`.
        lr: For ordinary groups and rows as in torch. On spheres, with the default move
            ``"rotate"``: the angle every sphere turns, in radians per step, whatever its size.
            With ``"retract"``, ``"exp"`` or ``"renorm"``: Adam's own lr, the angle is about
            ``lr*|u|/r``.
        betas: Decay of the first and second moments.
        eps: Added to the root of the second moment, as in torch: after bias correction, in the
            units of the gradient at the stored norm (under ``radius="free"`` at the plain norm).
        weight_decay: For ordinary groups, and under ``radius="free"``.
        amsgrad: Divide by the largest second moment so far.
        decoupled_weight_decay: True for AdamW's decay, False for Adam's L2 in the gradient.
        sphere: Sphere of groups that name none: None, ``"tensor"``, ``"row"``, ``"col"``,
            ``"block:K"``, or pieces such as ``"block:8@0:512,row@512:520"``; rows that no piece
            covers are stepped as AdamW steps them.
        joint: Spheres of one index across a group's tensors are one sphere.
        move: Key of ``sphereopt.moves.MOVES``; by default ``"rotate"``, or ``"renorm"`` under
            ``radius="free"``.
        radius: ``"fixed"`` keeps every norm; ``"free"`` reproduces ``torch.optim.AdamW``'s
            directions with stored weights that never grow.
        transport: How the first moment travels: ``"project"``, ``"parallel"``, ``"rescale"``, or
            ``"none"``: moments are ambient as in torch, raw gradients enter them.
        maximize: Ascend.
        foreach: For ordinary groups as in torch; False also keeps small tensors unstacked.
        fused: For ordinary groups, as in torch.

    Raises:
        ValueError: If a value is out of range, a sphere does not fit a parameter's shape, or
            weight decay is asked of a sphere of fixed radius.

    Notes:
        The moments and the division are torch's own ``adam`` run on a zero tensor with lr 1. The
        second moment is per entry, so u has a radial part even where h has none; the move takes
        it out again (geoopt's ``RiemannianAdam`` keeps one second moment per sphere instead).

    References:
        Adam: A Method for Stochastic Optimization, Kingma and Ba, 2015, algorithm 1.
        Decoupled Weight Decay Regularization, Loshchilov and Hutter, 2019, algorithm 2.
        Riemannian approach to batch normalization, Cho and Lee, 2017 (Adam-G).

    Example:
        >>> layer = torch.nn.Linear(3, 2, bias=False)
        >>> before = layer.weight.detach().clone()
        >>> optimizer = SphereAdam(layer.parameters(), lr=0.01, sphere="row")
        >>> layer(torch.ones(1, 3)).square().sum().backward()
        >>> optimizer.step()
        >>> sphereopt.geometry.angle(before, layer.weight.detach(), "row").round(decimals=5)
        tensor([0.0100, 0.0100], dtype=torch.float64)
    """

    tangent_buffers: ClassVar[tuple[str, ...]] = ("exp_avg",)
    default_move: ClassVar[str] = "rotate"
    homogeneity: ClassVar[int] = 0

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = True,
        sphere: str | None = None,
        joint: bool = False,
        move: str | None = None,
        radius: str = "fixed",
        transport: str | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "decoupled_weight_decay": decoupled_weight_decay,
            "sphere": sphere,
            "joint": joint,
            "move": move,
            "radius": radius,
            "transport": transport,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
        }
        super().__init__(params, defaults)

    @override
    def state_keys(self, group: Group) -> tuple[str, ...]:
        moments = ("exp_avg", "exp_avg_sq")
        return (*moments, "max_exp_avg_sq") if group["amsgrad"] else moments

    @override
    def decay(self, group: Group) -> tuple[float, float | Tensor]:
        if group["decoupled_weight_decay"]:
            return 0.0, 1 - group["lr"] * group["weight_decay"]
        return group["weight_decay"], 1.0

    @override
    def direction(
        self,
        grads: list[Tensor],
        buffers: dict[str, list[Tensor]],
        steps: list[int],
        group: Group,
    ) -> list[Tensor]:
        zeros = [torch.zeros_like(grad) for grad in grads]
        device = grads[0].device
        # The fused kernel walks raw memory: it is wrong, silently, where layouts differ.
        lists = zip(zeros, grads, *buffers.values(), strict=True)
        alike = all(len({x.stride() for x in xs}) == 1 for xs in lists)
        fused = alike and device.type in ("cpu", "cuda")
        place = device if fused else None
        beta1, beta2 = group["betas"]
        adam(
            zeros,
            grads,
            buffers["exp_avg"],
            buffers["exp_avg_sq"],
            buffers.get("max_exp_avg_sq", []),
            [torch.full((), step - 1.0, device=place) for step in steps],
            foreach=False,
            fused=fused,
            amsgrad=group["amsgrad"],
            beta1=beta1,
            beta2=beta2,
            lr=-1.0,
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )
        return zeros

    @override
    def plain_step(self, params: list[Tensor], states: list[dict[str, Any]], group: Group) -> None:
        adam_step(params, states, group)

"""SphereSGD: stochastic gradient descent with momentum, on spheres."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from sphereopt.optim._plain import sgd_step
from sphereopt.optim.base import Group, Keys, Slab, SphereOptimizer

__all__ = ["SphereSGD"]


class SphereSGD(SphereOptimizer):
    r"""Stochastic gradient descent with momentum, on spheres.

    .. math::
        m &\leftarrow \mu\,T(m) + (1-\tau)\,P_w g, \qquad
        u = m \;\text{ or }\; P_w g+\mu m \text{ (Nesterov)} \\
        w &\leftarrow r\,\frac{w-lr\,P_w u}{|w-lr\,P_w u|}

    with :math:`P_w` the projection onto the tangent space and T the transport of the momentum
    (``transport``; by default neither is applied to gradient and momentum).
    Groups with ``sphere=None`` are stepped by ``torch.optim.SGD``'s own code, bit for bit.

    Args:
        params: Parameters, named parameters or groups; see :func:`sphereopt.param_groups`.
        lr: Learning rate, in SGD's unit: a step turns a sphere by
            :math:`\operatorname{atan}(lr\,|u|/r)` radians. With ``move="rotate"`` or
            ``"hyperball"`` it is the angle itself, in radians per step;
            :func:`sphereopt.theory.sphere_lr` gives that of a run of yours. For ordinary groups
            and rows always SGD's. None: 0.02 radians on spheres, with ``"rotate"`` unless another
            move is named, and 0.1 in ordinary groups; 1e-3, as in torch, under ``radius="free"``
            and with a move in SGD's unit.
        momentum: Momentum factor :math:`\mu`.
        dampening: Dampening :math:`\tau` of the momentum, from the second step on.
        weight_decay: L2 coefficient, for ordinary groups and under ``radius="free"``.
        nesterov: Use Nesterov momentum.
        sphere: Sphere of groups that name none: None, ``"tensor"``, ``"row"``, ``"col"``,
            ``"block:K"``, or pieces such as ``"block:8@0:512,row@512:520"``; rows that no piece
            covers are stepped as ``torch.optim.SGD`` steps them.
        joint: Spheres of one index across a group's tensors are one sphere.
        move: Key of ``sphereopt.moves.MOVES``; by default ``"retract"`` (``"rotate"`` in groups
            without an lr), or ``"renorm"`` under ``radius="free"``.
        radius: ``"fixed"`` keeps every norm; ``"free"`` reproduces ``torch.optim.SGD``'s
            directions with stored weights that never grow.
        transport: ``"none"``: the momentum is an ambient vector and raw gradients enter it, as in
            torch (T and the projection of g are left out). ``"project"``, ``"parallel"`` or
            ``"rescale"``: gradients are made tangent, and the momentum is carried along.
        rounding: Of bf16 and fp16 weights: ``"nearest"`` as in torch, ``"stochastic"``, or
            ``"master"`` (a float32 copy is stepped); see :doc:`low_precision`.
        maximize: Ascend.
        foreach: For ordinary groups as in torch; False also keeps small tensors unstacked.
        fused: For ordinary groups, as in torch.
        differentiable: Let autograd run through the step, as in torch.

    Raises:
        ValueError: If a value is out of range, a sphere does not fit a parameter's shape, or
            weight decay is asked of a sphere of fixed radius.

    Notes:
        geoopt's ``RiemannianSGD`` starts its buffer with the raw gradient and then adds the
        projected one, so its first step is 1+momentum times too long; here, as in torch, the
        buffer starts as the gradient. For an exactly scale-invariant loss the gradient is tangent
        already: what the projection removes is the radial part that momentum brings along.

    References:
        New Interpretations of Normalization Methods in Deep Learning, Sun et al., 2020.
        Riemannian approach to batch normalization, Cho and Lee, 2017 (SGD-G).
        Norm matters: efficient and accurate normalization schemes in deep networks, Hoffer et
        al., 2018, section 2 (the effective step size that ``radius="free"`` tracks).

    Example:
        >>> layer = torch.nn.Linear(3, 2, bias=False)
        >>> before = layer.weight.norm(dim=1)
        >>> optimizer = SphereSGD(layer.parameters(), lr=0.1, momentum=0.9, sphere="row")
        >>> layer(torch.ones(1, 3)).square().sum().backward()
        >>> optimizer.step()
        >>> torch.allclose(layer.weight.norm(dim=1), before)
        True
    """

    tangent_buffers: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    linear: ClassVar[bool] = True
    ordinary_lr: ClassVar[float] = 0.1

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        sphere: str | None = None,
        joint: bool = False,
        move: str | None = None,
        radius: str = "fixed",
        transport: str = "none",
        rounding: str = "nearest",
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "sphere": sphere,
            "joint": joint,
            "move": move,
            "radius": radius,
            "transport": transport,
            "rounding": rounding,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults)

    @override
    def state_keys(self, group: Group, params: list[Tensor]) -> Keys:
        return Keys(("momentum_buffer",) if group["momentum"] != 0 else ())

    @override
    def decay(self, group: Group) -> tuple[float, float]:
        return group["weight_decay"], 1.0

    @override
    def direction(self, grads: list[Tensor], slab: Slab, group: Group) -> list[Tensor]:
        momentum: float = group["momentum"]
        if momentum == 0:
            return grads
        ms = slab.buffers["momentum_buffer"]
        torch._foreach_mul_(ms, momentum)
        if group["dampening"] == 0:
            torch._foreach_add_(ms, grads)
        else:
            for m, grad, step in zip(ms, grads, slab.steps, strict=True):
                m.add_(grad, alpha=1.0 if step == 1 else 1 - group["dampening"])
        if group["nesterov"]:
            return list(torch._foreach_add(grads, ms, alpha=momentum))
        return ms

    @override
    def plain_step(self, params: list[Tensor], states: list[dict[str, Any]], group: Group) -> None:
        sgd_step(params, states, group)

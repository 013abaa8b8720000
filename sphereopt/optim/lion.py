"""SphereLion: Lion on spheres and everywhere else."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from sphereopt.optim._plain import lion_step
from sphereopt.optim.base import Group, Keys, Slab, SphereOptimizer

__all__ = ["SphereLion"]


class SphereLion(SphereOptimizer):
    r"""Lion (evolved sign momentum) on spheres and everywhere else.

    .. math::
        u &= \operatorname{sign}(\beta_1 T(m) + (1-\beta_1) h), \qquad h = P_w g,
        \qquad t = P_w u \\
        m &\leftarrow \beta_2 T(m) + (1-\beta_2) h \\
        w &\leftarrow w\cos(lr) - r\,\frac{t}{|t|}\sin(lr)

    Groups with ``sphere=None`` take the authors' own step.

    Args:
        params: Parameters, named parameters or groups; see :func:`sphereopt.param_groups`.
        lr: On spheres, with the default move ``"rotate"``: the angle every sphere turns, in
            radians per step; :func:`sphereopt.theory.sphere_lr` gives that of a run of yours.
            Elsewhere, and with ``"retract"``, ``"exp"`` or ``"renorm"``: Lion's
            own lr, the length of the step of every entry. None: 0.03 radians on spheres and 1e-3 in
            ordinary groups; 1e-4, as the authors', under ``radius="free"`` and with a move in
            Lion's unit.
        betas: Weight of the momentum in the direction, and decay of the momentum.
        weight_decay: Decoupled; for ordinary groups, and under ``radius="free"``.
        sphere: Sphere of groups that name none: None, ``"tensor"``, ``"row"``, ``"col"``,
            ``"block:K"``, or pieces such as ``"block:8@0:512,row@512:520"``; rows that no piece
            covers take Lion's own step.
        joint: Spheres of one index across a group's tensors are one sphere.
        move: Key of ``sphereopt.moves.MOVES``; by default ``"rotate"``, or ``"renorm"`` under
            ``radius="free"``.
        radius: ``"fixed"`` keeps every norm; ``"free"`` reproduces Lion's directions with stored
            weights that never grow.
        transport: ``"none"``: the momentum is an ambient vector and raw gradients enter it, as in
            torch (T and the projection of g are left out). ``"project"``, ``"parallel"`` or
            ``"rescale"``: gradients are made tangent, and the momentum is carried along.
        rounding: Of bf16 and fp16 weights: ``"nearest"`` as in torch, ``"stochastic"``, or
            ``"master"`` (a float32 copy is stepped); see :doc:`low_precision`.
        maximize: Ascend.
        foreach: False keeps small tensors on spheres unstacked.

    Raises:
        ValueError: If a value is out of range, a sphere does not fit a parameter's shape, or
            weight decay is asked of a sphere of fixed radius.

    Notes:
        The sign of a tangent vector has a radial part; the move takes it out. ``differentiable``
        is refused: the derivative of a sign is zero. Complex weights take the sign of real and
        imaginary parts.

    References:
        Symbolic Discovery of Optimization Algorithms, Chen et al., 2023, algorithm 2.

    Example:
        >>> layer = torch.nn.Linear(3, 2, bias=False)
        >>> before = layer.weight.detach().clone()
        >>> optimizer = SphereLion(layer.parameters(), lr=0.01, sphere="row")
        >>> layer(torch.tensor([[1.0, 2.0, -1.0]])).square().sum().backward()
        >>> optimizer.step()
        >>> sphereopt.geometry.angle(before, layer.weight.detach(), "row").round(decimals=5)
        tensor([0.0100, 0.0100], dtype=torch.float64)
    """

    tangent_buffers: ClassVar[tuple[str, ...]] = ("exp_avg",)
    default_move: ClassVar[str] = "rotate"
    homogeneity: ClassVar[int] = 0
    default_angle: ClassVar[float] = 0.03
    plain_lr: ClassVar[float] = 1e-4
    smooth: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        sphere: str | None = None,
        joint: bool = False,
        move: str | None = None,
        radius: str = "fixed",
        transport: str = "none",
        rounding: str = "nearest",
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "sphere": sphere,
            "joint": joint,
            "move": move,
            "radius": radius,
            "transport": transport,
            "rounding": rounding,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    @override
    def state_keys(self, group: Group, params: list[Tensor]) -> Keys:
        return Keys(("exp_avg",))

    @override
    def decay(self, group: Group) -> tuple[float, float | Tensor]:
        return 0.0, 1 - group["lr"] * group["weight_decay"]

    @override
    def direction(self, grads: list[Tensor], slab: Slab, group: Group) -> list[Tensor]:
        (beta1, beta2), ms = group["betas"], slab.buffers["exp_avg"]
        us = list(torch._foreach_lerp(ms, grads, 1 - beta1))
        torch._foreach_sign_(us)
        torch._foreach_lerp_(ms, grads, 1 - beta2)
        return us

    @override
    def plain_step(self, params: list[Tensor], states: list[dict[str, Any]], group: Group) -> None:
        lion_step(params, states, group)

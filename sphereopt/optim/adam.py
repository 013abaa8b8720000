"""SphereAdam: Adam on spheres, AdamW on everything else."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from sphereopt import products, spheres
from sphereopt.optim._plain import adam_step
from sphereopt.optim.base import Group, Keys, Slab, SphereOptimizer

__all__ = ["SphereAdam"]


def adam_direction(
    grads: list[Tensor], buffers: dict[str, list[Tensor]], steps: list[int], group: Group
) -> list[Tensor]:
    """Return Adam's direction, moments per entry: torch's own ``adam`` on zeros with lr -1."""
    zeros = [torch.zeros_like(grad) for grad in grads]
    device = grads[0].device
    # The fused kernel walks raw memory: it is wrong, silently, where layouts differ.
    lists = zip(zeros, grads, *buffers.values(), strict=True)
    alike = all(len({x.stride() for x in xs}) == 1 for xs in lists)
    slow = group["differentiable"] or torch.compiler.is_compiling()
    fused = alike and device.type in ("cpu", "cuda") and not slow
    # Compiled code computes the bias correction in this dtype, not in Python.
    place, wide = (device, torch.float32) if fused else (None, torch.float64)
    beta1, beta2 = group["betas"]
    adam(
        zeros,
        grads,
        buffers["exp_avg"],
        buffers["exp_avg_sq"],
        buffers.get("max_exp_avg_sq", []),
        [torch.full((), step - 1.0, device=place, dtype=wide) for step in steps],
        foreach=False,
        fused=fused,
        differentiable=group["differentiable"],
        amsgrad="max_exp_avg_sq" in buffers,
        beta1=beta1,
        beta2=beta2,
        lr=-1.0,
        weight_decay=0.0,
        eps=group["eps"],
        maximize=False,
    )
    return zeros


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
            ``"rotate"``: the angle every sphere turns, in radians per step, whatever its size;
            :func:`sphereopt.theory.sphere_lr` gives that of a run of yours. With ``"retract"``,
            ``"exp"`` or ``"renorm"``: Adam's own lr, the angle is about ``lr*|u|/r``. None: 0.02
            radians on spheres and 3e-3 in ordinary groups; 1e-3, as in torch, under
            ``radius="free"`` and with a move in Adam's unit.
        betas: Decay of the first and second moments.
        eps: Added to the root of the second moment, as in torch: after bias correction, in the
            units of the gradient at the stored norm (under ``radius="free"`` at the plain norm).
        weight_decay: For ordinary groups, and under ``radius="free"``.
        amsgrad: Divide by the largest second moment so far.
        decoupled_weight_decay: True for AdamW's decay, False for Adam's L2 in the gradient.
        second_moment: ``"entry"`` as in Adam, or ``"sphere"``: one per sphere, the mean over its
            entries. The direction is then the first moment, rescaled (tangent, where that is),
            and the state takes half the memory.
        sphere: Sphere of groups that name none: None, ``"tensor"``, ``"row"``, ``"col"``,
            ``"block:K"``, or pieces such as ``"block:8@0:512,row@512:520"``; rows that no piece
            covers are stepped as AdamW steps them.
        joint: Spheres of one index across a group's tensors are one sphere.
        move: Key of ``sphereopt.moves.MOVES``; by default ``"rotate"``, or ``"renorm"`` under
            ``radius="free"``.
        radius: ``"fixed"`` keeps every norm; ``"free"`` reproduces ``torch.optim.AdamW``'s
            directions with stored weights that never grow.
        transport: ``"none"``: the first moment is an ambient vector and raw gradients enter it, as
            in torch (T and the projection of g are left out). ``"project"``, ``"parallel"`` or
            ``"rescale"``: gradients are made tangent, and the first moment is carried along.
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
        The moments and the division are torch's own ``adam`` run on a zero tensor with lr 1. With
        a second moment per entry u has a radial part even where h has none; the move takes it out
        again. geoopt's ``RiemannianAdam`` and Adam-G keep one per sphere, the *sum* of squares:
        their lr and eps are ours times the root of the number of entries. Rows that no piece
        covers keep one per entry.

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
    ordinary_lr: ClassVar[float] = 3e-3
    sphere_numbers: ClassVar[tuple[str, ...]] = ("sphere_avg_sq", "max_sphere_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = True,
        second_moment: str = "entry",
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
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "decoupled_weight_decay": decoupled_weight_decay,
            "second_moment": second_moment,
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
        entry = ("exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg_sq",)
        if group["second_moment"] == "entry" or group["sphere"] is None:
            return Keys(("exp_avg", *entry))
        uncovered = any(spheres.rest(p, group["sphere"]) for p in params)
        return Keys(
            ("exp_avg", *(entry if uncovered else ())),
            self.sphere_numbers if group["amsgrad"] else self.sphere_numbers[:1],
        )

    @override
    def decay(self, group: Group) -> tuple[float, float | Tensor]:
        if group["decoupled_weight_decay"]:
            return 0.0, 1 - group["lr"] * group["weight_decay"]
        return group["weight_decay"], 1.0

    @override
    def direction(self, grads: list[Tensor], slab: Slab, group: Group) -> list[Tensor]:
        if "sphere_avg_sq" in slab.numbers:
            return self._per_sphere(grads, slab, group)
        return adam_direction(grads, slab.buffers, slab.steps, group)

    def _per_sphere(self, grads: list[Tensor], slab: Slab, group: Group) -> list[Tensor]:
        (beta1, beta2), members = group["betas"], slab.members
        ms, v = slab.buffers["exp_avg"], slab.numbers["sphere_avg_sq"]
        torch._foreach_lerp_(ms, grads, 1 - beta1)
        v.lerp_(products.mean_square(grads, members), 1 - beta2)
        if group["amsgrad"]:
            # Not in place: autograd needs the former maximum.
            v = torch.maximum(slab.numbers["max_sphere_avg_sq"], v)
            slab.numbers["max_sphere_avg_sq"] = v
        t = torch.full(
            (), slab.steps[0], dtype=torch.float64
        )  # no int: no constant in compiled code
        if any(step != slab.steps[0] for step in slab.steps[1:]):
            starts = [0, *accumulate(members)][:-1]
            ages = [slab.steps[i] for i in starts for _ in range(grads[i].shape[0])]
            t = torch.tensor(ages, dtype=v.dtype).to(v.device, non_blocking=True)
        root = (v / (1 - beta2**t)).sqrt() + group["eps"]
        return products.scale(1 / ((1 - beta1**t) * root), ms, members)

    @override
    def plain_step(self, params: list[Tensor], states: list[dict[str, Any]], group: Group) -> None:
        adam_step(params, states, group)

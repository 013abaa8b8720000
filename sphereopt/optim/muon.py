"""SphereMuon: orthogonalized momentum on spheres, torch's Muon on other matrices."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from sphereopt.optim._checks import parameter_name
from sphereopt.optim._plain import adam_step, muon_step
from sphereopt.optim.adam import adam_direction
from sphereopt.optim.base import Group, Keys, Slab, SphereOptimizer

__all__ = ["SphereMuon", "newton_schulz"]


def newton_schulz(
    x: Tensor,
    coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
    steps: int = 5,
    eps: float = 1e-7,
) -> Tensor:
    r"""Return nearly orthogonal matrices with the row and column spaces of x.

    .. math:: X_0 = x/|x|, \qquad X_{i+1} = a X_i + (b A + c A^2) X_i, \qquad A = X_i X_i^\top

    Args:
        x: One matrix ``(m, n)`` or several ``(b, m, n)``, any dtype.
        coefficients: a, b and c of the iteration.
        steps: Number of iterations.
        eps: Least norm that is divided by.

    Returns:
        The singular vectors of x with singular values of about 0.7 to 1.2, in bfloat16; zero
        where x is zero.

    Notes:
        The operations of ``torch.optim.Muon``, bit for bit for one matrix, and batched for
        several.

    References:
        Muon: An optimizer for hidden layers in neural networks, Jordan et al., 2024.

    Example:
        >>> x = torch.tensor([[3.0, 0.0], [0.0, -0.1]])
        >>> newton_schulz(x).diagonal()
        tensor([ 0.6875, -1.1328], dtype=torch.bfloat16)
    """
    a, b, c = coefficients
    add_product = torch.addmm if x.ndim == 2 else torch.baddbmm
    tall = x.shape[-2] > x.shape[-1]
    y = (x.mT if tall else x).bfloat16()
    y = y / torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = y @ y.mT
        update = add_product(gram, gram, gram, beta=b, alpha=c)
        y = add_product(y, update, y, beta=a)
    return y.mT if tall else y


class SphereMuon(SphereOptimizer):
    r"""Muon (momentum, orthogonalized) on spheres.

    .. math::
        m &\leftarrow \mu\,T(m) + (1-\mu)\,h, \qquad h = P_w g \\
        u &= s\,\mathrm{NS}\bigl((1-\mu)\,h + \mu\,m\bigr), \qquad t = P_w u \\
        w &\leftarrow w\cos(lr) - r\,\frac{t}{|t|}\sin(lr)

    What is orthogonalized (NS, :func:`newton_schulz`) follows from the sphere: under ``"row"``
    and ``"tensor"`` the weight as one matrix, filters flattened to rows; under ``"block:K"`` every
    block as a matrix of its own (heads), and where a block is one index of dim 0 of a weight with
    three or more dimensions, that index (experts). Every piece of a spec is orthogonalized by
    itself.

    What is no matrix (vectors, complex weights, joint spheres with a vector among their members)
    is stepped by AdamW instead: see :attr:`fallbacks` for the names. Matrices, and filters
    flattened to matrices, of groups with ``sphere=None`` are stepped by ``torch.optim.Muon``'s own
    code, bit for bit.

    Args:
        params: Parameters, named parameters or groups; see :func:`sphereopt.param_groups`.
        lr: On spheres, with the default move ``"rotate"``: the angle every sphere turns, in
            radians per step; :func:`sphereopt.theory.sphere_lr` gives that of a run of yours.
            Elsewhere, and with ``"retract"``, ``"exp"`` or ``"renorm"``:
            Muon's own lr; there the fallback has the unit of AdamW's, so give its groups their
            own, or use ``adjust_lr_fn="match_rms_adamw"``. None: 0.02 radians on spheres and 0.01
            in ordinary groups; 1e-3, as in torch, under ``radius="free"`` and with a move in Muon's
            unit.
        weight_decay: Decoupled; for ordinary groups, and under ``radius="free"``.
        momentum: Decay of the momentum, a moving average.
        nesterov: Use Nesterov momentum.
        ns_coefficients: Coefficients of the Newton-Schulz iteration.
        eps: Least norm it divides by.
        ns_steps: Number of iterations.
        adjust_lr_fn: Scale s of the direction, for an m x n matrix: None or ``"original"`` for
            :math:`\sqrt{\max(1, m/n)}`, ``"match_rms_adamw"`` for :math:`0.2\sqrt{\max(m, n)}`.
            Moves with lr in radians do not see it.
        betas: Of the fallback: decay of AdamW's moments.
        adam_eps: Of the fallback: AdamW's eps.
        orthogonalize: False steps a whole group by the fallback (embeddings, the head).
        sphere: Sphere of groups that name none: None, ``"tensor"``, ``"row"``, ``"col"``,
            ``"block:K"``, or pieces such as ``"block:8@0:512,row@512:520"``; rows that no piece
            covers take Muon's own step.
        joint: Spheres of one index across a group's tensors are one sphere.
        move: Key of ``sphereopt.moves.MOVES``; by default ``"rotate"``, or ``"renorm"`` under
            ``radius="free"``.
        radius: ``"fixed"`` keeps every norm; ``"free"`` reproduces ``torch.optim.Muon``'s
            directions with stored weights that never grow.
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
        ``differentiable`` is refused, as torch's Muon has none. The iteration runs in bfloat16,
        as torch's: the direction has about three digits.

    References:
        Muon: An optimizer for hidden layers in neural networks, Jordan et al., 2024.
        Muon is Scalable for LLM Training, Liu et al., 2025 (``match_rms_adamw``).

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> before = layer.weight.detach().clone()
        >>> groups = sphereopt.param_groups(layer, {"weight": "tensor"})
        >>> optimizer = SphereMuon(groups, lr=0.01)
        >>> layer(torch.ones(1, 3)).square().sum().backward()
        >>> optimizer.step()
        >>> sphereopt.geometry.angle(before, layer.weight.detach()).round(decimals=5)
        tensor([0.0100], dtype=torch.float64)
        >>> optimizer.fallbacks
        ['bias']
    """

    tangent_buffers: ClassVar[tuple[str, ...]] = ("momentum_buffer", "exp_avg")
    default_move: ClassVar[str] = "rotate"
    homogeneity: ClassVar[int] = 0
    ordinary_lr: ClassVar[float] = 1e-2
    smooth: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        orthogonalize: bool = True,
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
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "betas": betas,
            "adam_eps": adam_eps,
            "orthogonalize": orthogonalize,
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

    @property
    def fallbacks(self) -> list[str]:
        """Names of the parameters that AdamW steps, because they are no matrices."""
        return [
            parameter_name(group, index, i)
            for index, group in enumerate(self.param_groups)
            for i, p in enumerate(group["params"])
            if not _is_served(group, group["params"] if group["joint"] else [p])
        ]

    @override
    def state_keys(self, group: Group, params: list[Tensor]) -> Keys:
        if _is_served(group, params):
            return Keys(("momentum_buffer",), whole=True)
        return Keys(("exp_avg", "exp_avg_sq"))

    @override
    def decay(self, group: Group) -> tuple[float, float | Tensor]:
        return 0.0, 1 - group["lr"] * group["weight_decay"]

    @override
    def direction(self, grads: list[Tensor], slab: Slab, group: Group) -> list[Tensor]:
        if "exp_avg" in slab.buffers:
            return adam_direction(grads, slab.buffers, slab.steps, _adam_options(group))
        momentum, ms = group["momentum"], slab.buffers["momentum_buffer"]
        torch._foreach_lerp_(ms, grads, 1 - momentum)
        us = torch._foreach_lerp(grads, ms, momentum) if group["nesterov"] else ms
        return [_orthogonal(u, kind, group) for u, kind in zip(us, slab.kinds, strict=True)]

    @override
    def plain_step(self, params: list[Tensor], states: list[dict[str, Any]], group: Group) -> None:
        # torch's Muon divides by the sizes of a matrix.
        pairs = [pair for pair in zip(params, states, strict=True) if pair[0].numel()]
        matrices = [pair for pair in pairs if _is_served(group, [pair[0]])]
        others = [pair for pair in pairs if not _is_served(group, [pair[0]])]
        if matrices:
            muon_step([p for p, _ in matrices], [state for _, state in matrices], group)
        if others:
            options = _adam_options(group)
            adam_step([p for p, _ in others], [state for _, state in others], options)


def _is_served(group: Group, params: list[Tensor]) -> bool:
    """Return whether all of a parameter, or of the members of a joint sphere, are matrices."""
    return bool(group["orthogonalize"]) and all(p.ndim > 1 and not p.is_complex() for p in params)


def _adam_options(group: Group) -> Group:
    fixed = {"amsgrad": False, "decoupled_weight_decay": True, "differentiable": False}
    # torch's foreach form takes no tensor.
    foreach = False if isinstance(group["lr"], Tensor) else group["foreach"]
    return {**group, **fixed, "eps": group["adam_eps"], "foreach": foreach}


def _orthogonal(u: Tensor, kind: str | None, group: Group) -> Tensor:
    """Return the scaled Newton-Schulz iterate of a view ``(k, ...)``, matrix by matrix."""
    if kind in ("tensor", "block"):
        expert = u.shape[1] == 1 and u.ndim > 3
        matrices = u.flatten(0, 1) if expert else u
        matrices = matrices.flatten(2)
    else:
        matrices = u.flatten(1).unsqueeze(0)
    one = matrices.shape[0] == 1
    coefficients, steps = group["ns_coefficients"], group["ns_steps"]
    result = newton_schulz(matrices[0] if one else matrices, coefficients, steps, group["eps"])
    m, n = matrices.shape[-2:]
    scale = 0.2 * math.sqrt(max(m, n))
    if group["adjust_lr_fn"] != "match_rms_adamw":
        scale = math.sqrt(max(1, m / n))
    return (result.to(u.dtype) * scale).reshape(u.shape)

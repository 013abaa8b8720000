"""Ordinary groups: torch's own functional updates, so that the numbers are torch's bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim._muon import muon
from torch.optim.adam import adam
from torch.optim.optimizer import _device_dtype_check_for_fused
from torch.optim.sgd import sgd

__all__ = ["adam_step", "clock", "lion_step", "muon_step", "sgd_step"]

State = dict[str, Any]


def clock(count: float, device: torch.device | str = "cpu", *, fused: bool = False) -> Tensor:
    """Return a count of steps as torch keeps it.

    Args:
        count: Steps made.
        device: Where it is kept.
        fused: It is for a fused kernel.

    Returns:
        A float32 tensor without dimensions; float64 where that is the default dtype, but not for
        fused kernels. Never a narrower default dtype: bfloat16 cannot count beyond 256.
    """
    wide = torch.get_default_dtype() == torch.float64 and not fused
    return torch.tensor(count, dtype=torch.float64 if wide else torch.float32, device=device)


def sgd_step(params: list[Tensor], states: list[State], group: dict[str, Any]) -> None:
    """Step parameters that have a gradient exactly as ``torch.optim.SGD`` does.

    Args:
        params: Parameters whose ``.grad`` is set.
        states: Their optimizer state, filled in here.
        group: Options under torch's names.
    """
    _check_fused(params, group)
    grads = [p.grad for p in params if p.grad is not None]
    buffers = [state.get("momentum_buffer") for state in states]
    sgd(
        params,
        grads,
        buffers,
        has_sparse_grad=any(g.is_sparse for g in grads),
        foreach=False if group["differentiable"] else group["foreach"],
        fused=group["fused"],
        lr=group["lr"],
        momentum=group["momentum"],
        dampening=group["dampening"],
        weight_decay=group["weight_decay"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
    )
    if group["momentum"] != 0:
        for state, buffer in zip(states, buffers, strict=True):
            state["momentum_buffer"] = buffer


def adam_step(params: list[Tensor], states: list[State], group: dict[str, Any]) -> None:
    """Step parameters that have a gradient exactly as ``torch.optim.Adam`` or ``AdamW`` does.

    Args:
        params: Parameters whose ``.grad`` is set.
        states: Their optimizer state, filled in here.
        group: Options under torch's names.

    Raises:
        RuntimeError: If a gradient is sparse, as torch does.
    """
    _check_fused(params, group)
    for p, state in zip(params, states, strict=True):
        if p.grad is not None and p.grad.is_sparse:
            raise RuntimeError("Adam does not support sparse gradients; use SparseAdam for them")
        if not state:
            device = p.device if group["fused"] else "cpu"
            state["step"] = clock(0.0, device, fused=bool(group["fused"]))
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            if group["amsgrad"]:
                state["max_exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
    beta1, beta2 = group["betas"]
    adam(
        params,
        [p.grad for p in params if p.grad is not None],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else [],
        [state["step"] for state in states],
        foreach=group["foreach"],
        fused=group["fused"],
        differentiable=group["differentiable"],
        has_complex=any(p.is_complex() for p in params),
        decoupled_weight_decay=group["decoupled_weight_decay"],
        amsgrad=group["amsgrad"],
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )


def _check_fused(params: list[Tensor], group: dict[str, Any]) -> None:
    if group["fused"]:
        for p in params:
            _device_dtype_check_for_fused(p)


def lion_step(params: list[Tensor], states: list[State], group: dict[str, Any]) -> None:
    """Step parameters that have a gradient as the authors' Lion does; torch has none.

    Args:
        params: Parameters whose ``.grad`` is set.
        states: Their optimizer state, filled in here.
        group: Options.

    Raises:
        RuntimeError: If a gradient is sparse.
    """
    (beta1, beta2), lr = group["betas"], group["lr"]
    if isinstance(lr, Tensor):
        lr = lr.reshape(())  # of shape (1,), it would not go into a parameter without dimensions
    for p, state in zip(params, states, strict=True):
        if p.grad is None or p.grad.is_sparse:
            raise RuntimeError("Lion does not support sparse gradients; use sparse=False")
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        both = (p, p.grad, state["exp_avg"])
        w, g, m = map(torch.view_as_real, both) if p.is_complex() else both
        g = -g if group["maximize"] else g
        w.mul_(1 - lr * group["weight_decay"])
        w.sub_((m * beta1 + g * (1 - beta1)).sign_() * lr)
        m.mul_(beta2).add_(g, alpha=1 - beta2)


def muon_step(params: list[Tensor], states: list[State], group: dict[str, Any]) -> None:
    """Step matrices that have a gradient exactly as ``torch.optim.Muon`` does, filters flattened.

    Args:
        params: Weights of two or more dimensions whose ``.grad`` is set.
        states: Their optimizer state, filled in here.
        group: Options under torch's names.

    Raises:
        RuntimeError: If a gradient is sparse, as torch does.
    """
    for p, state in zip(params, states, strict=True):
        if p.grad is not None and p.grad.is_sparse:
            raise RuntimeError("Muon does not support sparse gradients; use sparse=False")
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
    grads = [p.grad.flatten(1) for p in params if p.grad is not None]
    buffers = [state["momentum_buffer"] for state in states]
    flat, flat_buffers = [p.flatten(1) for p in params], [m.flatten(1) for m in buffers]
    muon(
        flat,
        [-g for g in grads] if group["maximize"] else grads,
        flat_buffers,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        nesterov=group["nesterov"],
        ns_coefficients=group["ns_coefficients"],
        ns_steps=group["ns_steps"],
        eps=group["eps"],
        adjust_lr_fn=group["adjust_lr_fn"],
        has_complex=False,
    )
    for home, x in zip([*params, *buffers], [*flat, *flat_buffers], strict=True):
        if home.ndim > 2 and not home.is_contiguous():  # flattening channels_last makes a copy
            home.copy_(x.reshape(home.shape))

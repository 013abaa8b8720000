"""Gradient attacks: batches that a model is most wrong about, near those it was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sphereopt.diagnostics._untouched import inner_model, untouched
from sphereopt.products import accumulator

__all__ = ["Loss", "fgsm", "pgd"]

Loss = Callable[[Any, Tensor], Tensor]
Norm = Literal["linf", "l2"]


def fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    *,
    norm: Norm = "linf",
    loss: Loss | None = None,
    targeted: bool = False,
    clip: tuple[float, float] | None = (0.0, 1.0),
) -> Tensor:
    r"""Return the batch one gradient step away: the fast gradient (sign) method.

    .. math::
        x' = \operatorname{clip}\left(x+\epsilon\,\operatorname{sign}g\right)
        \;\text{ or }\; \operatorname{clip}\left(x+\epsilon\,g/|g|_2\right),
        \qquad g=\nabla_x L(f(x),y)

    Args:
        model: Classifier, in the mode to be attacked (usually ``eval()``). It is left as found:
            ``.grad``, buffers, modes, random generators.
        x: Inputs, shape (N, ...), of floating point, inside ``clip``.
        y: Labels, or whatever ``loss`` takes; the labels to be reached if ``targeted``.
        eps: Size of the step in the chosen norm, in x's unit: one number, or one per sample (N,).
        norm: ``"linf"`` or ``"l2"`` (of a sample).
        loss: Maps (output, y) to a scalar: a sum over samples, so that none depends on how many
            there are. By default the cross-entropy of logits.
        targeted: Descend instead of ascend.
        clip: Lowest and highest value of an input, or None.

    Returns:
        The adversarial batch, like x. Where a gradient is zero, the sample stays.

    Raises:
        TypeError: If x is not of floating point, or the output no tensor and no loss is given.
        ValueError: If x leaves ``clip``, or an argument is out of range.

    Notes:
        In ``train()`` the samples of a batch share statistics, so that the attack on one depends
        on the others. In half precision steps are computed in float32 and rounded to x's dtype, so
        that the ball is kept up to that rounding.

    References:
        Explaining and Harnessing Adversarial Examples, Goodfellow, Shlens and Szegedy, 2015.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> model.weight.data = torch.tensor([[1.0, -2.0], [0.0, 0.0]])
        >>> fgsm(model, torch.tensor([[0.5, 0.5]]), torch.tensor([0]), 0.1)
        tensor([[0.4000, 0.6000]])
    """
    return pgd(
        model, x, y, eps, 1, eps, norm=norm, loss=loss, targeted=targeted, clip=clip,
        random_start=False,
    )  # fmt: skip


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    steps: int = 10,
    step_size: float | Tensor | None = None,
    *,
    norm: Norm = "linf",
    random_start: bool = True,
    generator: torch.Generator | None = None,
    loss: Loss | None = None,
    targeted: bool = False,
    clip: tuple[float, float] | None = (0.0, 1.0),
) -> Tensor:
    r"""Return the batch that projected gradient ascent finds inside a ball around x.

    .. math::
        x_{k+1} = \operatorname{clip}\left(x+\Pi_\epsilon\left(x_k+\alpha\,s(g_k)-x\right)\right),
        \qquad s(g)=\operatorname{sign}g \;\text{ or }\; g/|g|_2

    with :math:`\Pi_\epsilon` the nearest point of the ball of radius :math:`\epsilon`.

    Args:
        model: Classifier, in the mode to be attacked; see :func:`fgsm`.
        x: Inputs, shape (N, ...), of floating point, inside ``clip``.
        y: Labels; see :func:`fgsm`.
        eps: Radius of the ball: one number, or one per sample (N,).
        steps: Number of steps.
        step_size: Size :math:`\alpha` of a step; by default ``2.5 * eps / steps``.
        norm: ``"linf"`` or ``"l2"`` (of a sample).
        random_start: Start anywhere in the ball (uniformly), not at x.
        generator: For that; by default the device's own, which is left as found, so that equal
            calls return equal batches.
        loss: Maps (output, y) to a scalar; see :func:`fgsm`.
        targeted: Descend instead of ascend.
        clip: Lowest and highest value of an input, or None.

    Returns:
        The last iterate, like x.

    Raises:
        TypeError: As :func:`fgsm`.
        ValueError: As :func:`fgsm`.

    Notes:
        The last iterate, not the best one, as in the paper and in Foolbox.

    References:
        Towards Deep Learning Models Resistant to Adversarial Attacks, Madry, Makelov, Schmidt,
        Tsipras and Vladu, 2018.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> model.weight.data = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
        >>> x, y = torch.tensor([[0.5, 0.5]]), torch.tensor([0])
        >>> pgd(model, x, y, 0.1, norm="l2", random_start=False) - x
        tensor([[-0.0600,  0.0800]])
    """
    inner = inner_model(model)
    radius = _radius("eps", eps, x)
    _check(x, norm, steps, clip)
    size = 2.5 * radius / steps if step_size is None else _radius("step_size", step_size, x)
    x = x.detach()
    sign = -1 if targeted else 1
    with untouched(inner), torch.enable_grad():
        delta = torch.zeros_like(x, dtype=accumulator(x.dtype))
        if random_start:
            delta = _clipped(x, _random(delta, radius, norm, generator), clip) - x
        for _ in range(steps):
            grad = _gradient(inner, _rounded(x, delta, clip), y, loss).to(delta.dtype)
            delta = _into_ball(delta + sign * size * _steepest(grad, norm), radius, norm)
            delta = _clipped(x, delta, clip) - x
        return _rounded(x, delta, clip)


def _check(x: Tensor, norm: str, steps: int, clip: tuple[float, float] | None) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; attacks need inputs of floating point")
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm={norm!r} must be 'linf' or 'l2'")
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    if clip is not None and x.numel() and not (clip[0] <= x.min() and x.max() <= clip[1]):
        raise ValueError(
            f"x goes from {x.min():.4g} to {x.max():.4g}, outside clip={clip}; give the range of "
            "your inputs, or clip=None"
        )


def _radius(name: str, value: float | Tensor, x: Tensor) -> Tensor:
    """Return one number per sample, shaped to broadcast over x."""
    radius = torch.as_tensor(value, dtype=accumulator(x.dtype), device=x.device)
    if radius.dim() and radius.shape != x.shape[:1]:
        raise ValueError(
            f"{name} has shape {tuple(radius.shape)}; it must be a number or one per sample, "
            f"shape ({len(x)},)"
        )
    if not (torch.isfinite(radius) & (radius >= 0)).all():
        raise ValueError(f"{name}={value} must be finite and not negative")
    return radius.reshape(-1, *[1] * (x.dim() - 1))


def _gradient(model: nn.Module, x: Tensor, y: Tensor, loss: Loss | None) -> Tensor:
    leaf = x.detach().requires_grad_()
    # The clone is no leaf, so that a model may begin in place.
    output = model(leaf.clone())
    if loss is not None:
        value = loss(output, y)
    elif isinstance(output, Tensor):
        # float32: the sum's gradient in float16 would round probabilities below 6e-8 to zero.
        value = cross_entropy(output.to(accumulator(output.dtype)), y, reduction="sum")
    else:
        raise TypeError(
            f"the model returned a {type(output).__name__}; pass loss=, such as "
            "lambda out, y: cross_entropy(out.logits, y, reduction='sum')"
        )
    (grad,) = torch.autograd.grad(value, leaf)
    return grad


def _norms(x: Tensor) -> Tensor:
    """Return the 2-norm of each sample, shaped to broadcast."""
    norms = torch.linalg.vector_norm(x.flatten(1), dim=1) if x.dim() > 1 else x.abs()
    return norms.reshape(-1, *[1] * (x.dim() - 1))


def _steepest(grad: Tensor, norm: str) -> Tensor:
    """Return the step of length 1 that the loss rises most along; zero for a zero gradient."""
    if norm == "linf":
        return grad.sign()
    largest = grad.abs().flatten(1).amax(1) if grad.dim() > 1 else grad.abs()
    scale = largest.reshape(-1, *[1] * (grad.dim() - 1))
    # Squares of a confident model's gradient, below 1e-22, would be zero in float32.
    grad = grad / torch.where(scale == 0, 1, scale)
    norms = _norms(grad)
    return grad / torch.where(norms == 0, 1, norms)


def _into_ball(delta: Tensor, radius: Tensor, norm: str) -> Tensor:
    if norm == "linf":
        return torch.maximum(torch.minimum(delta, radius), -radius)
    norms = _norms(delta)
    return delta * (radius / torch.where(norms == 0, 1, norms)).clamp(max=1)


def _random(like: Tensor, radius: Tensor, norm: str, generator: torch.Generator | None) -> Tensor:
    """Return a point of each ball, uniformly distributed."""
    u = torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    if norm == "linf":
        return radius * (2 * u - 1)
    g = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    size = like[:1].numel()
    first = u.reshape(len(u), -1)[:, 0].reshape(-1, *[1] * (like.dim() - 1))
    return radius * first ** (1 / max(size, 1)) * _steepest(g, norm)


def _clipped(x: Tensor, delta: Tensor, clip: tuple[float, float] | None) -> Tensor:
    moved = x + delta
    return moved if clip is None else moved.clamp(*clip)


def _rounded(x: Tensor, delta: Tensor, clip: tuple[float, float] | None) -> Tensor:
    return _clipped(x, delta, clip).to(x.dtype)

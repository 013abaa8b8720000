"""The numbers of a layer, reduced where its tensors are, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from sphereopt.products import accumulator

__all__ = ["gathered", "gradient_numbers", "signal_numbers", "stable_ranks"]

#: Rounding errors of a constant: a channel is dead if it varies by less than these, relatively.
_ROUNDING = 8


def signal_numbers(
    x: Tensor, samples: int, batch_dim: int, channels: int, most: int
) -> tuple[Tensor, Tensor | None]:
    """Return the statistics of an activation.

    Args:
        x: The activation, at least one dim, not empty.
        samples: N, the samples of the batch.
        batch_dim: Their dim; if it is the first, it may also hold several rows for each sample.
        channels: The dim of the channels.
        most: Samples of the Gram matrix.

    Returns:
        ``[scale, variance / scale**2, similarity, share of dead channels, share not finite]``, on
        x's device, and the Gram matrix of the unit-normalised samples: of their smaller side,
        which has the same eigenvalues but zeros. None where the samples cannot be told apart.
    """
    others = [dim for dim in range(x.dim()) if dim != channels] or [0]
    # Squares of float16 beyond 256 and of bfloat16 beyond 1e19 would overflow.
    scale, lost = _size(x)
    wide = x.to(scale.dtype) / scale
    # Two passes: as exact as torch.var, and on CPU several times as fast.
    mean = wide.mean(others, keepdim=True)
    var = (wide - mean).square_().mean(others, keepdim=True)
    noise = _ROUNDING * torch.finfo(x.dtype).eps
    dead = (var <= noise**2 * (var + mean.square())).to(scale.dtype).mean()
    rows = _by_sample(wide, samples, batch_dim)
    similarity, gram = scale.new_tensor(0.0), None
    if rows is not None:
        norms = torch.linalg.vector_norm(rows, dim=1)
        inverse = torch.where(norms == 0, 0, 1 / norms)
        alike = (inverse @ rows).square().sum() - (norms != 0).sum()
        similarity = alike / (samples * (samples - 1))
        rows = rows[:most] * inverse[:most, None]
        gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    return torch.stack([scale, var.mean(), similarity, dead, lost]), gram


def _size(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the size of the largest entry, or 1 if that is zero or not finite; what is not.

    Both float32 or wider: the size, and the share of the entries that are NaN or infinite.
    """
    size, wide = x.abs(), accumulator(x.dtype)
    largest = size.amax().to(wide)
    finite = (size <= torch.finfo(x.dtype).max).count_nonzero().to(wide)
    scale = torch.where((largest > 0) & torch.isfinite(largest), largest, 1)
    return scale, 1 - finite / x.numel()


def _by_sample(x: Tensor, samples: int, batch_dim: int) -> Tensor | None:
    """Return x as (N, D), or None if there are no two samples in it."""
    if samples < 2 or x.dim() <= batch_dim:
        return None
    size = x.shape[batch_dim]
    if size != samples and (batch_dim or size % samples):
        return None
    return x.movedim(batch_dim, 0).reshape(samples, -1)


def gradient_numbers(grad: Tensor) -> Tensor:
    """Return ``[scale, norm / scale, share not finite]`` of a gradient, on its device."""
    scale, lost = _size(grad)
    norm = torch.linalg.vector_norm(grad.to(scale.dtype) / scale)
    return torch.stack([scale, norm, lost])


def gathered(tensors: list[Tensor]) -> list[Tensor]:
    """Return tensors of any devices on the host, in float64: one wait, not one for each."""
    if not tensors:
        return []
    where = tensors[0].device
    wide = max((t.dtype for t in tensors), key=lambda dtype: torch.finfo(dtype).bits)
    flat = torch.cat([t.flatten().to(where, wide) for t in tensors]).cpu().double()
    parts = torch.split(flat, [t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def stable_ranks(grams: list[Tensor]) -> list[float]:
    """Return tr(G) / |G|_2 of each Gram matrix; NaN where it is not finite or zero."""
    ranks = []
    for gram in gathered(grams):
        if not torch.isfinite(gram).all() or gram.trace() <= 0:
            ranks.append(float("nan"))
            continue
        ranks.append((gram.trace() / torch.linalg.eigvalsh(gram)[-1]).item())
    return ranks

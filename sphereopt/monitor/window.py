r"""How far weights get in many steps, from a sample of them.

The angle of one step does not tell how far many get: momentum makes successive steps agree. A
sample of every parameter's weights is kept and compared with what they are a window later.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from sphereopt import products, spheres
from sphereopt.geometry import angle

__all__ = ["Window", "diffusive_angle"]

#: Of a parameter at most one weight in SHARE is kept, but never fewer than LEAST, nor fewer of a
#: sphere: below 1 % of the model. 64 weights tell the angle of a sphere to sqrt(4/64)/2 = 12 %, and
#: those of a hundred spheres the mean to a tenth of that.
SHARE, LEAST = 256, 64


def diffusive_angle(turned: Tensor, steps: int) -> Tensor:
    r"""Return the angle per root step that a number of steps made, in radians.

    .. math:: \theta_{diff} = \sqrt{-\frac{2\ln\cos\angle(w_t,w_{t+T})}{T}}

    Expected: :math:`\sqrt{2\kappa}`, the ``diffusive_angle`` of
    :func:`sphereopt.theory.equilibrium`; its square over that of the angle is the momentum's ``K``.

    Args:
        turned: :math:`\angle(w_t,w_{t+T})`, shape ``(k,)``, in radians.
        steps: :math:`T`, how many steps lie between them.

    Returns:
        Shape ``(k,)``; not finite where weights turned by a right angle or more, which does not
        tell how far they went.

    References:
        Rotational Equilibrium: How Weight Decay Balances Learning Across Neural Networks, Kosson et
        al., 2024 (random walk of the direction).

    Example:
        >>> diffusive_angle(torch.tensor([0.3]), 900)
        tensor([0.0101])
    """
    # ln cos(x) without the cosine, which has no digits left for the small angles of slow training.
    return torch.sqrt(-2 * torch.log1p(-2 * torch.sin(turned / 2) ** 2) / steps)


@dataclass(frozen=True, slots=True)
class _Sample:
    """Some weights, one (spheres, weights) for each piece of the spec, and when they were so."""

    step: int
    weights: list[Tensor]


class Window:
    """Samples of weights, and when they were taken.

    Args:
        length: Steps from one sample to the next, at least; samples are taken on logged steps.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._samples: dict[str, _Sample] = {}

    def due(self, name: str, step: int) -> bool:
        """Return whether a parameter's sample is old enough, or there is none.

        Args:
            name: Of the parameter, or of the members of a joint sphere.
            step: Steps made.
        """
        last = self._samples.get(name)
        return last is None or step - last.step >= self.length

    def turned(self, name: str, params: list[Tensor], sphere: str, step: int) -> Tensor | None:
        """Take a new sample of a parameter; return the diffusive angles since the last one.

        Args:
            name: Of the parameter, or of the members of a joint sphere.
            params: The tensors.
            sphere: Their spec.
            step: Steps made.

        Returns:
            One value for each sphere of the sample, or None if it is the first.
        """
        last, now = self._samples.get(name), _sample(params, sphere)
        self._samples[name] = _Sample(step, now)
        if last is None or [x.shape for x in last.weights] != [x.shape for x in now]:
            return None
        dtype = products.scalar_dtype(now[0].device)
        pairs = zip(last.weights, now, strict=True)
        turned = torch.cat([angle(old.to(dtype), new.to(dtype), "row") for old, new in pairs])
        return diffusive_angle(turned, step - last.step)


def _sample(params: list[Tensor], sphere: str) -> list[Tensor]:
    """Return some weights of some spheres of each piece, (spheres, weights)."""
    pieces = [spheres.split(p.detach(), sphere) for p in params]
    total = sum(x.numel() for xs in pieces for x in xs)
    kept = max(LEAST, total // SHARE)
    return [_some(list(piece), kept, total) for piece in zip(*pieces, strict=True)]


def _some(members: list[Tensor], kept: int, total: int) -> Tensor:
    """Return the share of one piece: few weights of many spheres, (spheres, weights)."""
    count, size = members[0].shape[0], sum(x[0].numel() for x in members)
    mine = max(1, kept * count * size // total)
    width = min(size, max(LEAST, mine // count))
    rows = slice(None, None, -(-count * width // max(mine, width)))
    # Each member by itself: putting them side by side first would copy all of them.
    parts = []
    for x in members:
        entries = x[rows].flatten(1)
        share = max(1, width * entries.shape[1] // size)
        parts.append(entries[:, _spread(entries.shape[1], share, x.device)])
    return torch.cat(parts, 1)


def _spread(count: int, wanted: int, device: torch.device) -> Tensor:
    """Return ``wanted`` different places of ``count``, as irregular as the golden ratio.

    A regular stride of 9 would see one corner of every 3x3 kernel.
    """
    stride = max(1, round(0.618 * count))
    while gcd(stride, count) > 1:
        stride += 1
    return torch.arange(wanted, device=device) * stride % count

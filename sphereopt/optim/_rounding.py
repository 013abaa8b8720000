"""How weights narrower than float32 are rounded after a step, and how much of it that costs.

bfloat16 keeps 8 bits: a step of less than 1/512 of an entry is rounded away. Three remedies:
nothing but a warning (``"nearest"``), rounding up or down at random so that the mean is right
(``"stochastic"``), and a float32 copy that is stepped and then rounded (``"master"``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from sphereopt.optim._warn import warn_user

__all__ = ["ROUNDINGS", "Rounding", "stochastic_round"]

ROUNDINGS = ("nearest", "stochastic", "master")


def stochastic_round(x: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    r"""Return x rounded to one of its two neighbours in a narrower dtype, right in the mean.

    .. math:: q\lfloor x/q + U\rfloor, \qquad U \sim \mathrm{Uniform}[0,1),

    with q the spacing of the narrow numbers at x.

    Args:
        x: float32 tensor.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        generator: Where the random numbers come from.

    Returns:
        A tensor of the dtype, of the shape of x. What is in range and representable stays exact.

    References:
        Revisiting BFloat16 Training, Zamirai et al., 2020, section 3.

    Example:
        >>> x = torch.full((10_000,), 1 + 2**-9)  # a quarter of bfloat16's spacing above 1
        >>> y = stochastic_round(x, torch.bfloat16, torch.Generator().manual_seed(0))
        >>> abs(float(y.float().mean() - x.mean())) < 2e-4
        True
    """
    info = torch.finfo(dtype)
    bits = -round(math.log2(info.eps))
    # Below float32's own normal range 2**-exponent overflows.
    smallest = max(round(math.log2(info.tiny)) - bits, -126)
    spacing = (torch.frexp(x).exponent - 1 - bits).clamp_min(smallest)
    noise = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    # Powers of two: these products are exact.
    return torch.ldexp(torch.floor(torch.ldexp(x, -spacing) + noise), spacing).to(dtype)


class Rounding:
    """The rounding of one group in one step.

    Random numbers do not come from torch's global generator, but from the step: a resumed run
    repeats them, replicas of a model draw the same ones, and dropout is not disturbed.

    Args:
        how: One of ``ROUNDINGS``.
        seed: Tells this step and group from others.
        watch: Measure how much of the step survives, where it is rounded to nearest.

    Attributes:
        kept: Parameter name and share of its step that survived, one scalar tensor each.
    """

    def __init__(self, how: str, seed: int, watch: bool) -> None:
        self.kept: list[tuple[str, Tensor]] = []
        self._how, self._seed, self._watch = how, seed, watch
        self._generators: dict[torch.device, torch.Generator] = {}

    def write(self, works: list[Tensor], homes: list[Tensor], names: Sequence[str]) -> None:
        """Round working weights into their homes.

        Args:
            works: float32 weights after the step.
            homes: The narrow weights before it, overwritten.
            names: The parameters they belong to.
        """
        if self._how == "stochastic":
            generator = self._generator(works[0].device)
            works = [stochastic_round(x, homes[0].dtype, generator) for x in works]
        if not self._watch or self._how != "nearest":
            torch._foreach_copy_(homes, works)
            return
        before = [home.to(work.dtype) for work, home in zip(works, homes, strict=True)]
        torch._foreach_copy_(homes, works)
        for name, old, work, home in zip(names, before, works, homes, strict=True):
            asked, made = work - old, home.to(work.dtype) - old
            self.kept.append((name, (made * asked).sum() / (asked * asked).sum()))

    @_disable_dynamo
    def warn(self) -> bool:
        """Warn of the first parameter that lost more than half of its step; return whether."""
        if not self.kept:
            return False
        for (name, _), share in zip(
            self.kept, torch.stack([x for _, x in self.kept]).tolist(), strict=True
        ):
            if share < 0.5:
                warn_user(
                    f"parameter {name!r} kept {share:.0%} of its step: the rest was below the "
                    "rounding of its dtype; use rounding='stochastic', rounding='master', or "
                    "float32 weights (this is said once, other parameters may do likewise)"
                )
                return True
        return False

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]

"""SkipInit: residual branches that start at nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["SkipInit"]


class SkipInit(nn.Module):
    r"""One learned gain at the end of a residual branch, which starts at 0.

    .. math:: y = x + \alpha\,f(x), \qquad \alpha_0 = 0

    Args:
        gain: Where :math:`\alpha` starts.
        device: Of ``gain``.
        dtype: Of ``gain``.

    Notes:
        At initialization the network is its skip connections, so variance neither grows nor
        shrinks with depth, whatever the branch does. At :math:`\alpha=0` the branch's own weights
        have no gradient; the gain has, and moves first. It replaces what a normalizer does for the
        signal at initialization, not what it does in training.

    References:
        Batch normalization biases residual blocks towards the identity function in deep networks,
        De and Smith, 2020.

    Example:
        >>> branch = torch.nn.Sequential(torch.nn.Linear(4, 4), SkipInit())
        >>> x = torch.randn(2, 4)
        >>> torch.equal(x + branch(x), x)
        True
    """

    def __init__(
        self,
        gain: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.initial_gain = gain
        # One entry, not a scalar: sharded training takes no parameters without dims.
        self.gain = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start over from the initial gain."""
        nn.init.constant_(self.gain, self.initial_gain)

    def forward(self, x: Tensor) -> Tensor:
        """Return the branch's output times the gain, of the same shape and dtype."""
        return x * self.gain.to(x.dtype)

    def extra_repr(self) -> str:
        """Return where the gain starts."""
        return f"gain={self.initial_gain}"

"""The network that is trained: three convolutions with BatchNorm."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

__all__ = ["WIDTHS", "build_model"]

WIDTHS = (8, 16, 32)
_STRIDES = (1, 2, 1)


def build_model(
    channels: int, classes: int, *, seed: int, dtype: torch.dtype, norm_eps: float
) -> nn.Sequential:
    """Return conv, BatchNorm, ReLU (three times), global average pooling, a linear head.

    The convolutions have no bias and feed BatchNorm, so each of their filters is scale-invariant.

    Args:
        channels: Channels of the images.
        classes: Outputs of the head.
        seed: Of the initial weights; torch's own generator is left as it was found.
        dtype: Of parameters and buffers. The same seed gives the same weights in any.
        norm_eps: The eps of the BatchNorm layers.

    Returns:
        The model, in training mode.

    Example:
        >>> net = build_model(1, 10, seed=0, dtype=torch.float64, norm_eps=1e-12)
        >>> net(torch.zeros(2, 1, 8, 8, dtype=torch.float64)).shape
        torch.Size([2, 10])
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        before = channels
        for i, (width, stride) in enumerate(zip(WIDTHS, _STRIDES, strict=True), 1):
            layers[f"conv{i}"] = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
            layers[f"norm{i}"] = nn.BatchNorm2d(width, eps=norm_eps)
            layers[f"relu{i}"] = nn.ReLU()
            before = width
        layers["pool"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        layers["head"] = nn.Linear(before, classes)
    return nn.Sequential(layers).to(dtype)

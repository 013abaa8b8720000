"""Points and vectors for the tests of geometry."""

from __future__ import annotations

import torch
from torch import Tensor

from sphereopt import geometry

# Ten or so float64 operations on numbers of order one.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
TRANSPORTS = ("project", "parallel", "rescale")


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def one(*entries: float) -> Tensor:
    return torch.tensor([entries], dtype=torch.float64)


def points(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return points of any norm, other points of the same norms, vectors tangent at the first."""
    w = 2 * normal(*shape)
    y = normal(*shape)
    y = y * (w.norm(dim=1) / y.norm(dim=1))[:, None]
    return w, y, geometry.tangent(w, normal(*shape), "row")

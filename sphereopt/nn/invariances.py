"""Which weights a normalizer makes scale-invariant, and at which granularity, as data.

For a layer ``y = W x (+ b)`` (a convolution is one for every position; a row of W is a filter) and
a normalizer behind it, or a normalization of W itself. The columns say what may be done to W, b and
x without changing the output, norm eps aside:

* ``sphere``: the finest set of weights that may be rescaled by a factor of its own;
* ``bias``: what a bias before the normalizer does: "removed", it changes nothing; "joint", it has
  to be rescaled together with the weights of its sphere; "apart", it comes after and has no part;
* ``shift``: which constant may be added to W, where positions do not matter (a linear layer);
* ``data``: whether x may be rescaled: "sample", each sample by a factor of its own; "batch", all by
  one; ``None``, not at all.

The table is checked row by row: ``find_spheres`` must find these spheres, and numbers the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, final

from torch import nn
from torch.nn.utils import parametrizations

from . import weights
from .batch_norms import L1BatchNorm2d, LInfBatchNorm2d, LpBatchNorm2d, TopKBatchNorm2d
from .evonorm import EvoNormB0, EvoNormS0
from .filter_response import FilterResponseNorm2d
from .group_norm import GroupNorm
from .variance_norm import VarianceNorm2d

__all__ = ["INVARIANCES", "Invariance"]

Sphere = Literal["row", "block", "tensor"]
Bias = Literal["removed", "joint", "apart"]
Shift = Literal["row", "all rows", "rows of a group"]
Data = Literal["sample", "batch"]
Unit = Callable[[nn.Module], nn.Module]

_MANIFOLDS = {
    "row": "oblique: a sphere per row",
    "block": "a sphere per group of rows",
    "tensor": "one sphere",
    None: "none",
}


@final
@dataclass(frozen=True)
class Invariance:
    """One row of the table.

    Attributes:
        name: of the normalizer.
        over: what its statistics run over.
        on: ``"conv"`` or ``"linear"``, the layer that ``unit`` takes.
        unit: puts a normalizer behind a layer, or on its weight: layer -> module.
        sphere: ``"row"``, ``"block"`` (the rows of one group), ``"tensor"``, or ``None``.
        bias: ``"removed"``, ``"joint"``, ``"apart"``, or ``None`` where no weight is invariant.
        shift: ``"row"``: a number of its own to every entry of a row; ``"all rows"``: one row
            vector to every row; ``"rows of a group"``: one per group; or ``None``.
        data: ``"sample"``, ``"batch"`` or ``None``.
    """

    name: str
    over: str
    on: Literal["conv", "linear"]
    unit: Unit
    sphere: Sphere | None = None
    bias: Bias | None = None
    shift: Shift | None = None
    data: Data | None = None

    @property
    def manifold(self) -> str:
        """The manifold an optimizer moves W on: a product of spheres, one sphere, or none."""
        return _MANIFOLDS[self.sphere]


def _behind(norm: Callable[[int], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """Return what puts ``norm(channels)`` behind a layer."""

    def unit(layer: nn.Module) -> nn.Module:
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        return nn.Sequential(layer, norm(weight.shape[0]))

    return unit


_BATCH = "batch and space, per channel"
_SPACE = "space, per sample and channel"
_GROUP = "a group of channels (and space), per sample"
_ALL = "features, per sample"
_ROW = "weights of a row"
_GROUP_SHIFT: Shift = "rows of a group"


def _over_the_batch() -> Iterator[Invariance]:
    removing: dict[str, Callable[[int], nn.Module]] = {
        "BatchNorm": nn.BatchNorm2d,
        "L1BatchNorm": L1BatchNorm2d,
        "LInfBatchNorm": LInfBatchNorm2d,
        "TopKBatchNorm": TopKBatchNorm2d,
        "LpBatchNorm": partial(LpBatchNorm2d, p=3),
    }
    keeping: dict[str, Callable[[int], nn.Module]] = {
        "VarianceNorm": VarianceNorm2d,
        "EvoNormB0": EvoNormB0,
    }
    for name, norm in removing.items():
        yield Invariance(name, _BATCH, "conv", _behind(norm), "row", "removed", None, "batch")
    for name, norm in keeping.items():
        yield Invariance(name, _BATCH, "conv", _behind(norm), "row", "joint", None, "batch")


def _over_a_sample() -> Iterator[Invariance]:
    unit = _behind(nn.InstanceNorm2d)
    yield Invariance("InstanceNorm", _SPACE, "conv", unit, "row", "removed", None, "sample")
    unit = _behind(FilterResponseNorm2d)
    yield Invariance("FilterResponseNorm", _SPACE, "conv", unit, "row", "joint", None, "sample")
    unit, shift = _behind(partial(GroupNorm, groups=2)), _GROUP_SHIFT
    yield Invariance("GroupNorm", _GROUP, "linear", unit, "block", "joint", shift, "sample")
    unit = _behind(nn.LayerNorm)
    yield Invariance("LayerNorm", _ALL, "linear", unit, "tensor", "joint", "all rows", "sample")
    unit = _behind(nn.RMSNorm)
    yield Invariance("RMSNorm", _ALL, "linear", unit, "tensor", "joint", None, "sample")
    yield Invariance("EvoNormS0", _GROUP, "conv", _behind(partial(EvoNormS0, groups=2)))


def _over_weights() -> Iterator[Invariance]:
    units: dict[Unit, Shift | None] = {
        weights.weight_norm: None,
        weights.bounded_weight_norm: None,
        weights.centered_weight_norm: "row",
        weights.scaled_weight_standardization: "row",
    }
    for unit, shift in units.items():
        name = getattr(unit, "__name__", "")
        yield Invariance(name, _ROW, "linear", unit, "row", "apart", shift)
    unit = parametrizations.spectral_norm
    yield Invariance("spectral_norm", "singular values of W", "linear", unit, "tensor", "apart")


INVARIANCES: dict[str, Invariance] = {
    row.name: row for row in (*_over_the_batch(), *_over_a_sample(), *_over_weights())
}
"""The rows by name."""

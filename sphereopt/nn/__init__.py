"""Normalization layers and weight parametrizations of three papers, and how to swap them.

*Norm matters*: L1, L-infinity, top-k and Lp batch norms, bounded weight normalization. *Beyond
BatchNorm*: variance norm, filter response norm, EvoNorms, group norm by size, weight norm, scaled
weight standardization, SkipInit. *New interpretations of normalization methods*: standardization
as a map onto a sphere, and the table of what is invariant to what. Batch, layer and instance norm
are torch's own.
"""

from sphereopt.nn import functional as functional
from sphereopt.nn.batch_norms import (
    L1BatchNorm1d,
    L1BatchNorm2d,
    L1BatchNorm3d,
    LInfBatchNorm1d,
    LInfBatchNorm2d,
    LInfBatchNorm3d,
    LpBatchNorm1d,
    LpBatchNorm2d,
    LpBatchNorm3d,
    TopKBatchNorm1d,
    TopKBatchNorm2d,
    TopKBatchNorm3d,
)
from sphereopt.nn.convert import Conversion, Swap, convert_norm
from sphereopt.nn.evonorm import EvoNormB0, EvoNormS0
from sphereopt.nn.filter_response import (
    TLU,
    FilterResponseNorm1d,
    FilterResponseNorm2d,
    FilterResponseNorm3d,
)
from sphereopt.nn.group_norm import GroupNorm
from sphereopt.nn.invariances import INVARIANCES, Invariance
from sphereopt.nn.rectifiers import ScaledReLU, TranslatedReLU
from sphereopt.nn.skip_init import SkipInit
from sphereopt.nn.sphere_map import standardize
from sphereopt.nn.variance_norm import VarianceNorm1d, VarianceNorm2d, VarianceNorm3d
from sphereopt.nn.weights import (
    bounded_weight_norm,
    centered_weight_norm,
    scaled_weight_standardization,
    weight_norm,
)

__all__ = [
    "INVARIANCES",
    "TLU",
    "Conversion",
    "EvoNormB0",
    "EvoNormS0",
    "FilterResponseNorm1d",
    "FilterResponseNorm2d",
    "FilterResponseNorm3d",
    "GroupNorm",
    "Invariance",
    "L1BatchNorm1d",
    "L1BatchNorm2d",
    "L1BatchNorm3d",
    "LInfBatchNorm1d",
    "LInfBatchNorm2d",
    "LInfBatchNorm3d",
    "LpBatchNorm1d",
    "LpBatchNorm2d",
    "LpBatchNorm3d",
    "ScaledReLU",
    "SkipInit",
    "Swap",
    "TopKBatchNorm1d",
    "TopKBatchNorm2d",
    "TopKBatchNorm3d",
    "TranslatedReLU",
    "VarianceNorm1d",
    "VarianceNorm2d",
    "VarianceNorm3d",
    "bounded_weight_norm",
    "centered_weight_norm",
    "convert_norm",
    "functional",
    "scaled_weight_standardization",
    "standardize",
    "weight_norm",
]

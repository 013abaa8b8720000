"""The functions behind the layers, without parameters or running averages of their own."""

from sphereopt.nn._rows import normalized_rows
from sphereopt.nn.batch_norm_functions import (
    l1_batch_norm,
    linf_batch_norm,
    lp_batch_norm,
    topk_batch_norm,
)
from sphereopt.nn.evonorm import evonorm_b0, evonorm_s0
from sphereopt.nn.filter_response import filter_response_norm
from sphereopt.nn.group_norm import group_norm
from sphereopt.nn.rectifiers import scaled_relu
from sphereopt.nn.sphere_map import (
    standardize,
    standardize_jacobian,
    standardize_null,
    standardize_pullback,
    standardize_radius,
)
from sphereopt.nn.variance_norm import variance_norm

__all__ = [
    "evonorm_b0",
    "evonorm_s0",
    "filter_response_norm",
    "group_norm",
    "l1_batch_norm",
    "linf_batch_norm",
    "lp_batch_norm",
    "normalized_rows",
    "scaled_relu",
    "standardize",
    "standardize_jacobian",
    "standardize_null",
    "standardize_pullback",
    "standardize_radius",
    "topk_batch_norm",
    "variance_norm",
]

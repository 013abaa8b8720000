"""Small networks with the layers of ``sphereopt.nn``, of known answer; derived by hand."""

import math

from detection_zoo import conv_norm, image, rows, seq
from detection_zoo_full import Case, joint
from torch import nn

import sphereopt.nn as so_nn

W, B = "0.weight", "0.bias"
V, G = "0.parametrizations.weight.original1", "0.parametrizations.weight.original0"
ALONE = "0.parametrizations.weight.original"
ROW = {W: "row"}


def conv_then(*parts, bias=False, n=6):
    return lambda: conv_norm(*parts, nn.ReLU(), bias=bias, n=n)


def linear(normalize, **options):
    def build():
        return seq(normalize(nn.Linear(8, 6), **options), nn.Tanh(), nn.Linear(6, 2))

    return build


def bounded(**options):
    return linear(so_nn.bounded_weight_norm, **options)


NORMS = {
    # The mean is subtracted, and a bias with it.
    "l1_bn": Case(conv_then(so_nn.L1BatchNorm2d(6)), image, ROW),
    "l1_bn_bias": Case(conv_then(so_nn.L1BatchNorm2d(6), bias=True), image, ROW, inert=(B,)),
    "linf_bn_bias": Case(conv_then(so_nn.LInfBatchNorm2d(6), bias=True), image, ROW, inert=(B,)),
    "topk_bn_bias": Case(conv_then(so_nn.TopKBatchNorm2d(6), bias=True), image, ROW, inert=(B,)),
    "l3_bn_bias": Case(conv_then(so_nn.LpBatchNorm2d(6, p=3), bias=True), image, ROW, inert=(B,)),
    "topk_bn_gaussian": Case(
        conv_then(so_nn.TopKBatchNorm2d(6, k=4, constants="gaussian")), image, ROW
    ),
    # The mean stays: a bias is rescaled with its filter.
    "vn": Case(conv_then(so_nn.VarianceNorm2d(6)), image, ROW),
    "vn_bias": Case(conv_then(so_nn.VarianceNorm2d(6), bias=True), image, joint(W, B, spec="row")),
    "frn_tlu": Case(conv_then(so_nn.FilterResponseNorm2d(6), so_nn.TLU(6)), image, ROW),
    "frn_bias": Case(
        conv_then(so_nn.FilterResponseNorm2d(6), bias=True), image, joint(W, B, spec="row")
    ),
    # A learned eps does not tend to zero.
    "frn_learned_eps": Case(
        conv_then(so_nn.FilterResponseNorm2d(6, eps=1e-3, learnable_eps=True)), image, {}
    ),
    # x sigmoid(v x) has no degree; the maximum of two standard deviations has.
    "evonorm_s0": Case(conv_then(so_nn.EvoNormS0(6, groups=2)), image, {}),
    "evonorm_b0": Case(conv_then(so_nn.EvoNormB0(6)), image, ROW),
    "evonorm_b0_bias": Case(
        conv_then(so_nn.EvoNormB0(6), bias=True), image, joint(W, B, spec="row")
    ),
    "gn_unbiased": Case(
        conv_then(so_nn.GroupNorm(8, group_size=4, unbiased=True), n=8), image, {W: "block:2"}
    ),
    "skip_init": Case(
        conv_then(so_nn.SkipInit(0.5), so_nn.L1BatchNorm2d(6)),
        image,
        ROW,
    ),
    "bounded_weight_norm": Case(bounded(), rows, {ALONE: "row"}),
    "bounded_weight_norm_l1": Case(bounded(p=1), rows, {ALONE: "row"}),
    "bounded_weight_norm_linf": Case(bounded(p=math.inf), rows, {ALONE: "row"}),
    # Only the ratios of bounded gains count.
    "bounded_gains": Case(bounded(gains="bounded"), rows, {V: "row", G: "tensor"}),
    "paper_weight_norm": Case(linear(so_nn.weight_norm), rows, {V: "row"}),
    "centered_weight_norm": Case(linear(so_nn.centered_weight_norm), rows, {V: "row"}),
    "scaled_ws": Case(linear(so_nn.scaled_weight_standardization), rows, {V: "row"}),
}

"""More small networks of known answer, in full: joint spheres, gains, what is inert, and why not.

Here layers and convolutions. Every expectation is derived by hand, not read off the detector; the
comments say how where it is not obvious.
"""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from detection_zoo import (
    BN,
    BN1,
    LN,
    Net,
    conv,
    conv_norm,
    head,
    image,
    lin_norm,
    residual,
    rows,
    seq,
    tied_autoencoder,
)
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations


class Case(NamedTuple):
    """A network and all that is true about its parameters; what is not named has no sphere."""

    build: Callable
    data: Callable  # returns a tensor, a tuple of inputs or a dict of keywords
    spheres: dict  # the exact ``report.spheres``
    inert: tuple = ()
    numerical: dict = {}
    reasons: dict = {}  # name -> a part of the reason
    loss: Callable | None = None
    coarser: dict = {}  # name -> why the finest partition is not reported


def lin(i=8, o=6, bias=False):
    return nn.Linear(i, o, bias=bias)


def changed(model, change):
    change(model)
    return model


def param(*shape):
    return nn.Parameter(torch.randn(shape))


def joint(*names, spec="tensor"):
    return {names: spec}


def own(layer="0"):
    """The names of a weight and its bias."""
    return f"{layer}.weight", f"{layer}.bias"


def relu_block(bias):
    return seq(conv(bias=bias), nn.ReLU(), BN(6), head(6))


def two_blocks(second, n=6, first=None, inplace=False, middle=None):
    """A norm whose gain and bias reach the next norm through a ReLU and one layer."""
    first, middle = first or BN(n), middle or BN(n)
    relu, end = nn.ReLU(inplace), (middle, nn.Tanh(), head(n))
    return seq(conv(o=n), first, relu, second, relu, *end)


def rezero():
    def forward(s, x):
        return s.h(x + s.alpha * F.relu(s.c(x)))

    gate = nn.Parameter(torch.zeros(1))
    return Net(forward, c=conv(4, 4, padding=1, bias=True), alpha=gate, h=head(4))


def squeeze_excite():
    def forward(s, x):
        y = s.bn(s.c(x))
        gate = torch.sigmoid(s.fc2(F.relu(s.fc1(y.mean((2, 3), keepdim=True)))))
        return s.h(F.relu(s.bn2(s.pw(y * gate))))

    parts = {"c": conv(), "bn": BN(6), "fc1": conv(6, 3, 1, True), "fc2": conv(3, 6, 1, True)}
    return Net(forward, **parts, pw=conv(6, 4, 1), bn2=BN(4), h=head(4))


def excited_before_norm():
    def forward(s, x):
        y = s.c(x)
        return s.h(s.bn(y * torch.sigmoid(s.fc(y.mean((2, 3), keepdim=True)))))

    return Net(forward, c=conv(), fc=conv(6, 6, 1, True), bn=BN(6), h=head(6))


def branches(each_normed, bias=False):
    def forward(s, x):
        a, b = s.a(x), s.b(x)
        y = s.bn(a) + s.bn2(b) if each_normed else s.bn(F.relu(a + b))
        return s.h(torch.tanh(y))

    parts = {"a": conv(3, 4, 3, bias, padding=1), "b": conv(3, 4, 1, bias), "bn": BN(4)}
    return Net(forward, **parts, **({"bn2": BN(4)} if each_normed else {}), h=head(4))


def weight_standardized(gain):
    def forward(s, x):
        mean, var = s.w.mean((1, 2, 3), True), s.w.var((1, 2, 3), keepdim=True)
        w = (s.w - mean) * torch.rsqrt(var + 1e-6)
        w = w * s.gain[:, None, None, None] if gain else w
        return s.h(F.relu(F.conv2d(x, w, s.b)))

    parts = {"w": param(6, 3, 3, 3), "b": param(6), "h": head(6)}
    return Net(forward, **parts, **({"gain": param(6)} if gain else {}))


def hooked(norm):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and in many checkpoints
        return seq(norm(nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 2))


def manual_bn(bias):
    def forward(s, x):
        y = s.f(x)
        return s.h(F.relu((y - y.mean(0)) / (y.std(0) + 1e-5)))

    return Net(forward, f=lin(bias=bias), h=lin(6, 2, True))


def response_norm():
    """Filter response normalization with its learned threshold."""

    def forward(s, x):
        y = s.c(x)
        y = y * torch.rsqrt(y.square().mean((2, 3), keepdim=True) + 1e-6)
        return s.h(torch.maximum(s.g * y + s.b, s.tau))

    parts = {name: param(1, 6, 1, 1) for name in ("g", "b", "tau")}
    return Net(forward, c=conv(), **parts, h=head(6))


def global_filter():
    def forward(s, x):
        y = torch.fft.rfft2(x) * torch.view_as_complex(s.w)
        return s.h(F.relu(s.bn(torch.fft.irfft2(y, s=x.shape[-2:]))))

    return Net(forward, w=param(3, 7, 4, 2), bn=BN(3), h=head(3))


def dense_layer():
    def forward(s, x):
        y = torch.cat([x, s.c(F.relu(s.n1(x)))], 1)
        return s.h(s.c2(F.relu(s.n2(y))))

    parts = {"n1": BN(3), "c": conv(3, 4, padding=1), "n2": BN(7), "c2": conv(7, 4), "h": head(4)}
    return Net(forward, **parts)


def linear_net(function, **parts):
    return Net(function, f=lin(), **parts, h=lin(6, 2, True))


def lora(after):
    def forward(s, x):
        return s.h(after(s.base(x) + s.b(s.a(x))))

    model = Net(forward, base=lin(8, 8, True), a=lin(8, 2), b=lin(2, 8), h=lin(8, 2, True))
    return changed(model, lambda m: nn.init.zeros_(m.b.weight))


def conv1d():
    return seq(nn.Conv1d(3, 6, 3), BN1(6), nn.Flatten(), lin(30, 2))


def bilinear():
    return Net(
        lambda s, x, y: s.h(F.relu(s.n(s.f(x, y)))), f=nn.Bilinear(8, 8, 6), n=BN1(6), h=lin(6, 2)
    )


ROW, TENSOR = {"0.weight": "row"}, {"0.weight": "tensor"}
BOTH_ROW, BOTH = joint(*own(), spec="row"), joint(*own())
GAIN = joint("1.weight", "1.bias")
BLOCKS_2 = {"0.weight": "block:2"}


def four():
    return image(4)


# A norm takes away a constant per channel; only what it normalizes together must scale alike.
BIASES = {
    "conv_bias_bn": Case(
        lambda: conv_norm(BN(6), nn.ReLU(), bias=True),
        *(image, ROW, ("0.bias",)),
        reasons={"1.weight": "output", "3.2.bias": "output"},
    ),
    "conv_bias_pool_bn": Case(
        lambda: conv_norm(nn.MaxPool2d(2), BN(6), bias=True), image, ROW, ("0.bias",)
    ),
    "conv_bias_in": Case(
        lambda: conv_norm(nn.InstanceNorm2d(6), nn.ReLU(), bias=True), image, ROW, ("0.bias",)
    ),
    "linear_bias_bn": Case(lambda: lin_norm(BN1(6), nn.ReLU(), bias=True), rows, ROW, ("0.bias",)),
    "conv1d_bias_bn": Case(conv1d, lambda: torch.randn(4, 3, 7), ROW, ("0.bias",)),
    "manual_bn": Case(lambda: manual_bn(False), rows, {"f.weight": "row"}),
    "manual_bn_bias": Case(lambda: manual_bn(True), rows, {"f.weight": "row"}, ("f.bias",)),
    "conv_bias_relu_bn": Case(lambda: relu_block(True), image, BOTH_ROW),
    "linear_bias_ln": Case(lambda: lin_norm(LN(6), nn.GELU(), bias=True), rows, BOTH),
    "zero_bias_relu_ln": Case(
        lambda: changed(lin_norm(nn.ReLU(), LN(6), bias=True), lambda m: nn.init.zeros_(m[0].bias)),
        *(rows, BOTH),
    ),
    "conv_bias_gn": Case(
        lambda: conv_norm(nn.GroupNorm(4, 8), bias=True, n=8),
        *(image, joint(*own(), spec="block:4")),
    ),
    "bias_dropout_ln": Case(lambda: lin_norm(nn.Dropout(0.3), LN(6), bias=True), rows, BOTH),
    # The mask keeps the bias from being a constant of the channel.
    "bias_dropout_bn": Case(lambda: lin_norm(nn.Dropout(0.3), BN1(6), bias=True), rows, BOTH_ROW),
    "dead_channel": Case(
        lambda: changed(relu_block(True), lambda m: m[0].bias.data[2].fill_(-100.0)),
        *(image, BOTH_ROW),
    ),
    # Here the ReLU is linear, and the weight alone passes any local test; not a factor of 1000.
    "relu_always_on": Case(
        lambda: changed(relu_block(True), lambda m: nn.init.constant_(m[0].bias, 30.0)),
        *(image, BOTH_ROW),
    ),
    # 0.weight + 2.weight = 2.bias in degrees: the layer used last gets the bias.
    "two_biases_ln": Case(
        lambda: seq(lin(bias=True), nn.ReLU(), lin(6, 5, True), LN(5), nn.Tanh(), lin(5, 2)),
        *(rows, joint(*own("2"))),
        reasons={"0.weight": "LayerNorm normalizes together do not scale alike"},
    ),
    "transposed_bias_relu_bn": Case(
        lambda: seq(nn.ConvTranspose2d(3, 6, 3), nn.ReLU(), BN(6), head(6)),
        *(image, joint(*own(), spec="col")),
    ),
    # A column feeds one channel of each group, so this is coarser than what holds, and true.
    "grouped_transposed_bn": Case(
        lambda: seq(nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), BN(6), nn.ReLU(), head(6)),
        *(four, {"0.weight": "col"}),
    ),
    "grouped_transposed_bias": Case(
        lambda: seq(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.ReLU(), BN(6), head(6)), four, BOTH
    ),
}

# A gain and its bias are homogeneous together, and so is what a ReLU makes of them.
GAINS = {
    "residual": Case(
        lambda: residual(False),
        *(four, {"c1.weight": "row", **joint("b1.weight", "b1.bias"), "c2.weight": "row"}),
    ),
    "residual_zero_gain": Case(
        lambda: residual(True),
        *(four, {"c1.weight": "row", **joint("b1.weight", "b1.bias"), "c2.weight": "row"}),
    ),
    "gain_conv_bn": Case(lambda: two_blocks(conv(6, 6)), image, {**ROW, **GAIN, "3.weight": "row"}),
    "gain_conv_bn_inplace": Case(
        lambda: two_blocks(conv(6, 6), inplace=True), image, {**ROW, **GAIN, "3.weight": "row"}
    ),
    "gain_depthwise_bn": Case(
        lambda: two_blocks(conv(6, 6, groups=6)),
        *(image, {**ROW, **joint(*own("1"), spec="row"), "3.weight": "row"}),
    ),
    "gain_depthwise_in": Case(
        lambda: two_blocks(
            conv(6, 6, groups=6), 6, nn.InstanceNorm2d(6, affine=True), False, nn.InstanceNorm2d(6)
        ),
        *(image, {**ROW, **joint(*own("1"), spec="row"), "3.weight": "row"}),
    ),
    "gain_depthwise_gn": Case(
        lambda: two_blocks(conv(8, 8, groups=8), 8, nn.GroupNorm(2, 8), False, nn.GroupNorm(2, 8)),
        *(image, {**BLOCKS_2, **joint(*own("1"), spec="block:2"), "3.weight": "block:2"}),
    ),
    "gain_conv_gn": Case(
        lambda: two_blocks(conv(8, 8), 8, nn.GroupNorm(2, 8), False, nn.GroupNorm(4, 8)),
        *(image, {**BLOCKS_2, **GAIN, "3.weight": "block:4"}),
    ),
    "ln_linear_ln": Case(
        lambda: seq(LN(8, bias=False), lin(), LN(6), nn.Tanh(), lin(6, 2)),
        *(rows, {**TENSOR, "1.weight": "tensor"}),
    ),
    "rms_relu_mlp_bn": Case(
        lambda: seq(nn.RMSNorm(8), lin(), nn.ReLU(), lin(6, 5), BN1(5), nn.Tanh(), lin(5, 2)),
        *(rows, {**TENSOR, "1.weight": "tensor", "3.weight": "row"}),
    ),
    # The bias of the linear layer goes with its own weight, as that is used last.
    "ln_linear_bias_ln": Case(
        lambda: seq(LN(8), lin(bias=True), LN(6), nn.Tanh(), lin(6, 2)), rows, GAIN
    ),
    # The bias of the first norm is a constant of the channels of the second.
    "ln_linear_bias_bn": Case(
        lambda: seq(LN(8), lin(bias=True), BN1(6), nn.Tanh(), lin(6, 2)),
        *(rows, {**TENSOR, "1.weight": "row"}, ("0.bias", "1.bias")),
    ),
    "ln_ln": Case(lambda: lin_norm(LN(6), LN(6), nn.GELU()), rows, {**TENSOR, **GAIN}),
    # Each entry of the gain could go alone, but then has no direction: pairs are the finest.
    "bn_bn": Case(
        lambda: conv_norm(BN(6), BN(6), nn.ReLU()),
        image,
        {**ROW, "1.weight": "block:3"},
        own("1")[1:],
    ),
    "no_affine_ln": Case(
        lambda: lin_norm(LN(6, elementwise_affine=False), nn.GELU()), rows, TENSOR
    ),
    "no_affine_bn": Case(lambda: conv_norm(BN(6, affine=False), nn.ReLU()), image, ROW),
    "no_statistics_bn": Case(
        lambda: conv_norm(BN(6, track_running_stats=False), nn.ReLU()), image, ROW
    ),
    "response_norm": Case(response_norm, image, {"c.weight": "row"}),
}

BLOCKS = {
    "rezero": Case(rezero, four, {}, reasons={"c.weight": "a sum with something"}),
    "squeeze_excite": Case(
        squeeze_excite,
        image,
        {"c.weight": "row", "pw.weight": "row"},
        reasons={"bn.weight": "sigmoid"},
    ),
    "excited_before_norm": Case(
        excited_before_norm, image, {}, reasons={"c.weight": "sigmoid", "fc.weight": "sigmoid"}
    ),
    "repvgg_sum": Case(lambda: branches(False), image, joint("a.weight", "b.weight", spec="row")),
    "repvgg_sum_biases": Case(
        lambda: branches(False, bias=True),
        *(image, joint("a.weight", "a.bias", "b.weight", "b.bias", spec="row")),
    ),
    "repvgg": Case(lambda: branches(True), image, {"a.weight": "row", "b.weight": "row"}),
    # Concatenated with the input, which does not scale, but normalized channel by channel.
    "dense_layer": Case(dense_layer, image, {**joint("n1.weight", "n1.bias"), "c.weight": "row"}),
    "weight_standardized": Case(lambda: weight_standardized(False), image, {"w": "row"}),
    "weight_standardized_gain": Case(lambda: weight_standardized(True), image, {"w": "row"}),
    "weight_norm": Case(
        lambda: seq(parametrizations.weight_norm(lin(bias=True)), nn.ReLU(), lin(6, 2)),
        *(rows, {"0.parametrizations.weight.original1": "row"}),
    ),
    "weight_norm_hook": Case(lambda: hooked(nn.utils.weight_norm), rows, {"0.weight_v": "row"}),
    "spectral_norm": Case(
        lambda: seq(parametrizations.spectral_norm(lin(bias=True)), nn.ReLU(), lin(6, 2)),
        *(rows, {"0.parametrizations.weight.original": "tensor"}),
    ),
    "spectral_norm_hook": Case(
        lambda: hooked(nn.utils.spectral_norm), rows, {"0.weight_orig": "tensor"}
    ),
    "global_filter": Case(global_filter, image, {"w": "row"}),
    "bilinear": Case(
        *(bilinear, lambda: (rows(), rows()), {"f.weight": "row"}, ("f.bias",)),
    ),
    "glu_bn": Case(
        lambda: lin_norm(nn.GLU(), BN1(3), lin(3, 6), bias=True),
        *(rows, joint(*own(), spec="row@0:3")),
    ),
    "sum_normalized": Case(
        lambda: linear_net(lambda s, x: s.h((y := F.relu(s.f(x))) / (y.sum(-1, True) + 1e-6))),
        *(rows, {"f.weight": "tensor"}),
    ),
    "lora_gelu": Case(lambda: lora(F.gelu), rows, {}, reasons={"a.weight": "a sum with something"}),
    # base = a + b in degrees; b is used after a.
    "lora_ln": Case(
        lambda: lora(lambda y: F.layer_norm(y, (8,))),
        *(rows, joint("base.weight", "base.bias", "b.weight")),
    ),
    "zero_head": Case(
        lambda: changed(
            seq(lin(bias=True), nn.GELU(), lin(6, 2, True)), lambda m: nn.init.zeros_(m[2].weight)
        ),
        *(rows, {}),
        reasons={"0.weight": "GELU", "2.weight": "output"},
    ),
    "tied_autoencoder": Case(tied_autoencoder, rows, {}, reasons={"w": "output"}),
}

"""Small networks of known answer: which of their parameters are on spheres, and how."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations


class Net(nn.Module):
    """A module from a function of (self, inputs) and named parts."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs):
        return self.function(self, *inputs)


class UpcastRMS(nn.Module):
    """As in Llama: computes in float32 whatever the input."""

    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.tiny = (
            1e-6  # a name that says nothing: only the addition itself shows that it is an eps
        )
        self.upcast = torch.float32

    def forward(self, x):
        h = x.to(self.upcast)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.tiny)
        return self.weight * h.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.qn, self.kn = (nn.RMSNorm(4), nn.RMSNorm(4)) if norm else (nn.Identity(),) * 2

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.qn(q), self.kn(k), v)
        return self.o(y.transpose(1, 2).flatten(2))


def head(n):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, 2))


def seq(*parts):
    return nn.Sequential(*parts)


def conv(i=3, o=6, k=3, bias=False, **kw):
    return nn.Conv2d(i, o, k, bias=bias, **kw)


def image(channels=3):
    return torch.randn(4, channels, 7, 7)


def rows():
    return torch.randn(8, 8)


def tokens():
    return torch.randn(3, 5, 8)


def frozen_bn():
    model = seq(conv(), nn.BatchNorm2d(6), nn.ReLU(), head(6))
    model[1].eval()
    return model


def residual(zero_gain):
    def forward(s, x):
        return s.h(F.relu(x + s.b2(s.c2(F.relu(s.b1(s.c1(x)))))))

    c1, c2 = (conv(4, 4, padding=1) for _ in range(2))
    model = Net(forward, c1=c1, b1=nn.BatchNorm2d(4), c2=c2, b2=nn.BatchNorm2d(4), h=head(4))
    if zero_gain:
        nn.init.zeros_(model.b2.weight)
    return model


def standardized():
    def forward(s, x):
        mean = s.w.mean((1, 2, 3), keepdim=True)
        var = s.w.var((1, 2, 3), keepdim=True)
        return s.h(F.relu(F.conv2d(x, (s.w - mean) * torch.rsqrt(var + s.tiny))))

    return Net(forward, w=nn.Parameter(torch.randn(6, 3, 3, 3)), h=head(6), tiny=1e-6)


def manual_bn():
    def forward(s, x):
        y = s.f(x)
        return s.h(torch.tanh((y - y.mean(0)) / (y.std(0) + s.tiny)))

    return Net(forward, f=nn.Linear(8, 6), h=nn.Linear(6, 2), tiny=1e-5)


def tied_convs():
    c = conv(4, 4, padding=1)
    return seq(c, nn.BatchNorm2d(4), nn.ReLU(), c, nn.BatchNorm2d(4), nn.ReLU(), head(4))


def tied_autoencoder():
    def forward(s, x):
        return F.linear(F.relu(s.bn(F.linear(x, s.w))), s.w.t())

    return Net(forward, w=nn.Parameter(torch.randn(6, 8)), bn=nn.BatchNorm1d(6))


def transformer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False)


def swiglu():
    def forward(s, x):
        return s.h(x + s.n(s.down(F.silu(s.gate(x)) * s.up(x))))

    lin = {n: nn.Linear(8, 12, bias=False) for n in ("gate", "up")}
    return Net(forward, **lin, down=nn.Linear(12, 8, bias=False), n=UpcastRMS(8), h=nn.Linear(8, 2))


def lora():
    def forward(s, x):
        return s.h(F.gelu(s.base(x) + s.b(s.a(x))))

    parts = {"base": nn.Linear(8, 8), "a": nn.Linear(8, 2), "b": nn.Linear(2, 8, bias=False)}
    nn.init.zeros_(parts["b"].weight)
    return Net(forward, **parts, h=nn.Linear(8, 2))


def layerscale():
    def forward(s, x):
        return s.h(s.n(x + s.g * s.f(x)))

    gain = nn.Parameter(1e-6 * torch.ones(8))
    return Net(forward, f=nn.Linear(8, 8), g=gain, n=nn.LayerNorm(8), h=nn.Linear(8, 2))


def cosine_head():
    def forward(s, x):
        x, w = F.normalize(s.f(x), eps=s.eps), F.normalize(s.w, eps=s.eps)
        return s.scale * F.linear(x, w)

    f, w = nn.Linear(8, 6, bias=False), nn.Parameter(torch.randn(3, 6))
    return Net(forward, f=f, w=w, scale=nn.Parameter(torch.tensor(10.0)), eps=1e-12)


def tapped():
    def forward(s, x):
        y = s.c(x)
        return s.h(F.relu(s.bn(y))), {"tap": y.mean((2, 3))}

    return Net(forward, c=conv(), bn=nn.BatchNorm2d(6), h=head(6))


def concat():
    def forward(s, x):
        return s.h(F.relu(s.bn(torch.cat([s.a(x), s.b(x)], 1))))

    return Net(forward, a=conv(o=4), b=conv(o=2), bn=nn.BatchNorm2d(6), h=head(6))


def conv_norm(*parts, bias=False, n=6):
    return seq(conv(bias=bias, o=n), *parts, head(n))


def lin_norm(*parts, bias=False):
    return seq(nn.Linear(8, 6, bias=bias), *parts, nn.Linear(6, 2))


BN, BN1, LN = nn.BatchNorm2d, nn.BatchNorm1d, nn.LayerNorm

# name: (model, input, the parameters on spheres; every other parameter has none)
CASES = {
    "conv_bn": (lambda: conv_norm(BN(6), nn.ReLU()), image, {"0.weight": "row"}),
    "conv_bias_bn": (lambda: conv_norm(BN(6), nn.ReLU(), bias=True), image, {"0.weight": "row"}),
    "conv_frozen_bn": (frozen_bn, image, {}),
    "conv_relu_bn": (lambda: conv_norm(nn.ReLU(), BN(6)), image, {"0.weight": "row"}),
    "conv_bias_relu_bn": (lambda: conv_norm(nn.ReLU(), BN(6), bias=True), image, {}),
    "conv_silu_bn": (lambda: conv_norm(nn.SiLU(), BN(6)), image, {}),
    "conv_bias_maxpool_bn": (
        lambda: conv_norm(nn.MaxPool2d(2), BN(6), bias=True),
        image,
        {"0.weight": "row"},
    ),
    "conv_prelu_pool_bn": (
        lambda: conv_norm(nn.PReLU(6), nn.AvgPool2d(2), BN(6)),
        image,
        {"0.weight": "row"},
    ),
    "conv_relu6_bn": (lambda: conv_norm(nn.ReLU6(), BN(6)), image, {}),
    "conv_hardtanh_in": (
        lambda: conv_norm(nn.Hardtanh(-9, 9), nn.InstanceNorm2d(6), nn.ReLU()),
        image,
        {},
    ),
    "conv_in": (
        lambda: conv_norm(nn.InstanceNorm2d(6), nn.ReLU(), bias=True),
        image,
        {"0.weight": "row"},
    ),
    "conv_gn": (lambda: conv_norm(nn.GroupNorm(2, 8), n=8), image, {"0.weight": "block:2"}),
    "conv_bias_gn": (lambda: conv_norm(nn.GroupNorm(2, 8), bias=True, n=8), image, {}),
    "shuffle_gn": (
        lambda: conv_norm(nn.ChannelShuffle(4), nn.GroupNorm(2, 8), n=8),
        image,
        {"0.weight": "tensor"},
    ),
    "depthwise_bn": (
        lambda: seq(conv(6, 6, groups=6), BN(6), nn.ReLU6(), head(6)),
        lambda: image(6),
        {"0.weight": "row"},
    ),
    "depthwise_pointwise_bn": (
        lambda: seq(conv(6, 6, groups=6), conv(6, 4, 1), BN(4), head(4)),
        lambda: image(6),
        {"0.weight": "tensor", "1.weight": "row"},
    ),
    "depthwise_1x1_gn": (  # a row has one entry
        lambda: seq(conv(6, 6, 1, groups=6), nn.GroupNorm(2, 6), nn.ReLU(), head(6)),
        lambda: image(6),
        {"0.weight": "block:2"},
    ),
    "linear_chain_bn": (  # its biases cost digits when all of it is scaled by 1e-3
        lambda: seq(
            conv(3, 4, 2), conv(4, 4, 2, True), conv(4, 4, 2, True), BN(4), nn.ReLU(), head(4)
        ),
        image,
        {"0.weight": "tensor", "1.weight": "tensor", "2.weight": "row"},
    ),
    "grouped_bn": (
        lambda: seq(conv(6, 8, groups=2), BN(8), nn.ReLU(), head(8)),
        lambda: image(6),
        {"0.weight": "row"},
    ),
    "transposed_bn": (
        lambda: seq(nn.ConvTranspose2d(3, 6, 3, bias=False), BN(6), nn.ReLU(), head(6)),
        image,
        {"0.weight": "col"},
    ),
    "residual_bn": (
        lambda: residual(False),
        lambda: image(4),
        {"c1.weight": "row", "c2.weight": "row"},
    ),
    "zero_gain": (
        lambda: residual(True),
        lambda: image(4),
        {"c1.weight": "row", "c2.weight": "row"},
    ),
    "sync_bn": (
        lambda: nn.SyncBatchNorm.convert_sync_batchnorm(conv_norm(BN(6), nn.ReLU())),
        image,
        {"0.weight": "row"},
    ),
    "linear_bn": (lambda: lin_norm(BN1(6), nn.ReLU(), bias=True), rows, {"0.weight": "row"}),
    "linear_ln": (lambda: lin_norm(LN(6), nn.GELU()), rows, {"0.weight": "tensor"}),
    "linear_bias_ln": (lambda: lin_norm(LN(6), nn.GELU(), bias=True), rows, {}),
    "linear_zero_bias_ln": (
        lambda: nn.init.zeros_((m := lin_norm(LN(6), bias=True))[0].bias) is None or m,
        rows,
        {},
    ),
    "linear_gelu_ln": (lambda: lin_norm(nn.GELU(), LN(6)), rows, {}),
    "linear_rms": (lambda: lin_norm(nn.RMSNorm(6), nn.GELU()), rows, {"0.weight": "tensor"}),
    "linear_upcast_rms": (lambda: lin_norm(UpcastRMS(6), nn.GELU()), rows, {"0.weight": "tensor"}),
    "tiny_linear_ln": (
        lambda: (m := lin_norm(LN(6), nn.GELU()))[0].weight.data.mul_(1e-4) is None or m,
        rows,
        {"0.weight": "tensor"},
    ),
    "dropout_ln": (lambda: lin_norm(nn.Dropout(0.3), LN(6)), rows, {"0.weight": "tensor"}),
    "bias_dropout_bn": (lambda: lin_norm(nn.Dropout(0.3), BN1(6), bias=True), rows, {}),
    "mlp_bn": (
        lambda: seq(
            *(nn.Linear(8, 6, bias=False), nn.ReLU(), nn.Linear(6, 5), BN1(5), nn.Tanh()),
            nn.Linear(5, 2),
        ),
        rows,
        {"0.weight": "tensor", "2.weight": "row"},
    ),
    "manual_bn": (manual_bn, rows, {"f.weight": "row"}),
    "attention": (lambda: Attention(norm=False), tokens, {}),
    "qk_norm": (
        lambda: Attention(norm=True),
        tokens,
        {"q.weight": "block:2", "k.weight": "block:2"},
    ),
    "pre_norm_transformer": (transformer, tokens, {}),
    "swiglu_rms": (swiglu, tokens, {"up.weight": "tensor", "down.weight": "tensor"}),
    "lora": (lora, rows, {}),
    "layerscale": (layerscale, rows, {}),
    "cosine_head": (cosine_head, rows, {"f.weight": "tensor", "w": "row"}),
    "weight_norm": (
        lambda: seq(parametrizations.weight_norm(nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 2)),
        rows,
        {"0.parametrizations.weight.original1": "row"},
    ),
    "spectral_norm": (
        lambda: seq(parametrizations.spectral_norm(nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 2)),
        rows,
        {"0.parametrizations.weight.original": "tensor"},
    ),
    "weight_standardized": (standardized, image, {"w": "row"}),
    "tied_two_bns": (tied_convs, lambda: image(4), {"0.weight": "row"}),
    "tied_autoencoder": (tied_autoencoder, rows, {}),
    "embedding_ln": (
        lambda: seq(nn.Embedding(6, 8), LN(8), nn.Linear(8, 3)),
        lambda: torch.arange(12).reshape(3, 4) % 6,
        {"0.weight": "row"},
    ),
    "tapped_conv": (tapped, image, {}),
    "concat_bn": (concat, image, {"a.weight": "row", "b.weight": "row"}),
}

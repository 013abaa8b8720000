"""Sequence models of known answer: embeddings, transformer blocks, experts, recurrence.

As in ``detection_zoo_full``, every expectation is derived by hand.
"""

import torch
from detection_zoo import LN, Net, UpcastRMS, rows, seq, tokens
from detection_zoo_attention import Attention
from detection_zoo_full import Case, joint, lin, own, param
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """Pre-norm."""

    def __init__(self):
        super().__init__()
        self.n1, self.attn = LN(8), Attention(bias=True, end=False)
        self.n2, self.fc1, self.fc2 = LN(8), lin(8, 12, True), lin(12, 8, True)

    def forward(self, x):
        x = x + self.attn(self.n1(x))
        return x + self.fc2(F.gelu(self.fc1(self.n2(x))))


WRITERS = ("block.attn.o.weight", "block.attn.o.bias", "block.fc2.weight", "block.fc2.bias")


def language_model(tied):
    def forward(s, i):
        x = s.n(s.block(s.e(i) + s.p))
        return F.linear(x, s.e.weight) if tied else s.h(x)

    head = {} if tied else {"h": lin(8, 6)}
    return Net(forward, e=nn.Embedding(6, 8), p=param(4, 8), block=Block(), n=LN(8), **head)


def vision_transformer():
    def forward(s, x):
        x = s.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([s.cls.expand(len(x), -1, -1), x], 1) + s.pos
        return s.h(s.n(s.block(x))[:, 0])

    parts = {"cls": param(1, 1, 8), "pos": param(1, 5, 8), "patch": nn.Conv2d(3, 8, 4, 4)}
    return Net(forward, **parts, block=Block(), n=LN(8), h=lin(8, 2, True))


def post_norm(activation, tied=False):
    def forward(s, i):
        x = s.block(s.n(s.e(i) + s.p))
        return F.linear(x, s.e.weight) if tied else s.h(x)

    block = nn.TransformerEncoderLayer(8, 2, 12, 0.0, activation, batch_first=True)
    return Net(
        forward, e=nn.Embedding(6, 8), p=param(4, 8), n=LN(8), block=block, h=lin(8, 3, True)
    )


def mlp(function, *names, bias=False, **parts):
    """A residual branch of two or three matrices."""
    wide = {name: lin(8, 12, bias) for name in names}
    return Net(function, **wide, down=lin(12, 8, bias), **parts, h=lin(8, 2, True))


def normed_residual():
    """Everything on the sphere, as in nGPT: the step may not scale, but all matrices may."""

    def forward(s, i):
        x = F.normalize(s.e(i), dim=-1)
        y = F.normalize(s.down(F.silu(s.gate(x)) * s.up(x)), dim=-1)
        return s.h(F.normalize(x + s.alpha * (y - x), dim=-1))

    return mlp(forward, "gate", "up", e=nn.Embedding(6, 8), alpha=param(8))


def adaptive_norm():
    def forward(s, x, c):
        shift, scale, gate = s.mod(F.silu(c))[:, None].chunk(3, -1)
        y = F.layer_norm(x, (8,)) * (1 + scale) + shift
        return s.h(F.layer_norm(x + gate * s.down(F.gelu(s.up(y))), (8,)))

    return mlp(forward, "up", bias=True, mod=lin(8, 24, True))


def gated(function, **parts):
    return Net(function, g=lin(8, 8, True), f=lin(8, 8, True), **parts, h=lin(8, 2, True))


def layerscale():
    def forward(s, i):
        x = s.e(i)
        return s.h(s.n(x + s.g * s.f(F.layer_norm(x, (8,)))))

    gain = nn.Parameter(1e-6 * torch.ones(8))
    return Net(forward, e=nn.Embedding(6, 8), g=gain, f=lin(8, 8, True), n=LN(8), h=lin(8, 2, True))


def routed():
    """By a fixed table that never says 2."""

    def forward(s, x):
        y = torch.zeros_like(x)
        for i, expert in enumerate(s.experts):
            chosen = (s.route == i).nonzero()[:, 0]
            if chosen.numel():
                y = y.index_add(0, chosen, s.n(expert(x[chosen])))
        return s.h(y)

    experts = nn.ModuleList(lin(8, 8) for _ in range(3))
    model = Net(forward, experts=experts, n=LN(8), h=lin(8, 2, True))
    model.register_buffer("route", torch.tensor([0, 1, 0, 1, 1, 0, 0, 1]))
    return model


def switched():
    """The best expert by score, times its probability: the router does not only choose."""

    def forward(s, x):
        p, best = s.r(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(s.experts):
            y[best == i] = s.n(expert(x[best == i]))
        return s.h(x + p[..., None] * y)

    experts = nn.ModuleList(lin(8, 8) for _ in range(2))
    return Net(forward, r=lin(8, 2), experts=experts, n=LN(8), h=lin(8, 2, True))


def stacked(each_normed, deep=False):
    def forward(s, x):
        y = torch.einsum("btd,edf->btef", x, s.w)
        if deep:
            y = torch.einsum("btef,efd->bted", F.relu(y), s.w2)
        p = s.r(x).softmax(-1)[..., None]
        y = (p * s.n(y)).sum(2) if each_normed else s.n((p * y).sum(2))
        return s.h(torch.tanh(y))

    second = {"w2": param(3, 5, 8)} if deep else {}
    n = 8 if deep else 5
    return Net(forward, w=param(3, 8, 5), **second, r=lin(8, 3), n=LN(n), h=lin(n, 2, True))


def codebook():
    """Vector quantization of directions, with its straight-through step and codebook loss."""

    def forward(s, x):
        z, codes = F.normalize(s.f(x), dim=-1), F.normalize(s.codes, dim=-1)
        q = codes[(z @ codes.t()).argmax(-1)]
        return s.h(z + (q - z).detach()), (q - z.detach()).square().mean()

    return Net(forward, f=lin(), codes=param(4, 6), h=lin(6, 2, True))


def recurrent(normed):
    def forward(s, x):
        h = torch.zeros(x.shape[0], 4, dtype=x.dtype)
        for t in range(x.shape[1]):
            a, b = s.w(x[:, t]), s.u(h)
            h = torch.tanh(s.n(a) + s.n2(b) if normed else s.n(a + b))
        return s.h(h)

    return Net(forward, w=lin(8, 4), u=lin(4, 4), n=LN(4), n2=LN(4), h=lin(4, 2, True))


def cell(kind):
    return Net(lambda s, x: s.h(s.r(x)[0]), r=kind(8, 4, batch_first=True), h=lin(4, 2, True))


def ids():
    """Connected: no set of tokens stays at positions of its own."""
    return torch.tensor([[0, 1, 2, 3], [2, 3, 4, 5], [5, 0, 3, 1]])


def pixels():
    return torch.randn(3, 3, 8, 8)


def table(n, *parts, **options):
    return seq(nn.Embedding(n, 8, **options), *parts, LN(8), lin(8, 3, True))


STREAM = joint("p", "e.weight", *WRITERS)

STREAMS = {
    "embedding_unused": Case(lambda: table(9), ids, {"0.weight": "row"}),
    "embedding_padding": Case(lambda: table(6, padding_idx=0), ids, {"0.weight": "row"}),
    "embedding_dropout": Case(lambda: table(6, nn.Dropout(0.2)), ids, {"0.weight": "row"}),
    "embedding_positions": Case(
        lambda: Net(
            lambda s, i: s.h(s.n(s.e(i) + s.p[: i.shape[1]])),
            **{"e": nn.Embedding(6, 8), "p": param(4, 8), "n": LN(8), "h": lin(8, 3)},
        ),
        *(ids, joint("p", "e.weight")),
    ),
    # All that writes to a residual stream that is normalized wherever it is read.
    "language_model": Case(lambda: language_model(False), ids, STREAM, ("block.attn.k.bias",)),
    "tied_language_model": Case(lambda: language_model(True), ids, {}, ("block.attn.k.bias",)),
    "vision_transformer": Case(
        vision_transformer,
        *(pixels, joint("cls", "pos", *own("patch"), *WRITERS), ("block.attn.k.bias",)),
    ),
    "post_norm_gelu": Case(lambda: post_norm("gelu"), ids, joint("p", "e.weight")),
    # The MLP is homogeneous with its biases: its input, a norm's output, may scale with them.
    "post_norm_relu": Case(
        lambda: post_norm("relu"),
        ids,
        {
            **joint("p", "e.weight"),
            **joint(*(f"block.{n}" for n in ("linear1.bias", "linear2.bias", *own("norm1")))),
        },
    ),
    "tied_post_norm": Case(lambda: post_norm("gelu", tied=True), ids, {}, ("h.weight", "h.bias")),
    "pre_norm_mlp": Case(
        lambda: mlp(
            lambda s, x: s.h(s.n2(x + s.down(F.gelu(s.up(s.n(x)))))), "up", n=LN(8), n2=LN(8)
        ),
        *(tokens, {}),
        reasons={"up.weight": "GELU", "down.weight": "sum"},
    ),
    "post_norm_mlp": Case(
        lambda: mlp(lambda s, x: s.h(s.n(x + s.down(F.gelu(s.up(x))))), "up", n=LN(8)), tokens, {}
    ),
    "sub_norm_mlp": Case(
        lambda: mlp(lambda s, x: s.h(x + s.n(s.down(F.relu(s.up(x))))), "up", n=LN(8)),
        *(tokens, {"up.weight": "tensor", "down.weight": "tensor"}),
    ),
    "squared_relu_mlp": Case(
        lambda: mlp(
            lambda s, x: s.h(x + s.n(s.down(F.relu(s.up(x)).square()))), "up", n=UpcastRMS(8)
        ),
        *(tokens, {"up.weight": "tensor", "down.weight": "tensor"}),
    ),
    "swiglu": Case(
        lambda: mlp(
            lambda s, x: s.h(x + s.n(s.down(F.silu(s.gate(x)) * s.up(x)))),
            *("gate", "up"),
            n=nn.RMSNorm(8),
        ),
        *(tokens, {"up.weight": "tensor", "down.weight": "tensor"}),
        reasons={"gate.weight": "SiLU"},
    ),
    # up + down = the bias of down in degrees.
    "gated_mlp_biases": Case(
        lambda: mlp(
            lambda s, x: s.h(s.n(s.down(torch.sigmoid(s.gate(x)) * s.up(x)))),
            *("gate", "up"),
            bias=True,
            n=LN(8),
        ),
        *(tokens, joint(*own("down"))),
        reasons={"gate.weight": "sigmoid"},
    ),
    "normed_residual": Case(
        normed_residual,
        *(ids, {"up.weight": "tensor", "down.weight": "tensor", "e.weight": "row"}),
    ),
    "adaptive_norm": Case(adaptive_norm, lambda: (tokens(), torch.randn(3, 8)), {}),
    "highway": Case(
        lambda: gated(
            lambda s, x: s.h((t := torch.sigmoid(s.g(x))) * F.relu(s.f(x)) + (1 - t) * x)
        ),
        *(tokens, {}),
        reasons={"g.weight": "sigmoid", "f.weight": "sum"},
    ),
    "gated_residual": Case(
        lambda: gated(
            lambda s, i: s.h(s.n((x := s.e(i)) + torch.sigmoid(s.g(y := s.n(x))) * s.f(y))),
            **{"e": nn.Embedding(6, 8), "n": LN(8, elementwise_affine=False)},
        ),
        *(ids, joint("f.weight", "f.bias", "e.weight")),
        reasons={"g.weight": "sigmoid"},
    ),
    # e = g + f in degrees; g is used after f.
    "layerscale": Case(layerscale, ids, joint("g", "e.weight")),
}

OTHERS = {
    "routed": Case(
        routed,
        *(rows, {"experts.0.weight": "tensor", "experts.1.weight": "tensor"}),
        ("experts.2.weight",),
    ),
    "switched": Case(
        switched,
        *(tokens, {"experts.0.weight": "tensor", "experts.1.weight": "tensor"}),
        reasons={"r.weight": "softmax"},
    ),
    "stacked": Case(lambda: stacked(True), tokens, {"w": "row"}, reasons={"r.weight": "softmax"}),
    "stacked_mixed": Case(lambda: stacked(False), tokens, {"w": "tensor"}),
    "stacked_deep": Case(lambda: stacked(True, True), tokens, {"w": "row", "w2": "row"}),
    "codebook": Case(codebook, rows, {"f.weight": "tensor", "codes": "row"}),
    "lstm": Case(lambda: cell(nn.LSTM), tokens, {}, reasons={"r.weight_ih_l0": "sigmoid"}),
    "gru": Case(lambda: cell(nn.GRU), tokens, {}),
    "normed_rnn": Case(
        lambda: recurrent(True), tokens, {"w.weight": "tensor", "u.weight": "tensor"}
    ),
    # The state is a tanh: the two may scale together only.
    "normed_sum_rnn": Case(
        lambda: recurrent(False), tokens, joint("w.weight", "u.weight"), own("n2")
    ),
}

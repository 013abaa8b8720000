"""Attention of known answer: heads, fused projections, kernels, biases that softmax cancels.

As in ``detection_zoo_full``, every expectation is derived by hand.
"""

import torch
from detection_zoo import LN, Net, UpcastRMS, tokens
from detection_zoo_full import Case, changed, joint, lin, own, param
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Two heads of four, or four over two; Q, K and V in one matrix, in thirds or head by head."""

    def __init__(self, norm=None, bias=False, fused=None, grouped=False, end=True):
        super().__init__()
        self.heads = (4, 2, 2) if grouped else (2, 2, 2)
        self.fused, self.norm, self.end = fused, norm, end
        sizes = [4 * h for h in self.heads]
        if fused:
            self.qkv = lin(8, sum(sizes), bias)
        else:
            self.q, self.k, self.v = (lin(8, n, bias) for n in sizes)
        if norm in (nn.RMSNorm, LN, UpcastRMS):
            self.qn, self.kn = norm(4), norm(4)
        self.o = lin(sizes[0], 8, bias)

    def split(self, x):
        if self.fused == "by head":
            return self.qkv(x).unflatten(-1, (2, 3, 4)).unbind(-2)
        if self.fused:
            parts = self.qkv(x).split([4 * h for h in self.heads], -1)
        else:
            parts = self.q(x), self.k(x), self.v(x)
        return (y.unflatten(-1, (h, 4)) for y, h in zip(parts, self.heads, strict=True))

    def forward(self, x):
        q, k, v = (y.transpose(1, 2) for y in self.split(x))
        if self.norm == "l2":
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        elif self.norm:
            q, k = self.qn(q), self.kn(k)
        groups = self.heads[0] // self.heads[1]
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        y = self.o(y.transpose(1, 2).flatten(2))
        return x + y if self.end else y


class Kernels(nn.Module):
    """Projections as [model, heads, head] kernels, for einsum."""

    def __init__(self, bias=False):
        super().__init__()
        self.q, self.k, self.v = (param(8, 2, 4) for _ in range(3))
        self.qb = param(2, 4) if bias else 0.0
        self.h = lin(8, 2, True)

    def forward(self, x):
        q, k, v = (torch.einsum("btd,dhe->bthe", x, w) for w in (self.q, self.k, self.v))
        q, k = F.normalize(q + self.qb, dim=-1), F.normalize(k, dim=-1)
        scores = torch.einsum("bshe,bthe->bhst", q, k).softmax(-1)
        return self.h(torch.einsum("bhst,bthe->bshe", scores, v).flatten(2))


def swin_attention():
    def forward(s, x):
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (s.q, s.k, s.v))
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2)
        scores = (scores * s.scale.clamp(max=4.6).exp()).softmax(-1)
        return x + s.o((scores @ v).transpose(1, 2).flatten(2))

    parts = {"q": lin(8, 8, True), "k": lin(8, 8), "v": lin(8, 8, True), "o": lin(8, 8, True)}
    return Net(forward, **parts, scale=nn.Parameter(torch.ones(2, 1, 1)))


def adapted_attention():
    """A low-rank update of normed queries, starting at zero."""

    def forward(s, x):
        q, k, v = (
            y.unflatten(-1, (2, 4)).transpose(1, 2) for y in (s.q(x) + s.b(s.a(x)), s.k(x), s.v(x))
        )
        y = F.scaled_dot_product_attention(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v)
        return s.h(y.transpose(1, 2).flatten(2))

    q, k, v = (lin(8, 8) for _ in range(3))
    model = Net(forward, q=q, k=k, v=v, a=lin(8, 2), b=lin(2, 8), h=lin(8, 2, True))
    return changed(model, lambda m: nn.init.zeros_(m.b.weight))


def packed_attention(bias):
    def forward(s, x):
        return s.h(s.n(s.a(x, x, x, need_weights=False)[0]))

    packed = nn.MultiheadAttention(8, 2, bias=bias, batch_first=True)
    return Net(forward, a=packed, n=LN(8), h=lin(8, 2, True))


HEADS = {"q.weight": "block:2", "k.weight": "block:2"}
SEEN = "block:4@0:16"

ATTENTION = {
    "plain": Case(Attention, tokens, {}, reasons={"q.weight": "softmax", "v.weight": "sum"}),
    # A query times the bias of all keys is one number for all keys; softmax takes it away.
    "biases": Case(lambda: Attention(bias=True), tokens, {}, ("k.bias",)),
    "rms": Case(lambda: Attention(nn.RMSNorm), tokens, HEADS),
    "rms_bias": Case(
        lambda: Attention(UpcastRMS, bias=True),
        *(tokens, {**joint(*own("q"), spec="block:2"), **joint(*own("k"), spec="block:2")}),
    ),
    # The same for the bias of the norm of the keys.
    "ln": Case(lambda: Attention(LN), tokens, HEADS, ("kn.bias",)),
    "l2": Case(lambda: Attention("l2"), tokens, HEADS),
    "grouped": Case(
        lambda: Attention(nn.RMSNorm, grouped=True),
        *(tokens, {"q.weight": "block:4", "k.weight": "block:2"}),
    ),
    "fused": Case(lambda: Attention(nn.RMSNorm, fused=True), tokens, {"qkv.weight": SEEN}),
    "fused_bias": Case(
        lambda: Attention(nn.RMSNorm, True, fused=True), tokens, joint(*own("qkv"), spec=SEEN)
    ),
    "fused_ln": Case(lambda: Attention(LN, fused=True), tokens, {"qkv.weight": SEEN}, ("kn.bias",)),
    "fused_ln_bias": Case(
        lambda: Attention(LN, True, fused=True),
        *(tokens, joint(*own("qkv"), spec=SEEN), ("kn.bias",)),
    ),
    "fused_l2": Case(lambda: Attention("l2", fused=True), tokens, {"qkv.weight": SEEN}),
    "fused_grouped": Case(
        lambda: Attention(nn.RMSNorm, fused=True, grouped=True),
        *(tokens, {"qkv.weight": "block:6@0:24"}),
    ),
    "fused_by_head": Case(
        lambda: Attention(nn.RMSNorm, fused="by head"),
        *(tokens, {"qkv.weight": "block:2@0:8,block:2@12:20"}),
    ),
    "kernels": Case(Kernels, tokens, {"q": "col", "k": "col"}),
    # Columns of one are rows of the other: only the whole has a spec for both.
    "kernels_bias": Case(lambda: Kernels(True), tokens, {**joint("q", "qb"), "k": "col"}),
    "swin": Case(
        swin_attention, tokens, {**joint(*own("q"), spec="block:2"), "k.weight": "block:2"}
    ),
    # q = b + a in degrees, head by head; b is used after a.
    "adapted": Case(
        adapted_attention,
        *(tokens, {**joint("q.weight", "b.weight", spec="block:2"), "k.weight": "block:2"}),
    ),
    # The heads are mixed before the norm.
    "packed": Case(
        lambda: packed_attention(False),
        *(tokens, {"a.in_proj_weight": "tensor@16:24", "a.out_proj.weight": "tensor"}),
    ),
    "packed_bias": Case(lambda: packed_attention(True), tokens, joint(*own("a.out_proj"))),
}

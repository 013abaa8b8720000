"""Networks of known answer inside training code, and where gradients, traces or both mislead.

As in ``detection_zoo_full``, every expectation is derived by hand.
"""

import torch
from detection_zoo import (
    BN,
    BN1,
    LN,
    Net,
    conv,
    conv_norm,
    cosine_head,
    head,
    image,
    lin_norm,
    rows,
    seq,
)
from detection_zoo_full import ROW, TENSOR, Case, changed, joint, lin, linear_net, own, param
from torch import nn
from torch.nn import functional as F


def teacher(target):
    """A loss against a target: from a buffer, or from the weight itself without its gradient."""

    def forward(s, x):
        with torch.no_grad():
            goal = target(s, x)
        return F.mse_loss(torch.tanh(s.n(s.f(x))), goal)

    model = Net(forward, f=lin(), n=BN1(6, affine=False))
    model.register_buffer("average", torch.randn(6, 8))
    return model


def momentum_teacher():
    def forward(s, x):
        with torch.no_grad():
            goal = s.teacher(x)
        return F.mse_loss(s.student(x), goal)

    student, copied = (lin_norm(BN1(6), nn.ReLU()) for _ in range(2))
    return Net(forward, student=student, teacher=copied.requires_grad_(False))


def contrast(z):
    z = F.normalize(z, dim=-1)
    return F.cross_entropy(z @ z.t() / 0.5, torch.arange(len(z)))


def angular_margin():
    def forward(s, x):
        cosine = F.linear(F.normalize(s.f(x)), F.normalize(s.w))
        return 8 * torch.cos(torch.acos(0.99 * cosine) + 0.3)

    return Net(forward, f=lin(), w=param(3, 6))


class Labelled(nn.Module):
    """Keyword inputs, and outputs of which only the loss is the function."""

    def __init__(self):
        super().__init__()
        self.c, self.bn, self.h = conv(), BN(6), head(6)

    def forward(self, *, batch, labels=None):
        hidden = self.c(batch["pixels"])
        z = self.h(F.relu(self.bn(hidden)))
        return {"logits": hidden, "loss": F.cross_entropy(z, labels), "hidden_states": (hidden,)}


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        return w.sign()

    @staticmethod
    def backward(ctx, g):
        return g


def assigned():
    def forward(s, x):
        y = torch.zeros(x.shape[0], 6, dtype=x.dtype)
        y[:, :4], y[:, 4:] = s.a(x), s.b(x)
        return s.h(torch.tanh(s.bn(y)))

    return Net(forward, a=lin(8, 4), b=lin(8, 2), bn=BN1(6), h=lin(6, 2, True))


def escaping(scale):
    """A scale that autograd does not see, behind a norm that hides the weight otherwise."""
    return linear_net(lambda s, x: s.h(torch.tanh(s.n(s.f(x)) * scale(s, x))), n=LN(6))


def stochastic_depth():
    def forward(s, x):
        keep = (torch.rand(x.shape[0], 1, dtype=x.dtype) > 0.3).to(x.dtype)
        return s.h(torch.tanh(s.bn(x) + keep * s.bn2(s.f(x))))

    return Net(forward, f=lin(8, 8), bn=BN1(8), bn2=BN1(8), h=lin(8, 2, True))


def layer_drop():
    """Dropped as a whole, by a Python branch, half of the times."""

    def forward(s, x):
        y = s.bn(x)
        return s.h(torch.tanh(y + s.bn2(s.f(x)) if torch.rand(()) > 0.5 else y))

    return Net(forward, f=lin(8, 8), bn=BN1(8), bn2=BN1(8), h=lin(8, 2, True))


def skip_drop():
    """The same, with a second branch that is not normalized: nothing is invariant."""

    def forward(s, x):
        y = s.n(s.f(x))
        return s.h(torch.tanh(y + s.f(x) if torch.rand(()) > 0.5 else y))

    return linear_net(forward, n=LN(6))


def argmax_router():
    def forward(s, x):
        chosen = F.one_hot(s.r(x).argmax(-1), 4).to(x.dtype)
        return s.h(torch.tanh(chosen @ s.e + x))

    return Net(forward, r=lin(8, 4), e=param(4, 8), h=lin(8, 2))


class Wrapper(nn.Module):
    """As DataParallel, but of nobody's acquaintance: its names are its own."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *inputs):
        return self.inner(*inputs)


def batch():
    return {"batch": {"pixels": image()}, "labels": torch.tensor([0, 1, 1, 0])}


TANGENT, REFUTED = "not tangent", "refuted: rescaling"

# What training code does around a network.
AROUND = {
    "unnormalized": Case(
        lambda: seq(lin(bias=True), nn.ReLU(), lin(6, 5, True)),
        *(rows, {}),
        reasons={"2.weight": "output"},
    ),
    "loss_normalizes": Case(
        lambda: seq(lin(bias=True), nn.ReLU(), lin(6, 5, True)),
        *(rows, joint(*own("2"))),
        loss=contrast,
    ),
    "cosine_classifier": Case(cosine_head, rows, {"f.weight": "tensor", "w": "row"}),
    "angular_margin": Case(angular_margin, rows, {"f.weight": "tensor", "w": "row"}),
    "keywords_and_loss": Case(Labelled, batch, {"c.weight": "row"}),
    "frozen_weight": Case(
        lambda: changed(conv_norm(BN(6), nn.ReLU()), lambda m: m[0].weight.requires_grad_(False)),
        *(image, ROW),
    ),
    "wrapped": Case(lambda: Wrapper(conv_norm(BN(6), nn.ReLU())), image, {"inner.0.weight": "row"}),
    "orig_mod": Case(lambda: Net(None, _orig_mod=conv_norm(BN(6), nn.ReLU())), image, ROW),
    "data_parallel": Case(lambda: nn.DataParallel(conv_norm(BN(6), nn.ReLU())), image, ROW),
    "frozen_bn": Case(
        lambda: changed(conv_norm(BN(6), nn.ReLU()), lambda m: m[1].eval()),
        *(image, {}),
        reasons={"0.weight": "BatchNorm in eval mode"},
    ),
    "tiny_variance": Case(
        lambda: changed(lin_norm(LN(6), nn.GELU()), lambda m: m[0].weight.data.mul_(1e-4)),
        *(rows, TENSOR),
    ),
    "average_teacher": Case(
        lambda: teacher(lambda s, x: F.linear(x, s.average)), rows, {"f.weight": "row"}
    ),
    # The gradient of the loss is tangent, but the target moves with the weight.
    "own_target": Case(lambda: teacher(lambda s, x: F.linear(x, s.f.weight.clone())), rows, {}),
    "own_normalized_target": Case(
        lambda: teacher(lambda s, x: s.n(F.linear(x.flip(1), s.f.weight.clone()))),
        *(rows, {"f.weight": "row"}),
    ),
    "momentum_teacher": Case(
        momentum_teacher, rows, {"student.0.weight": "row", "teacher.0.weight": "row"}
    ),
    "dead_parameters": Case(
        lambda: Net(lambda s, x: s.h(F.gelu(s.f(x))), f=lin(), unused=lin(3, 3, True), h=lin(6, 2)),
        *(rows, {}, ("unused.weight", "unused.bias")),
    ),
}

# Where gradients, traces or both mislead.
TRAPS = {
    "relu6_out_of_reach": Case(
        lambda: conv_norm(nn.ReLU6(), BN(6)),
        lambda: 0.1 * image(),
        {},
        reasons={"0.weight": REFUTED},
    ),
    "tanh_bn": Case(
        lambda: lin_norm(nn.Tanh(), BN1(6)), rows, {}, reasons={"0.weight": "tanh is not homog"}
    ),
    # True, as BatchNorm takes log c away, but no rule knows logarithms of scales.
    "log_abs_bn": Case(
        lambda: lin_norm(Net(lambda s, x: torch.log(x.abs())), BN1(6), nn.Tanh()),
        *(rows, {}),
        numerical=ROW,
    ),
    "binary_weight": Case(
        lambda: Net(
            lambda s, x: s.h(F.relu(F.linear(x, Sign.apply(s.w)))), w=param(6, 8), h=lin(6, 2)
        ),
        *(rows, {}),
        reasons={"w": TANGENT},
        coarser={"w": TANGENT},
    ),
    "detached_norm": Case(
        lambda: linear_net(
            lambda s, x: s.h(torch.tanh((y := s.f(x)) / y.norm(dim=-1, keepdim=True).detach()))
        ),
        *(rows, {}),
        reasons={"f.weight": TANGENT},
        coarser={"f.weight": TANGENT},
    ),
    "stochastic_depth": Case(stochastic_depth, rows, {"f.weight": "row"}),
    "layer_drop": Case(
        *(layer_drop, rows, {"f.weight": "row"}),
    ),
    "skip_drop": Case(
        *(skip_drop, rows, {}),
    ),
    # Only in this example do a row of one and a row of the other always meet.
    "coupled_lookups": Case(
        lambda: Net(
            lambda s, i: s.h(s.n(s.e(i) + s.p)),
            **{"e": nn.Embedding(4, 8), "p": param(4, 8), "n": LN(8), "h": lin(8, 2)},
        ),
        *(lambda: torch.arange(4)[None], joint("p", "e.weight")),
    ),
    "slice_assignment": Case(assigned, rows, {"a.weight": "row", "b.weight": "row"}),
    # No gradient, but a proof: only a common factor of all scores keeps the argmax.
    "argmax_router": Case(argmax_router, rows, {"r.weight": "tensor"}),
    "item": Case(
        lambda: escaping(lambda s, x: s.f.weight.norm().item()),
        *(rows, {}),
        reasons={"f.weight": REFUTED},
    ),
    "numpy": Case(
        lambda: escaping(lambda s, x: float((s.f.weight.detach().numpy() ** 2).sum() ** 0.5)),
        *(rows, {}),
        reasons={"f.weight": REFUTED},
    ),
    "branch": Case(
        lambda: escaping(lambda s, x: 2.0 if bool(s.f(x).norm() > 5.0) else 1.0),
        *(rows, {}),
        reasons={"f.weight": REFUTED},
    ),
}

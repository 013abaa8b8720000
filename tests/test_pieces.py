"""Pieces against torch, in the tracker and in the geometry: spheres on some rows of a tensor."""

import copy
import re
from pathlib import Path

import pytest
import torch
from optimizers import ROWS, Row
from torch import nn
from torch.nn import functional as F

import sphereopt as so
from sphereopt import geometry, spheres
from sphereopt.geometry import angle, norm

every_row = pytest.mark.parametrize("row", ROWS, ids=str)
both_radii = pytest.mark.parametrize("radius", ["fixed", "free"])


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


# Against torch: attention with fused weights, of which queries and keys are invariant

DIM, HEADS = 12, 3
QK = f"block:{HEADS}@0:{DIM},block:{HEADS}@{DIM}:{2 * DIM}"


class Attention(nn.Module):
    """One block of attention with normalized queries and keys, in float64."""

    def __init__(self, bias):
        super().__init__()
        self.embed = nn.Linear(5, DIM)
        self.qkv = nn.Linear(DIM, 3 * DIM, bias=bias)
        self.head = nn.Linear(DIM, 4)
        self.double()

    def forward(self, x):
        x = torch.tanh(self.embed(x))
        heads = self.qkv(x).unflatten(-1, (3, HEADS, -1)).movedim(-3, 0).transpose(-2, -3)
        q, k, v = heads
        # The eps of a norm makes it not quite invariant; 1e-30 leaves rounding only.
        q, k = (F.rms_norm(z, z.shape[-1:], eps=1e-30) for z in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return self.head(mixed.transpose(-2, -3).flatten(-2).mean(1))


def fit(model, optimizer, steps):
    """Train on batches that are the same in every call, with a learning rate that changes."""
    generator = torch.Generator().manual_seed(3)
    for step in range(steps):
        x = torch.randn(16, 6, 5, generator=generator, dtype=torch.float64)
        y = x[:, :, :4].mean(1).argmax(1)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        (-loss if optimizer.defaults["maximize"] else loss).backward()
        for group in optimizer.param_groups:
            group["lr"] *= 1.02 if step % 20 < 10 else 1 / 1.03
        optimizer.step()


# Muon makes a matrix of every piece, where torch's sees the whole: tests/test_optim_muon.py
LIKE_TORCH = [row for row in ROWS if row.free and row.entrywise]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("row", LIKE_TORCH, ids=str)
def test_free_follows_torch_on_spheres_and_between_them(row: Row, bias):
    model = Attention(bias)
    twin, start = copy.deepcopy(model), copy.deepcopy(model)
    names = ("qkv.weight", "qkv.bias") if bias else "qkv.weight"
    groups = so.param_groups(model, {names: QK}, decay_norms_and_biases=True)
    ours = row.make(groups, radius="free", weight_decay=5e-3)
    fit(model, ours, 110)
    fit(twin, row.make_torch(twin.parameters(), weight_decay=5e-3), 110)

    def joined(net):
        parts = [net.qkv.weight, net.qkv.bias[:, None]] if bias else [net.qkv.weight]
        return torch.cat([p.detach() for p in parts], 1)

    mine, torchs = joined(model), joined(twin)
    assert angle(mine, torchs, QK).max() <= 1e-12
    assert angle(joined(start), torchs, QK).min() > 1e-2, "heads do turn"
    state = ours.state[model.qkv.weight]
    torch.testing.assert_close(state["virtual_radius"], norm(torchs, QK), rtol=1e-12, atol=0)
    torch.testing.assert_close(norm(mine, QK), norm(joined(start), QK), rtol=1e-13, atol=0)
    assert (state["virtual_radius"] / state["radius"] - 1).abs().min() > 1e-3
    torch.testing.assert_close(mine[2 * DIM :], torchs[2 * DIM :], rtol=1e-12, atol=1e-13)
    for p, q in ((model.embed, twin.embed), (model.head, twin.head)):
        torch.testing.assert_close(p.weight, q.weight, rtol=1e-11, atol=1e-12)


def test_a_run_of_torch_is_continued_in_the_middle():
    model = Attention(bias=True)
    twin = copy.deepcopy(model)
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-3}
    specs = {("qkv.weight", "qkv.bias"): QK}
    first = torch.optim.SGD(so.param_groups(model, specs), **options)
    reference = torch.optim.SGD(so.param_groups(twin, specs), **options)
    ours = so.SphereSGD(so.param_groups(model, specs), radius="free", **options)
    fit(model, first, 30)
    ours.load_state_dict(first.state_dict())
    fit(model, ours, 30)
    for _ in range(2):
        fit(twin, reference, 30)
    mine, torchs = (
        torch.cat([net.qkv.weight.detach(), net.qkv.bias.detach()[:, None]], 1)
        for net in (model, twin)
    )
    assert angle(mine, torchs, QK).max() <= 1e-12
    torch.testing.assert_close(mine[2 * DIM :], torchs[2 * DIM :], rtol=1e-12, atol=1e-13)


# The tracker

ODD = "block:2@1:7,row@7:9,tensor@10:12"  # rows 0, 9 and 12 on no sphere
PARTS = {"block:2": (1, 7), "row": (7, 9), "tensor": (10, 12)}


def seen(params):
    """Return all spheres of the members, each as one long row, for odd pieces."""
    rows = []
    for i, j in ((1, 4), (4, 7), (7, 8), (8, 9), (10, 12)):
        rows.append(torch.cat([p.detach()[i:j].flatten() for p in params]))
    return rows


@both_radii
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("row", [*ROWS[:2], ROWS[5], None], ids=str)
def test_the_tracker_reports_a_parameter_once_over_its_pieces(row, joint, radius):
    params = [nn.Parameter(normal(13, 5)), nn.Parameter(normal(13, 2))]
    named = [*zip("wb", params, strict=True)]
    group = {"params": named, "sphere": ODD, "joint": joint}
    if row is None:
        optimizer = torch.optim.AdamW([group], lr=0.1)
    else:
        optimizer = row.make([group], radius=radius)
    rows = []
    with so.track(optimizer, rows.append):
        for _ in range(3):
            old = [p.detach().clone() for p in params]
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
    entries = rows[-1]["parameters"]
    assert list(entries) == (["w + b"] if joint else ["w", "b"])
    units = {"w + b": slice(2)} if joint else {"w": slice(1), "b": slice(1, 2)}
    for name, i in units.items():
        before, after = seen(old[i]), seen(params[i])
        r = torch.stack([x.norm() for x in after])
        if radius == "free" and row is not None:
            r = optimizer.state[params[i][0]]["virtual_radius"]
        pairs = zip(before, after, strict=True)
        theta = torch.cat([angle(x, y) for x, y in pairs])
        assert entries[name]["sphere"] == ODD
        assert entries[name]["count"] == 5
        for probe, value in (("norm", r), ("angle", theta)):
            for key, q in {"min": 0.0, "median": 0.5, "q75": 0.75, "max": 1.0}.items():
                want = torch.quantile(value, q).item()
                assert entries[name][probe][key] == pytest.approx(want, rel=1e-10), (probe, key)
            assert entries[name][probe]["mean"] == pytest.approx(value.mean().item(), rel=1e-10)


# Geometry: piece by piece


@pytest.mark.parametrize("shape", [(13, 4), (13, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_geometry_acts_piece_by_piece(shape, dtype):
    w, x = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype)
    numbers, points = ("norm", "angle", "distance"), ("retract", "exp")
    for name in (*numbers, *points, "tangent", "log", "transport"):
        function = getattr(geometry, name)
        special = {"norm": (w,), "transport": (w, x, geometry.tangent(w, w + 2 * x, ODD))}
        args = special.get(name, (w, x))
        whole = function(*args, ODD)
        parts = [function(*(z[i:j] for z in args), s) for s, (i, j) in PARTS.items()]
        if name in numbers:
            torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-14, atol=0)
            continue
        for part, (i, j) in zip(parts, PARTS.values(), strict=True):
            torch.testing.assert_close(whole[i:j], part, rtol=1e-14, atol=1e-15)
        for got, own in zip(spheres.rest(whole, ODD), spheres.rest(w, ODD), strict=True):
            assert torch.equal(got, own if name in points else torch.zeros_like(own))


def test_random_points_of_pieces_have_their_radii():
    radius = torch.arange(1.0, 6.0)
    x = geometry.random((13, 50), ODD, radius)
    torch.testing.assert_close(norm(x, ODD), radius.double(), rtol=1e-6, atol=0)
    assert 0.8 < torch.cat(spheres.rest(x, ODD)).std() < 1.2


def test_geometry_of_pieces_keeps_layouts_and_derivatives():
    w = normal(13, 4, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    t = normal(13, 4, 3, 3)
    moved = geometry.exp(w, t, ODD)
    assert moved.is_contiguous(memory_format=torch.channels_last)
    small, step = normal(13, 2).requires_grad_(), normal(13, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda w, t: geometry.retract(w, t, ODD), (small, step))
    assert torch.autograd.gradcheck(lambda w, t: geometry.tangent(w, t, ODD), (small, step))


def test_the_example_of_the_concepts_page():
    page = (Path(__file__).parent.parent / "docs" / "concepts.md").read_text()
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "@0:512" in c)
    names: dict = {}
    exec(code, names)
    for p in names["qkv"].parameters():
        p.grad = torch.randn_like(p)
    names["optimizer"].step()
    assert names["optimizer"].state[names["qkv"].weight]["radius"].shape == (16,)
